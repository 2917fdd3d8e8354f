"""The README's first command, on this machine, and what it promises."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    run = tmp_path_factory.mktemp("quickstart")
    # The threads of the test runner are not the user's: the launcher's ranks choose their own.
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    result = subprocess.run(
        ["bash", "launch/quickstart.sh", str(run)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1500,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-3000:]
    figures = {name: json.loads((run / f"{name}.json").read_text()) for name in ("before", "phase1", "phase3")}
    return run, result.stdout, figures


@pytest.mark.slow
def test_pictures_show_their_captions(quickstart):
    _, output, figures = quickstart
    base, after = figures["before"]["score"], figures["phase3"]
    for score in (after["score"], after["score_caption_only"]):
        assert score["count"] == 64
        for name in ("colour", "shape", "position"):  # twice the standard error of a difference at most
            assert score[name] >= base[name] - 0.15
    # The goals less one standard error of a share of 64.
    assert after["score"]["colour"] >= 0.89
    assert after["score"]["shape"] >= 0.76
    assert "caption and CLIP" in output


@pytest.mark.slow
def test_clip_shows_in_the_pictures_without_a_caption(quickstart):
    _, _, figures = quickstart
    floor = figures["phase3"]["score_off"]
    assert floor["colour"] < 0.2
    # The goals less one standard error of a share of 64.
    for kind, colour, shape in (("score_clip_text", 0.8, 0.44), ("score_clip_image", 0.75, 0.34)):
        assert figures["phase3"][kind]["colour"] >= colour
        assert figures["phase3"][kind]["shape"] >= shape
        assert figures["phase3"][kind]["position"] >= 0.44


@pytest.mark.slow
def test_the_grid_shows_them(quickstart):
    run, _, _ = quickstart
    assert (run / "pictures.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_adapter_learns_what_the_embedding_says(quickstart):
    _, _, figures = quickstart
    assert figures["phase1"]["gain_without_caption"]["over_shuffled"] >= 0.55
    assert figures["phase3"]["gain_without_caption"]["over_shuffled"] >= 0.53
    assert figures["phase3"]["gain_of_pictures"]["over_shuffled"] >= 0.53
    assert figures["phase3"]["gain_with_caption"]["over_off"] >= -0.015


@pytest.mark.slow
def test_the_pretrained_model_is_kept(quickstart):
    _, _, figures = quickstart
    before, after = figures["before"]["loss_clip_off"], figures["phase3"]["loss_clip_off"]
    assert figures["phase1"]["loss_clip_off"] == pytest.approx(before, rel=1e-6)  # only the adapter trained
    assert after <= 1.01 * before


@pytest.mark.slow
def test_every_phase_left_its_trace(quickstart):
    run, output, _ = quickstart
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [p for p in dict.fromkeys(line["phase"] for line in steps)] == [
        "adapter_only",
        "adapter_gates",
        "full",
    ]
    assert steps[-1]["gate_mean"] > 0.4
    assert (run / "report.html").stat().st_size > 2**20
    assert (run / "export" / "model.pt.json").is_file()
    assert "verified against the checkpoint" in output
    for folder in ("phase1", "phase2", "phase3"):
        assert (run / folder / "LAST" / "manifest.json").is_file()
