"""`glide-ds status`: what a run directory holds, whether it runs, how far it is, and what of it can go."""

from __future__ import annotations

import argparse
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from glide_ds.config.phases import PHASES
from glide_ds.errors import ConfigError
from glide_ds.files import user_path
from glide_ds.progress import duration
from glide_ds.training.checkpoint.commit import (
    AVERAGES,
    Committed,
    best,
    committed,
    leftovers,
    no_manifest,
    retire,
    sorted_out,
    unreadable,
    verify,
)
from glide_ds.training.checkpoint.start import RUN_FILE
from glide_ds.training.faults.lease import take
from glide_ds.training.record import RunRecord

RUNS = Path("runs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="*", type=user_path, help=f"run directories; none: all those in {RUNS}/")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare checkpoints with their hashes, which reads them; default: sizes",
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help="remove what the run's checkpoint.keep, keep_every and best don't keep, and what killed saves left",
    )
    parser.add_argument("--dry_run", action="store_true", help="with --prune: say what it would remove")


def run(args: argparse.Namespace) -> None:
    if args.dry_run and not args.prune:
        raise ConfigError("--dry_run without --prune", "it would do nothing", "add --prune, or leave it out")
    places = args.run or sorted(path.parent for path in RUNS.glob(f"*/{RUN_FILE}"))
    if not places:
        raise ConfigError(f"{RUNS}/ holds no run directory", remedy="name one: glide-ds status RUN")
    for number, place in enumerate(places):
        record = RunRecord.open(place)
        print("\n" * (number > 0) + "\n".join(described(record, hashes=args.verify)), flush=True)
        if args.prune:
            # A run that is under way prunes its checkpoints itself, and may be writing one now.
            with nullcontext() if args.dry_run else take(place, 0.0):
                for line in pruned(record, dry_run=args.dry_run):
                    print(f"  {line}", flush=True)
    print(following(record, alone=len(places) == 1))


def following(record: RunRecord, *, alone: bool) -> str:
    """What a person does next with the run that was told of last, or with one of several."""
    if not alone:
        return "Next: glide-ds report RUN… --out runs.html, which lays them beside each other"
    if record.running is None and record.phases and state(record) == "done":
        return f'Next: glide-ds sample {record.path} --prompt "…" --out picture.png'
    if record.running is None and record.phases:
        return f"Next: the same training command again continues it; glide-ds report {record.path} --out report.html"
    return f"Next: glide-ds report {record.path} --out report.html"


def described(record: RunRecord, *, hashes: bool = False) -> Iterator[str]:
    """The run in lines: what it does now, then phase by phase, then its disk."""
    yield f"{record.path}: {state(record)}"
    for phase in record.phases:
        yield from (f"  {line}" for line in _phase_lines(record, phase, hashes))
    if not record.phases:
        yield "  no phase was started"
    if record.metrics.damaged:
        yield f"  !! metrics.jsonl: {record.metrics.damaged} damaged lines left out"
    yield from (f"  !! {problem}" for problem in record.problems)
    free = shutil.disk_usage(record.path).free
    yield f"  disk: {size(folder_size(record.path))} used, {size(free)} free"


def state(record: RunRecord) -> str:
    """What it does now, in a few words."""
    if (held := record.running) is not None:
        return (
            f"runs on {held.get('host', '?')}, process {held.get('pid', '?')}, since {held.get('since', '?')}"
        )
    if report := record.gave_up:
        return f"gave up at step {report.get('step')} of {report.get('phase')}: {report.get('reason')}"
    if stop := record.stopped:
        return f"stopped by {stop.get('reason')} at step {stop.get('step')} of {stop.get('phase')}"
    if not record.phases:
        return "empty"
    if all(ended(record, phase) for phase in record.phases):
        return "done"
    written = record.last_written
    ago = f", last heard of {written:%Y-%m-%d %H:%M} UTC" if written else ""
    return f"does not run{ago}; the same command again continues it"


def steps_wanted(record: RunRecord, phase: str) -> int:
    return int(record.block(phase, "train").get("steps", 0))


def steps_done(record: RunRecord, phase: str) -> int:
    """Updates that a checkpoint holds or metrics.jsonl tells of."""
    lines = record.of_phase(phase)
    found = committed(record.path / PHASES[phase].folder)
    newest = next((made for made in found if not verify(made, hashes=False)), None)
    return max(lines[-1]["step"] if lines else 0, newest.step if newest else 0)


def ended(record: RunRecord, phase: str) -> bool:
    """Whether the phase has all its steps, or was ended by validation.patience."""
    patience = record.block(phase, "validation").get("patience", 0)
    lines = record.of_phase(phase)
    validated = (lines[-1].get("validation") or {}) if lines else {}
    out_of_patience = 0 < patience <= validated.get("since_best", 0)
    return out_of_patience or steps_done(record, phase) >= steps_wanted(record, phase)


def _phase_lines(record: RunRecord, phase: str, hashes: bool) -> Iterator[str]:
    done, wanted = steps_done(record, phase), steps_wanted(record, phase)
    lines = record.of_phase(phase)
    start = record.whole.get("lineage", {}).get(phase, {}).get("start")
    left = time_left(lines[-1], record.document(phase), wanted) if lines and not ended(record, phase) else ""
    yield f"{phase}: step {done:,} of {wanted:,}{left}{f', from {start}' if start else ''}"
    if lines:
        yield f"  {figures(lines[-1])}"
    validated = next((line for line in reversed(lines) if line.get("validation")), None)
    if validated:
        yield f"  validation at step {validated['step']:,}: {_validation(validated['validation'])}"
    yield from (f"  {line}" for line in checkpoint_lines(record, phase, hashes))


def time_left(line: Mapping[str, Any], document: Mapping[str, Any], wanted: int) -> str:
    """By the speed of the last logged step."""
    rate = line.get("images_per_s") or 0
    if not rate:
        return ""
    return f", {duration((wanted - line['step']) * document['train_batch_size'] / rate)} of training left"


def figures(line: Mapping[str, Any]) -> str:
    """The last logged step, in short."""
    told = [f"at step {line['step']:,}: loss {number(line.get('loss'))}"]
    told.append(f"gradient norm {number(line.get('grad_norm'))}, lr {number(line.get('lr'))}")
    told.append(f"{line.get('images_per_s') or 0:.1f} images/s, MFU {line.get('mfu') or 0:.0%}")
    counts = [f"{line[name]} {name}" for name in ("skipped", "rollbacks") if line.get(name)]
    return ", ".join([*told, *counts])


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) and math.isfinite(value) else "not finite"


def _validation(found: Mapping[str, Any]) -> str:
    told = [f"loss {number(found.get('loss'))}, with CLIP off {number(found.get('loss_clip_off'))}"]
    for name, words in (("gain_with_caption", "gain"), ("gain_without_caption", "gain without caption")):
        if found.get(name):
            told.append(f"{words} {found[name]['over_shuffled']:+.1%}")
    return ", ".join(told)


def checkpoint_lines(record: RunRecord, phase: str, hashes: bool) -> Iterator[str]:
    """Its committed checkpoints, the newest first, then what looks like one and is none.

    "the newest" is the one that training would go on from.
    """
    folder = record.path / PHASES[phase].folder
    found = committed(folder)
    damages = [verify(made, hashes=hashes) for made in found]
    newest = next((made for made, damage in zip(found, damages, strict=True) if not damage), None)
    lowest = best(found)
    if not found:
        yield "no checkpoint yet"
    for made, damage in zip(found, damages, strict=True):
        told = [size(folder_size(made.path)), f"{made.world_size} ranks"]
        told += ["the newest"] * (made is newest) + ["the best"] * (made is lowest)
        loss = made.manifest.get("validation_loss")
        told += [f"validation loss {number(loss)}"] * (loss is not None)
        yield f"{made.path.name}: {', '.join([*told, *(f'DAMAGED ({fault})' for fault in damage[:1])])}"
    if snapshots := committed(folder / AVERAGES):
        yield f"{AVERAGES} of {len(snapshots)} more checkpoints, {size(folder_size(folder / AVERAGES))}"
    for path in unreadable(folder):
        yield f"{path.name}: DAMAGED ({no_manifest(path)})"
    if (owner := record.owner) and (left := leftovers(folder, owner)):
        yield f"{len(left)} unfinished, {size(sum(map(folder_size, left)))}"


def pruned(record: RunRecord, *, dry_run: bool) -> Iterator[str]:
    """Remove what the run does not keep, and say each thing."""
    owner = record.owner
    if owner is None:
        yield "nothing is pruned: the run is of before there were ids, and whose checkpoints these are is unknown"
        return
    verb, count, total = "would remove" if dry_run else "removed", 0, 0
    for phase in record.phases:
        folder = record.path / PHASES[phase].folder
        kept, others = sorted_out(folder, record.config(phase).checkpoint, owner)
        if others and (damage := _first_damage(kept)):
            yield f"{folder.name}: {len(others)} are left alone, for {damage}"
            others = []
        for path in [*others, *leftovers(folder, owner)]:
            bytes_there = folder_size(path)
            if not dry_run:
                shutil.rmtree(path) if path.name.startswith(".") else retire(path, owner)
            count, total = count + 1, total + bytes_there
            yield f"{verb} {path} ({size(bytes_there)})"
    yield f"{verb} {count} checkpoints and leftovers, {size(total)}"


def _first_damage(kept: list[Committed]) -> str | None:
    """What is wrong with the checkpoints that are to stay: then others may still be needed."""
    faults = (f"{made.path.name} is damaged ({fault})" for made in kept for fault in verify(made))
    return next(faults, None)


def folder_size(path: Path) -> int:
    """Bytes of all files below it, links not followed; what goes meanwhile doesn't count."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total


def size(count: float) -> str:
    """Bytes as people say them."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit in ("bytes", "KiB") else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
