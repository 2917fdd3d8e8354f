"""slurm/lib.sh: what a job decides at its end, with stand-ins for Slurm's commands; test_jobs.py has the real ones."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Ended:
    """A job of two ranks that has just ended, and the folders it left."""

    def __init__(self, path: Path) -> None:
        self.run = path / "run"
        self.folder = self.run / "slurm" / "7"
        self.folder.mkdir(parents=True)
        self.bin = path / "bin"
        self.bin.mkdir()
        self.state("RUNNING")
        self.stand_in("sleep", "exit 0")

    def stand_in(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def state(self, job: str, reason: str = "None", preempted: str = "None") -> None:
        """What Slurm says of the job when it's asked."""
        shown = f"JobId=7 JobState={job} Reason={reason} Dependency=(null) PreemptTime={preempted} Requeue=1"
        self.stand_in(
            "scontrol", f'case "$*" in *show*) echo "{shown}" ;; *) echo "called scontrol $*" ;; esac'
        )

    def left(self, *codes: int, reason: str = "", step: int = 5) -> Ended:
        for rank, code in enumerate(codes):
            (self.folder / f"rank-{rank}.code").write_text(f"{code}\n")
        if reason:
            (self.run / "STOPPED.json").write_text(json.dumps({"reason": reason, "step": step}))
        made = self.run / "phase1" / f"step-{step:08d}"
        made.mkdir(parents=True, exist_ok=True)
        if not (made / "manifest.json").exists():
            (made / "manifest.json").touch()
        return self

    def conclude(self, asked: str = "", restarts: int = 0, most: int = 50) -> tuple[int, str, bool]:
        """(exit code, what was said, whether it was requeued)"""
        setup = f"set -euo pipefail; . slurm/lib.sh; PATH={self.bin}:$PATH; asked={asked}; ranks=2; "
        setup += f"run_dir={self.run}; folder={self.folder}; conclude"
        variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "GLIDE_MAX_RESTARTS": str(most)}
        done = subprocess.run(
            ["bash", "-c", setup],
            cwd=ROOT,
            env={"PATH": "/usr/bin:/bin", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, "called scontrol requeue 7" in done.stdout


@pytest.fixture
def ended(tmp_path: Path) -> Ended:
    return Ended(tmp_path)


def test_a_finished_job_ends(ended: Ended):
    assert ended.left(0, 0).conclude()[::2] == (0, False)


@pytest.mark.parametrize("codes", [(0,), (), (0, 137), (75, 75), (75, 143), (1, 0), (10, 0)])
def test_a_job_that_lost_ranks_is_requeued(ended: Ended, codes: tuple[int, ...]):
    assert ended.left(*codes).conclude()[2]


def test_a_first_failure_before_any_checkpoint_is_requeued(ended: Ended):
    ended.left(75, 137)
    shutil.rmtree(ended.run / "phase1")
    assert ended.conclude()[2]
    assert not ended.conclude(restarts=1)[2]


def test_a_job_that_was_asked_to_stop_is_requeued_and_its_stop_file_is_gone(ended: Ended):
    (ended.run / "STOP").write_text("slurm job 7: close to the time limit\n")
    code, said, requeued = ended.left(0, 0, reason="stop_file").conclude(asked="1")
    assert requeued
    assert code == 0
    assert "stopped well at phase1/step-00000005" in said
    assert not (ended.run / "STOP").exists()


def test_a_signal_that_came_to_the_ranks_alone_requeues_too(ended: Ended):
    assert ended.left(0, 0, reason="SIGTERM").conclude()[2]


def test_a_persons_stop_file_ends_the_chain(ended: Ended):
    code, said, requeued = ended.left(0, 0, reason="stop_file").conclude()
    assert (code, requeued) == (1, False)  # 0 would let the next phase start
    assert "stop file" in said


@pytest.mark.parametrize("code", [2, 3])
def test_what_a_restart_does_not_mend_is_not_requeued(ended: Ended, code: int):
    assert ended.left(code, 137).conclude()[::2] == (code, False)


def test_a_second_failure_at_the_same_place_is_the_last(ended: Ended):
    assert ended.left(75, 137, step=5).conclude()[2]
    assert ended.left(75, 137, step=10).conclude(restarts=1)[2]  # a newer checkpoint: it moves
    code, said, requeued = ended.left(75, 137, step=10).conclude(restarts=2)
    assert (code, requeued) == (1, False)
    assert "without a newer checkpoint than phase1/step-00000010" in said


def test_one_that_fell_back_before_damaged_checkpoints_moves_by_what_it_saves(ended: Ended):
    assert ended.left(75, 137, step=10).conclude()[2]
    code, said, requeued = ended.left(75, 137, step=6).conclude(restarts=1)  # step 10 is damaged and stays
    assert (code, requeued) == (0, True)
    assert "at phase1/step-00000006: requeued" in said
    assert not ended.left(75, 137, step=6).conclude(restarts=2)[2]


def test_restarts_have_a_limit(ended: Ended):
    assert ended.left(0, 0, reason="SIGTERM").conclude(restarts=2, most=3)[2]
    code, said, requeued = ended.conclude(restarts=3, most=3)
    assert (code, requeued) == (1, False)
    assert "GLIDE_MAX_RESTARTS=3" in said


def test_what_a_person_cancelled_stays_cancelled(ended: Ended):
    ended.state("COMPLETING")
    code, said, requeued = ended.left(0, 0, reason="SIGTERM").conclude()
    assert (code, requeued) == (1, False)
    assert "cancelled by a person" in said


@pytest.mark.parametrize(
    "state",
    [("COMPLETING", "TimeLimit"), ("COMPLETING", "NodeDown"), ("COMPLETING", "None", "2026-01-01T00:00:00")],
)
def test_what_slurm_ends_by_itself_is_requeued(ended: Ended, state: tuple[str, ...]):
    ended.state(*state)
    assert ended.left(0, 0, reason="SIGTERM").conclude()[2]


def cluster_commands() -> tuple[list[str], list[str]]:
    """The lines of docs/cluster.md: submit_phases.sh and sbatch."""
    text = (ROOT / "docs" / "cluster.md").read_text().replace("\\\n", " ")
    phases, one = (shlex.split(line) for line in text.splitlines() if re.match(r"(bash|sbatch) .*slurm/", line))
    return phases, one


def test_a_launch_that_never_ends_after_a_rank_failed_is_killed(ended: Ended):
    ended.left(75)
    setup = f". slurm/lib.sh; folder={ended.folder}; sleep 60 & await $!; jobs -r"
    done = subprocess.run(
        ["bash", "-c", setup],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "GLIDE_GIVE_UP_S": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert "killing it" in done.stdout
    assert "sleep 60" not in done.stdout


@pytest.mark.slow
def test_submit_phases_shows_its_commands_and_finds_mistakes_first(tmp_path: Path):
    command, _ = cluster_commands()
    command = [word for word in command if not word.startswith("run.dir=")]

    def dry_run(*sets: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *sets], cwd=ROOT, capture_output=True, text=True, check=False)

    shown = dry_run(f"run.dir={tmp_path}/run", "data.shards=/data/{0..9}.tar")
    first, second, third, _ = shown.stdout.splitlines()
    assert first.startswith(
        "sbatch --parsable --job-name=glide-phase1 --nodes=4 --gpus-per-node=8 --time=24:00:00 "
        "slurm/train.sbatch --ds_config"
    )
    assert "--dependency" not in first
    assert "afterok:<phase1>" in second.replace("\\", "")
    assert "--kill-on-invalid-dep=yes" in third
    assert third.rstrip().endswith("data.shards=/data/\\{0..9\\}.tar")
    mistaken = dry_run("trian.steps=1")
    assert mistaken.returncode == 2
    assert mistaken.stdout == ""
    assert "unknown key 'trian'" in mistaken.stderr
