"""Two nodes of a real Slurm cluster that go for one run directory at the same instant."""

from __future__ import annotations

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from slurm_kit import EVERY, Cluster, submit

from glide_ds.training.checkpoint.commit import committed, verify

pytestmark = pytest.mark.cluster
RACES = 100


def test_the_lock_is_one_nodes_at_a_time_and_never_stale(cluster: Cluster):
    folder = cluster.folder / "races"
    # Those that the tests before have left in order: one of them loses a node.
    nodes = cluster.on("ctl", "sinfo", "-h", "-r", "-N", "-p", "gpu", "-t", "idle", "-o", "%N").split()[:2]
    assert len(nodes) == 2

    def compete(own: str, other: str) -> dict[str, int]:
        words = ["tests/races.py", "--compete", own, other, "--races", str(RACES), "--folder", str(folder)]
        out = cluster.on("ctl", "srun", "--nodes=1", f"--nodelist={own}", sys.executable, *words)
        told: dict[str, int] = json.loads(out.splitlines()[-1])
        return told

    with ThreadPoolExecutor() as pool:
        both = list(pool.map(compete, nodes, reversed(nodes)))
    assert [sum(told.values()) for told in both] == [RACES] * 2
    had = [told.get("held", 0) + told.get("killed", 0) for told in both]
    assert sum(had) == sum(told.get("refused", 0) for told in both) == RACES
    assert sum(told.get("killed", 0) for told in both) == len(range(0, RACES, 3))


def test_of_two_jobs_for_one_directory_one_trains_and_the_other_fails_with_code_2(cluster: Cluster):
    folder = cluster.folder / "shared"
    folder.mkdir()
    sets = "train.steps=100000 run.timeout_s=20 checkpoint.keep=0"
    jobs = [submit(cluster, folder, "--nodes=1", sets=sets)[0] for _ in range(2)]
    jobs[0].wait("one that is refused", lambda: any(job.field("JobState") == "FAILED" for job in jobs))
    refused, training = sorted(jobs, key=lambda job: job.field("JobState") != "FAILED")
    assert refused.field("ExitCode") == "2:0", refused.log
    assert f"on host {training.nodes()[0]}" in " ".join(refused.log.split())
    assert "  loss " not in refused.log
    assert training.field("JobState") == "RUNNING"
    training.wait_for_step(EVERY)
    os.kill(training.rank_pids()[0], signal.SIGKILL)
    before = _newest(training.run)
    training.wait_for_requeue(1)
    training.wait("more than the killed start had", lambda: _newest(training.run) > before)
    cluster.on("ctl", "scancel", training.number)
    training.finish()
    assert not any(verify(made) for made in committed(training.run / "phase1"))


def _newest(run: Path) -> int:
    return committed(run / "phase1")[0].step
