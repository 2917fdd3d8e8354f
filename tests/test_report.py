"""glide-ds report: one page of runs that are done, under way, torn or empty, without the network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from train_kit import copy_run, make_config, train_phase

from glide_ds import cli
from glide_ds.commands.results.report import named, spread, thinned
from glide_ds.training.record import RunRecord

SECTIONS: dict[str, Any] = {
    "train": {"steps": 6},
    "checkpoint": {"every": 2},
    "validation": {"every": 3, "samples": 4},
    "log": {"samples_every": 3, "sample_steps": 2, "samples": 2},
}


@pytest.fixture(scope="module")
def trained(group: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two phases, the second one resumed."""
    folder = tmp_path_factory.mktemp("report")
    train_phase(make_config(folder, "adapter_only", **SECTIONS | {"train": {"steps": 3}}))
    train_phase(make_config(folder, "full", **SECTIONS | {"train": {"steps": 4}}))
    train_phase(make_config(folder, "full", **SECTIONS))
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return copy_run(trained, tmp_path / "mine")


def page(*words: Any, out: Path) -> str:
    assert cli.main(["report", *map(str, words), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def charts(text: str) -> dict[str, dict[str, list[float]]]:
    """By title and curve: its values, as the page's own script draws them."""
    line = next(line for line in text.splitlines() if line.startswith("[{") and '"layout"' in line)
    drawn = json.loads(re.sub(r"\.forEach\(.*", "", line))
    return {chart["title"]: {trace["name"]: trace["y"] for trace in chart["data"]} for chart in drawn}


def test_a_page_holds_the_runs_curves_pictures_and_events_and_names_nothing_outside(run, tmp_path):
    text = page(run, out=tmp_path / "deep" / "r.html")
    assert len(text.encode()) < 8 * 2**20
    found = charts(text)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found["loss"]["loss"] == pytest.approx([line["loss"] for line in lines], rel=1e-4)
    assert found["loss"].keys() == {"loss", "validation.loss", "validation.loss_clip_off"}
    assert len(found["conditioning gain over shuffled embeddings"]) == 2
    assert {"learning rate", "gradient norm", "gates", "images per second"} < found.keys()
    pictures = re.findall(r"<figcaption>step (\d+)</figcaption>\s*<img src=\"data:image/webp;base64,", text)
    assert pictures == ["3", "3", "4", "6"]
    # What the page itself asks the network for; plotly.js holds addresses that it does not fetch.
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(?!data:)", text)
    rows = re.findall(r"<td>(\w+)</td><td>(\d+)</td><td>(\w+)</td>", text)
    assert ("full", "0", "started") in rows
    assert ("full", "4", "resumed") in rows
    assert ("full", "6", "committed") in rows
    assert "torch" in text


def test_a_run_that_goes_on_was_torn_or_rolled_back_is_shown_as_far_as_it_is(run, tmp_path):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    later = {**json.loads(lines[-1]), "loss": 0.5, "step": 7}
    path.write_text("".join([*lines, "no JSON\n", json.dumps(later) + "\n", lines[0][:50]]))
    skipped = {"step": 6, "phase": "full", "rollbacks": 0, "cause": "rollback", "to": 4, "lr_cut": 0.5}
    (run / "skipped.jsonl").write_text(json.dumps(skipped) + "\n")
    text = page(run, out=tmp_path / "r.html")
    found = charts(text)["loss"]
    assert found["loss"][-1] == 0.5
    assert len(found["loss"]) == len(lines) + 1
    assert "<td>6</td><td>rollback</td>" in text
    assert "1 damaged lines left out" in text


def test_an_empty_run_and_one_that_never_logged_have_a_page(run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "run.json").write_text(json.dumps({"run": "abc", "older": False, "phases": {}}))
    (run / "metrics.jsonl").write_text("")
    shutil.rmtree(run / "samples")
    for place in (empty, run):
        assert "No step was logged yet." in page(place, out=tmp_path / "r.html")


def test_two_runs_are_drawn_together_with_what_they_differ_in(run, tmp_path):
    other = copy_run(run, tmp_path / "other")
    document = json.loads((other / "run.json").read_text())
    document["phases"]["full"]["glide_ds"]["train"]["weighting"] = "v"
    document["versions"]["torch"] = "1.0"
    (other / "run.json").write_text(json.dumps(document))
    text = page(run, other, out=tmp_path / "r.html")
    assert {"mine: loss", "other: loss"} < charts(text)["loss"].keys()
    assert "full: train.weighting: &#39;eps&#39; → &#39;v&#39;" in text
    assert re.search(r"torch: .* → 1\.0", text)


def test_a_damaged_grid_is_told_and_captions_are_no_html(run, tmp_path):
    next((run / "samples").glob("full-*.png")).write_bytes(b"no picture")
    document = json.loads((run / "run.json").read_text())
    document["phases"]["full"]["glide_ds"]["log"]["sample_prompts"] = ["</pre><script>alert(1)</script>"]
    (run / "run.json").write_text(json.dumps(document))
    text = page(run, out=tmp_path / "r.html")
    assert "can&#39;t be read" in text
    assert "<script>alert" not in text


def test_evaluations_are_shown_and_what_is_none_is_refused(run, tmp_path, capsys):
    figures = tmp_path / "e.json"
    figures.write_text(json.dumps({"loss_clip_off": 0.125, "score": {"shape": 0.5}}))
    text = page(run, "--evaluation", figures, out=tmp_path / "r.html")
    assert "<td>score.shape</td><td>0.5</td>" in text
    by_scale = {
        scale: {"clip_score": 50.0 + n, "frechet_distance": 2.0 - n} for n, scale in enumerate(("1", "3"))
    }
    figures.write_text(json.dumps({"models": {"mine.pt": {"guidance": by_scale}}}))
    text = page(run, "--evaluation", figures, out=tmp_path / "r.html")
    assert charts(text)["e.json: by guidance scale"] == {"mine.pt": [2.0, 1.0]}
    figures.write_text("[")
    words = ["report", str(run), "--evaluation", str(figures), "--out", str(tmp_path / "r.html")]
    assert cli.main(words) == 2
    assert f"--evaluation {figures} can't be read" in capsys.readouterr().err


def test_without_plotly_it_says_how_to_have_it(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert cli.main(["report", str(run), "--out", str(tmp_path / "r.html")]) == 2
    assert "run: bash launch/env.sh --extras report" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_thinning_keeps_every_spike_and_grids_their_ends():
    curve = [(step, 1.0 + (step == 777) * 9 - (step == 5000)) for step in range(10_000)]
    few = thinned(curve, 100)
    assert len(few) <= 102
    assert (777, 10.0) in few
    assert (5000, 0.0) in few
    assert [step for step, _ in few] == sorted(step for step, _ in few)
    assert spread(range(100), 8)[::7] == [0, 99]
    assert spread([1, 2], 8) == [1, 2]


def test_runs_of_one_name_are_told_apart(tmp_path):
    records = [RunRecord(tmp_path / name / "run") for name in ("a", "b")]
    assert named(records) == [str(record.path) for record in records]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_browser_draws_the_page_without_an_error_or_a_request(run, tmp_path):
    page(run, out=tmp_path / "r.html")
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    words += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=8000", "--window-size=1300,2400"]
    place = (tmp_path / "r.html").as_uri()
    home = os.environ | {"HOME": str(tmp_path)}
    dom = subprocess.run([*words, "--dump-dom", place], capture_output=True, text=True, env=home, timeout=120)
    assert dom.stdout.count("main-svg") > 10
    assert not re.findall(r"CONSOLE.*|ERR_NAME.*", dom.stderr)
    shot = tmp_path / "shot.png"
    subprocess.run([*words, f"--screenshot={shot}", place], capture_output=True, env=home, timeout=120)
    with Image.open(shot) as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 50
