"""`glide-ds report`: one page of one or several runs, which needs neither the network nor anything beside it."""

from __future__ import annotations

import argparse
import base64
import datetime
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from glide_ds import __version__
from glide_ds.commands.config import configs_of
from glide_ds.commands.results.status import described, number
from glide_ds.config.explain import differences
from glide_ds.config.phases import PHASES
from glide_ds.errors import ConfigError
from glide_ds.files import check_place, user_path, write_file
from glide_ds.training.checkpoint.commit import MANIFEST, committed
from glide_ds.training.record import RunRecord

PAGE = "report.html"
POINTS = 60_000  # of all curves together, at about 20 bytes each
GRIDS = 8  # pictures per phase, from first to last
GRID_WIDTH = 900  # pixels
PICTURE_BYTES = 1_500_000  # of all grids together


class Chart(NamedTuple):
    """Curves in one picture: paths into a line of metrics.jsonl, whole families where a path leads to several."""

    title: str
    paths: tuple[str, ...]
    log: bool = False


CHARTS = (
    Chart("loss", ("loss", "validation.loss", "validation.loss_clip_off"), log=True),
    Chart("loss by quarter of the timesteps (q1: least noise)", ("loss_by_quartile",), log=True),
    Chart("held-out loss by quarter", ("validation.loss_by_quartile",), log=True),
    Chart("other terms", ("vb", "kl", "alignment"), log=True),
    Chart(
        "conditioning gain over shuffled embeddings",
        tuple(
            f"validation.gain_{name}.over_shuffled"
            for name in ("with_caption", "without_caption", "of_pictures")
        ),
    ),
    Chart("held-out shapes that are right", ("validation.score", "validation.score_caption_only")),
    Chart("gates", ("gate_mean", "gates")),
    Chart("gradient norm", ("grad_norm", "grad_norm_by_role"), log=True),
    Chart("learning rate", ("lr_by_role",)),
    Chart("images per second", ("images_per_s",)),
    Chart("share of the step", ("mfu", "data_wait_share", "communication_share")),
    Chart("peak memory, GiB", ("memory_gib",)),
    Chart("updates skipped, rollbacks, saves failed", ("skipped", "rollbacks", "saves_failed")),
)
Curve = list[tuple[int, float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="+", type=user_path, help="run directories; several are compared")
    parser.add_argument("--out", type=user_path, required=True, metavar="HTML", help="write the page here")
    parser.add_argument(
        "--evaluation",
        nargs="+",
        default=[],
        type=user_path,
        metavar="JSON",
        help="what `glide-ds evaluate --out` wrote",
    )


def run(args: argparse.Namespace) -> None:
    check_place(args.out.parent)
    records = [RunRecord.open(place) for place in args.run]
    evaluations = {str(path): evaluation(path) for path in args.evaluation}
    text = page(records, evaluations)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_file(args.out, text)
    print(
        f"wrote {args.out} ({len(text.encode()) / 2**20:.1f} MiB). Next: open it in a browser; "
        f"glide-ds export {args.run[0]} --out model.pt"
    )


def evaluation(path: Path) -> dict[str, Any]:
    """Figures of `glide-ds evaluate`. Raises ConfigError where the file holds none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--evaluation {path} can't be read ({error})", remedy="give what `glide-ds evaluate --out` wrote"
        ) from error


def page(records: Sequence[RunRecord], evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """The page as HTML. Raises ConfigError where what draws it is not installed."""
    try:
        from jinja2 import Environment, StrictUndefined
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError(
            f"glide-ds report needs {error.name}, which is not installed",
            remedy="run: bash launch/env.sh --extras report",
        ) from error
    names = named(records)
    budget = max(1, PICTURE_BYTES // len(records))
    source = files("glide_ds.commands.results").joinpath(PAGE).read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(source)
    return template.render(
        title=", ".join(names),
        made=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, glide_ds {__version__}",
        runs=[_run_section(record, name, budget) for record, name in zip(records, names, strict=True)],
        differences=list(_differences(records, names)),
        charts=[*guidance_charts(evaluations), *charts(records, names)],
        evaluations={name: list(flat(found)) for name, found in evaluations.items()},
        plotly=get_plotlyjs(),
    )


def named(records: Sequence[RunRecord]) -> list[str]:
    """A short name of each, all different."""
    short = [record.path.resolve().name for record in records]
    return short if len(set(short)) == len(short) else [str(record.path) for record in records]


def _run_section(record: RunRecord, name: str, budget: int) -> dict[str, Any]:
    """What the template shows of a run by itself."""
    state, *lines = described(record)
    return {
        "name": name,
        "state": state,
        "status": "\n".join(lines),
        "lineage": record.whole.get("lineage", {}),
        "versions": record.whole.get("versions", {}),
        "configurations": {phase: json.dumps(record.document(phase), indent=1) for phase in record.phases},
        "data": {phase: found for phase in record.phases if (found := list(flat(record.data_report(phase))))},
        "events": sorted(events(record), key=lambda event: event["order"]),
        "grids": dict(grids(record, budget)),
    }


def _differences(records: Sequence[RunRecord], names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """How each further run's configuration differs from the first one's."""
    for record, name in zip(records[1:], names[1:], strict=True):
        try:
            lines = list(differences(configs_of(records[0].path), configs_of(record.path)))
        except ConfigError as error:  # of another version
            lines = [f"can't be compared: {error}"]
        yield f"{names[0]} → {name}", lines or ["the configurations are alike"]
        ours, theirs = (each.whole.get("versions", {}) for each in (records[0], record))
        told = [f"{key}: {ours.get(key)} → {theirs.get(key)}" for key in {**ours, **theirs}]
        changed = [
            line for line, key in zip(told, {**ours, **theirs}, strict=True) if ours.get(key) != theirs.get(key)
        ]
        if changed:
            yield f"versions, {names[0]} → {name}", changed


# ---- curves


def charts(records: Sequence[RunRecord], names: Sequence[str]) -> list[dict[str, Any]]:
    """What Plotly draws: a figure for each chart that any run has figures for, phases one after the other."""
    curves = [curves_of(record) for record in records]
    count = sum(len(found) for each in curves for found in each.values())
    most = max(20, POINTS // max(1, count))
    drawn = []
    for chart in CHARTS:
        traces = []
        for name, found in zip(names, curves, strict=True):
            for label, curve in sorted(found.get(chart.title, {}).items()):
                points = thinned(curve, most)
                shown = f"{name}: {label}" if len(records) > 1 else label
                mode = "lines+markers" if len(points) < 30 else "lines"
                xs, ys = [step for step, _ in points], [float(f"{value:.5g}") for _, value in points]
                traces.append({"x": xs, "y": ys, "name": shown, "mode": mode, "type": "scatter"})
        if traces:
            marks = _marks(records[0]) if len(records) == 1 else []
            drawn.append({"title": chart.title, "data": traces, "layout": _layout(chart, marks)})
    return drawn


def guidance_charts(evaluations: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The Fréchet distance over the CLIP score, a curve per model along its guidance scales."""
    for name, found in evaluations.items():
        traces = []
        for model, figures in found.get("models", {}).items():
            scales = figures["guidance"]
            trace = {
                "mode": "lines+markers+text",
                "textposition": "top center",
                "name": model,
                "text": list(scales),
            }
            for axis, figure in (("x", "clip_score"), ("y", "frechet_distance")):
                trace[axis] = [scales[scale][figure] for scale in scales]
            traces.append(trace)
        if traces:
            chart = Chart(f"{Path(name).name}: by guidance scale", ())
            layout = _layout(chart, []) | {"xaxis": {"title": {"text": "CLIP score"}}}
            yield {
                "title": chart.title,
                "data": traces,
                "layout": layout | {"yaxis": {"title": {"text": "Fréchet distance"}}},
            }


def _layout(chart: Chart, marks: list[dict[str, Any]]) -> dict[str, Any]:
    lines = {"type": "line", "yref": "paper", "y0": 0, "y1": 1}
    return {
        "title": {"text": chart.title, "font": {"size": 14}, "x": 0},
        "margin": {"l": 55, "r": 15, "t": 40, "b": 40},
        "height": 360,
        "xaxis": {"title": {"text": "update, over all phases"}},
        "yaxis": {"type": "log" if chart.log else "linear"},
        "legend": {"orientation": "h", "y": -0.3},
        "shapes": [
            {
                **lines,
                "x0": mark["x"],
                "x1": mark["x"],
                "line": {"color": mark["colour"], "width": 1, "dash": "dot"},
            }
            for mark in marks
        ],
        "annotations": [
            {
                "x": mark["x"],
                "y": 1,
                "yref": "paper",
                "text": mark["text"],
                "showarrow": False,
                "xanchor": "left",
            }
            for mark in marks
            if mark["text"]
        ],
    }


def offsets(record: RunRecord) -> dict[str, int]:
    """Updates of the phases before each phase."""
    before, found = 0, {}
    for phase in record.phases:
        found[phase] = before
        lines = record.of_phase(phase)
        before += max((line["step"] for line in lines), default=0)
    return found


def _marks(record: RunRecord) -> list[dict[str, Any]]:
    """Where phases begin, and what happened, on the axis of the updates."""
    before = offsets(record)
    marks = [{"x": before[phase], "text": phase, "colour": "#888"} for phase in record.phases]
    colours = {"rollback": "#c00", "skipped": "#e90", "resumed": "#06c"}
    for event in events(record):
        if event["what"] in colours and event["phase"] in before:
            at = before[event["phase"]] + event["step"]
            marks.append({"x": at, "text": "", "colour": colours[event["what"]]})
    return marks


def curves_of(record: RunRecord) -> dict[str, dict[str, Curve]]:
    """By chart and label: (update over all phases, value)."""
    before = offsets(record)
    found: dict[str, dict[str, Curve]] = {}
    for phase in record.phases:
        for chart in CHARTS:
            for line in record.of_phase(phase):
                for label, value in _values(line, chart.paths):
                    curve = found.setdefault(chart.title, {}).setdefault(label, [])
                    curve.append((before[phase] + line["step"], value))
    return found


def _values(line: Mapping[str, Any], paths: Sequence[str]) -> Iterator[tuple[str, float]]:
    for path in paths:
        value: Any = line
        for word in path.split("."):
            value = value.get(word) if isinstance(value, Mapping) else None
        short = path.removesuffix(".over_shuffled")
        if isinstance(value, Mapping):
            family = f"{short.removeprefix('validation.')}, " if "score" in path else ""
            yield from ((f"{family}{key}", float(one)) for key, one in value.items() if finite(one))
        elif finite(value):
            yield short, float(value)


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def thinned(curve: Curve, most: int) -> Curve:
    """At most about so many points: of each stretch its lowest and its highest, so that no spike is lost."""
    if len(curve) <= most:
        return curve
    size = -(-2 * len(curve) // most)
    kept: Curve = []
    for first in range(0, len(curve), size):
        part = curve[first : first + size]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


# ---- events, pictures, tables


def events(record: RunRecord) -> Iterator[dict[str, Any]]:
    """What happened beside the training: starts, resumes, skipped updates, rollbacks, commits, stops."""
    places = {phase: place for place, phase in enumerate(record.phases)}

    def event(what: str, line: Mapping[str, Any], told: str, when: float | None = None) -> dict[str, Any]:
        time = f"{datetime.datetime.fromtimestamp(when, datetime.UTC):%Y-%m-%d %H:%M:%S}" if when else ""
        phase, step = line.get("phase"), int(line.get("step", 0))
        order = (places.get(str(phase), len(places)), step)
        return {"what": what, "phase": phase, "step": step, "told": told, "time": time, "order": order}

    for line in record.starts.lines:
        told = f"{line.get('ranks')} ranks on {line.get('host')}"
        yield event("resumed" if line.get("step") else "started", line, told, line.get("time"))
    for line in record.skipped.lines:
        if line.get("cause") == "rollback":
            yield event("rollback", line, f"back to step {line.get('to')}, rate x {number(line.get('lr_cut'))}")
        else:
            yield event("skipped", line, f"{line.get('cause')}, loss {number(line.get('loss'))}")
    for phase in record.phases:
        for made in committed(record.path / PHASES[phase].folder):
            written = (made.path / MANIFEST).stat().st_mtime
            yield event("committed", {"phase": phase, "step": made.step}, made.path.name, written)
    if stop := record.stopped:
        yield event("stopped", stop, str(stop.get("reason")))
    if report := record.gave_up:
        yield event("gave up", report, str(report.get("reason")), report.get("time"))


def grids(record: RunRecord, budget: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each phase's sample grids along its steps, at most GRIDS of them, made small enough for the page."""
    found = {phase: list(record.grids(phase)) for phase in record.phases}
    chosen = {phase: spread(pictures, GRIDS) for phase, pictures in found.items() if pictures}
    each = budget // max(1, sum(map(len, chosen.values())))
    for phase, pictures in chosen.items():
        yield phase, [{"step": step, **_embedded(path, each)} for step, path in pictures]


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _embedded(path: Path, limit: int) -> dict[str, Any]:
    """A picture as a data URL of at most about `limit` bytes, or why it can't be shown."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except OSError as error:
        return {"url": None, "note": f"{path.name} can't be read ({error})"}
    width = min(GRID_WIDTH, picture.width)
    while True:
        data = io.BytesIO()
        picture.resize((width, max(1, picture.height * width // picture.width))).save(data, "WEBP", quality=70)
        if len(data.getvalue()) <= limit or width <= 200:
            return {"url": f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}", "note": ""}
        width = width * 3 // 4


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value as text) of everything in it."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, float):
        yield prefix, number(values)
    else:
        yield prefix, str(values)
