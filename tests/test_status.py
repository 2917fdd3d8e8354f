"""glide-ds status: of a run that is done, under way, dead, stopped, damaged or none at all; and what it prunes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from train_kit import copy_run, make_config, train_phase

from glide_ds import cli
from glide_ds.training.checkpoint.commit import committed

HOLD = """
import sys
from pathlib import Path
from glide_ds.training.faults import lease
file = lease.take(Path(sys.argv[1]), 5)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def trained(group: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that kept a checkpoint of each, and would keep one."""
    folder = tmp_path_factory.mktemp("status")
    keep: dict[str, Any] = {"checkpoint": {"every": 1, "keep": 0}, "validation": {"every": 4, "samples": 4}}
    train_phase(make_config(folder, "base", ema={"snapshot_every": 2}, **keep))
    document = json.loads((folder / "run" / "run.json").read_text())
    document["phases"]["base"]["glide_ds"]["checkpoint"]["keep"] = 1
    (folder / "run" / "run.json").write_text(json.dumps(document))
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return copy_run(trained, tmp_path / "run")


def replace(checkpoint: Path, data: bytes) -> None:
    """One of its tensor files, which is the fixture's too."""
    path = next(checkpoint.glob("*.safetensors"))
    path.unlink()
    path.write_bytes(data)


def told(capsys: Any, *words: Any) -> list[str]:
    assert cli.main(["status", *map(str, words)]) == 0
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_averages_of_pruned_checkpoints_stay_and_are_told(run, capsys):
    told(capsys, run, "--prune")
    assert [made.step for made in committed(run / "base")] == [4]
    (left,) = committed(run / "base" / "averages")
    assert (left.step, list(left.manifest["files"])) == (2, ["power-rank-0.safetensors"])
    assert any(line.startswith("averages of 1 more checkpoints, ") for line in told(capsys, run))


def test_a_run_that_is_done(run, capsys):
    lines = told(capsys, run)
    assert lines.pop() == f'Next: glide-ds sample {run} --prompt "…" --out picture.png'
    assert lines[0] == f"{run}: done"
    assert lines[1] == "base: step 4 of 4, from random"
    assert lines[2].startswith("at step 4: loss ")
    assert lines[3].startswith("validation at step 4: loss ")
    assert [line.split(":")[0] for line in lines[4:8]] == [f"step-0000000{n}" for n in (4, 3, 2, 1)]
    assert "the newest, the best, validation loss" in lines[4]
    assert "DAMAGED" not in "".join(lines)
    assert lines[8].startswith("disk: ")


def test_a_run_that_was_killed_tells_how_far_it_is_and_what_is_damaged(run, capsys):
    shutil.rmtree(run / "base" / "step-00000004")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:40])  # torn within its third line
    (run / "base" / "step-00000003" / "manifest.json").write_text("{")
    replace(run / "base" / "step-00000002", b"half")
    found = told(capsys, run)
    assert "does not run, last heard of " in found[0]
    assert found[1].startswith("base: step 2 of 4, ")
    assert "of training left" in found[1]
    assert any(line.startswith("step-00000003: DAMAGED (manifest.json is damaged)") for line in found)
    assert any(line.startswith("step-00000002: ") and "has 4 bytes instead of" in line for line in found)


def test_a_flipped_byte_is_found_only_by_the_hashes(run, capsys):
    path = next((run / "base" / "step-00000002").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)
    assert "DAMAGED" not in "".join(told(capsys, run))
    assert "does not match its hash" in "".join(told(capsys, run, "--verify"))


@pytest.mark.slow
def test_a_run_that_is_under_way_names_its_process_and_is_not_pruned(run, capsys):
    held = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert f"process {holder.pid}, since " in told(capsys, run)[0]
        assert cli.main(["status", str(run), "--prune"]) == 2
        assert f"in use by process {holder.pid}" in capsys.readouterr().err
        assert len(committed(run / "base")) == 4
        holder.stdin.close()
    assert told(capsys, run)[0] == f"{run}: done"


def test_a_run_that_was_stopped_says_why(run, capsys):
    (run / "STOPPED.json").write_text(json.dumps({"reason": "SIGTERM", "phase": "base", "step": 3}))
    assert told(capsys, run)[0] == f"{run}: stopped by SIGTERM at step 3 of base"
    (run / "STOPPED.json").write_text('{"reason"')
    assert any(line.startswith("!! STOPPED.json can't be read") for line in told(capsys, run))


def test_a_phase_that_patience_ended_is_done(run, capsys):
    document = json.loads((run / "run.json").read_text())
    document["phases"]["base"]["glide_ds"]["train"]["steps"] = 9
    document["phases"]["base"]["glide_ds"]["validation"]["patience"] = 2
    (run / "run.json").write_text(json.dumps(document))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for since, state in ((1, "does not run"), (2, "done")):
        lines[-1]["validation"]["since_best"] = since
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert told(capsys, run)[0].startswith(f"{run}: {state}")


def test_prune_removes_what_is_not_kept_and_says_so_first(run, capsys):
    own = json.loads((run / "run.json").read_text())["run"]
    left, strange = run / "base" / f".step-00000004.{own}.partial", run / "base" / "step-00000001.mine"
    left.mkdir()
    strange.mkdir()
    lines = told(capsys, run, "--prune", "--dry_run")
    assert sum(line.startswith("would remove ") for line in lines) == 5  # four, and their sum
    assert len(committed(run / "base")) == 4
    lines = told(capsys, run, "--prune")
    assert lines[-2].startswith("removed 4 checkpoints and leftovers, ")
    assert [made.step for made in committed(run / "base")] == [4]
    assert strange.exists()
    assert not left.exists()


def test_the_newest_whole_one_counts(run, capsys):
    replace(run / "base" / "step-00000004", b"half")
    (run / "metrics.jsonl").unlink()  # by which it is told how far training was
    lines = told(capsys, run)
    assert any(line.startswith("base: step 3 of 4") for line in lines)
    assert [line.split(":")[0] for line in lines if "the newest" in line] == ["step-00000003"]


def test_prune_leaves_the_others_where_one_that_is_kept_is_damaged(run, capsys):
    replace(run / "base" / "step-00000004", b"half")
    lines = told(capsys, run, "--prune")
    assert "base: 3 are left alone, for step-00000004 is damaged" in "\n".join(lines)
    assert len(committed(run / "base")) == 4


def test_prune_leaves_another_runs_checkpoints(run, capsys):
    document = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**document, "run": "another"}))
    assert told(capsys, run, "--prune")[-2].startswith("removed 0 ")
    assert len(committed(run / "base")) == 4


def test_what_is_no_run_is_told_with_those_that_are(run, capsys, monkeypatch):
    assert cli.main(["status", str(run.parent)]) == 2
    assert f"no run directory (it holds no run.json); give one of {run}" in capsys.readouterr().err
    assert cli.main(["status", str(run / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err
    (run / "run.json").write_text("{")
    assert cli.main(["status", str(run)]) == 2
    assert "run.json can't be read" in capsys.readouterr().err
    monkeypatch.chdir(run)
    assert cli.main(["status"]) == 2
    assert "runs/ holds no run directory" in capsys.readouterr().err


def test_a_run_in_which_no_phase_was_started(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"run": "abc", "older": False, "phases": {}}))
    assert told(capsys, tmp_path)[:2] == [f"{tmp_path}: empty", "no phase was started"]


def test_without_a_name_all_in_runs_are_shown(run, capsys, monkeypatch):
    for name in ("a", "b"):
        copy_run(run, run.parent / "runs" / name)
    monkeypatch.chdir(run.parent)
    assert [line for line in told(capsys) if line.endswith(": done")] == ["runs/a: done", "runs/b: done"]


def test_dry_run_alone_is_a_mistake(run, capsys):
    assert cli.main(["status", str(run), "--dry_run"]) == 2
    assert "--dry_run without --prune" in capsys.readouterr().err
