"""Training on a real Slurm cluster, whatever befalls it: every run's metrics and data are the uninterrupted one's.

Slow: some 18 launches of two ranks. Most scenarios wait for Slurm more than they compute, so a few run at once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from slurm_kit import EVERY, PHASES, STEPS, Cluster, Job, config, outcome, submit
from test_lib import cluster_commands

pytestmark = pytest.mark.cluster
FIRST = PHASES[:1]


def straight(cluster: Cluster, folder: Path) -> Path:
    """All phases in one command, undisturbed, by `deepspeed --hostfile` over ssh from one of the nodes."""
    (folder / "hostfile").write_text("n11 slots=1\nn12 slots=1\n")
    configs = [str(config(folder, phase)) for phase in PHASES]
    launcher = ["deepspeed", "--hostfile", f"{folder}/hostfile", "--master_port", "29500"]
    arguments = ["--ds_config", *configs, "--set", f"run.dir={folder}/run"]
    # Over ssh nothing else comes along, and with other threads sums have other roundings.
    (folder / "environment").write_text("OMP_NUM_THREADS=1\n")
    cluster.on("n11", *launcher, "launch/train.py", *arguments, DS_ENV_FILE=f"{folder}/environment")
    return folder / "run"


def chain(cluster: Cluster, folder: Path) -> list[Job]:
    """Every command of it in a stand-in for a container."""
    container = folder / "container"
    container.write_text(f'#!/bin/sh\necho "$*" >>{folder}/contained\nexec "$@"\n')
    container.chmod(0o755)
    jobs = submit(cluster, folder, phases=PHASES, GLIDE_CONTAINER=str(container))
    for job in jobs:
        job.finish()
    return jobs


def failing_chain(cluster: Cluster, folder: Path) -> list[Job]:
    jobs = submit(
        cluster, folder, "--nodes=1", phases=PHASES, sets="model.weights=/no/such/file.pt", GLIDE_PREFLIGHT="1"
    )
    for job in jobs:
        job.finish()
    return jobs


def stopped_then_killed(cluster: Cluster, folder: Path) -> Job:
    """Slurm's warning, a requeue; then a rank is killed while a checkpoint is written, another requeue."""
    (job,) = submit(cluster, folder, GLIDE_LAUNCHER="torchrun")
    with frozen(job, step=EVERY):
        cluster.on("ctl", "scancel", "--batch", "--signal=USR1", job.number)
        job.wait("stop file", (job.run / "STOP").exists)
        time.sleep(1.5)  # the ranks look for the file once a second
    stopped = job.wait_for_requeue(1)
    assert EVERY <= stopped["step"] < STEPS, stopped
    job.wait("a checkpoint in the making", lambda: being_written(job), every=0.005)
    os.kill(job.rank_pids()[-1], signal.SIGKILL)
    job.wait_for_requeue(2)
    job.finish()
    return job


def preempted(cluster: Cluster, folder: Path) -> Job:
    (job,) = submit(cluster, folder, GLIDE_LAUNCHER="deepspeed")
    with frozen(job, step=EVERY):
        urgent = ["--partition=urgent", f"--nodelist={job.field('NodeList')}", "--nodes=2", "--exclusive"]
        cluster.on("ctl", "sbatch", *urgent, f"--output={folder}/urgent.log", "--wrap=sleep 1")
        job.wait("preemption", lambda: job.field("PreemptTime") != "None")
        time.sleep(1)
    assert job.wait_for_requeue(1)["reason"] == "SIGTERM"
    job.finish()
    return job


def timed_out(cluster: Cluster, folder: Path) -> Job:
    """The time limit comes while the job trains: Slurm warns it when it likes, up to a minute early."""
    (job,) = submit(cluster, folder, "--time=10:00:00", "--signal=B:USR1@60")
    with frozen(job, step=EVERY):
        hours, minutes, _ = job.field("RunTime").split(":")
        job.update(TimeLimit=str(60 * int(hours) + int(minutes) + 2))
        job.wait("stop file", (job.run / "STOP").exists)
        time.sleep(1.5)
    job.wait_for_requeue(1, TimeLimit="10:00:00")
    job.finish()
    return job


def node_lost(cluster: Cluster, folder: Path) -> Job:
    (job,) = submit(cluster, folder)
    with frozen(job, step=EVERY):
        cluster.kill_node(job.nodes()[1])
    job.wait_for_requeue(1)
    job.finish()
    return job


def link_cut(cluster: Cluster, folder: Path) -> Job:
    """The link between both nodes is cut: for less than the timeout, then for longer."""
    (job,) = submit(cluster, folder, sets="run.timeout_s=40", GLIDE_GIVE_UP_S="10")
    with frozen(job, step=EVERY):
        first, second = job.nodes()
        cluster.cut_link(first, second)
    time.sleep(5)
    cluster.mend_link(first, second)
    with frozen(job, step=2 * EVERY):
        assert job.field("Restarts") == "0"
        cluster.cut_link(first, second)
    job.wait("ranks that give up", lambda: "requeued" in job.log)
    cluster.mend_link(first, second)
    job.wait_for_requeue(1)
    job.finish()
    return job


def cancelled(cluster: Cluster, folder: Path) -> tuple[Job, str, Job]:
    """A person cancels the job and submits it again, later."""
    (first,) = submit(cluster, folder, GLIDE_PREFLIGHT="1")
    first.wait_for_step(EVERY)
    cluster.on("ctl", "scancel", first.number)
    state = first.finish()
    (second,) = submit(cluster, folder)
    second.finish()
    return first, state, second


@contextmanager
def frozen(job: Job, step: int) -> Iterator[None]:
    """The ranks stand still from that checkpoint on, so that what is done to the job comes in the middle."""
    job.wait_for_step(step)
    job.signal_ranks(signal.SIGSTOP)
    try:
        yield
    finally:
        job.signal_ranks(signal.SIGCONT)


def being_written(job: Job) -> bool:
    """Whether there is a checkpoint that isn't committed."""
    return any(job.run.glob("phase1/.step-*"))


SCENARIOS: list[Callable[[Cluster, Path], Any]] = [
    straight,
    node_lost,
    link_cut,
    preempted,
    timed_out,
    chain,
    stopped_then_killed,
    cancelled,
    failing_chain,
]


@pytest.fixture(scope="module")
def played(cluster: Cluster) -> Iterator[dict[str, Future[Any]]]:
    """What came of each scenario, by name; they run side by side in the background."""
    with ThreadPoolExecutor(max_workers=3) as pool:
        futures = {}
        for scenario in SCENARIOS:
            folder = cluster.folder / scenario.__name__
            folder.mkdir()
            futures[scenario.__name__] = pool.submit(timed, scenario, cluster, folder)
        yield futures
        for future in futures.values():
            future.cancel()


def timed(scenario: Callable[[Cluster, Path], Any], cluster: Cluster, folder: Path) -> Any:
    started = time.monotonic()
    try:
        return scenario(cluster, folder)
    finally:
        print(f"{scenario.__name__}: {time.monotonic() - started:.0f} s", flush=True)


def test_deepspeed_with_a_hostfile_trains_over_ssh(played):
    metrics, traces = outcome(played["straight"].result())
    assert [(line["phase"], line["step"]) for line in metrics if line["step"] == STEPS] == [
        (p, STEPS) for p in PHASES
    ]
    assert all(len(trace) == STEPS * len(PHASES) for trace in traces)


def test_a_chain_of_three_phases_is_one_run(played):
    jobs = played["chain"].result()
    assert [job.field("JobState") for job in jobs] == ["COMPLETED"] * 3, jobs[0].log
    assert outcome(jobs[0].run) == outcome(played["straight"].result())
    assert len(set(jobs[0].nodes())) == 2
    contained = (jobs[0].run.parent / "contained").read_text()
    assert contained.count("bash slurm/rank.sh") == 2 * len(PHASES)


def test_a_phase_that_fails_cancels_the_rest(played):
    jobs = played["failing_chain"].result()
    assert [job.field("JobState") for job in jobs] == ["FAILED", "CANCELLED", "CANCELLED"], jobs[0].log
    assert jobs[0].field("ExitCode") == "2:0"
    assert jobs[0].field("Restarts") == "0"
    assert "/no/such/file.pt" in jobs[0].log
    assert "preflight found what would stop the run" in jobs[0].log


@pytest.mark.parametrize(
    ("name", "restarts"),
    [("stopped_then_killed", 2), ("preempted", 1), ("timed_out", 1), ("node_lost", 1), ("link_cut", 1)],
)
def test_a_job_that_is_disturbed_is_requeued_and_the_run_is_the_undisturbed_one(played, name, restarts):
    job = played[name].result()
    assert job.field("JobState") == "COMPLETED", job.log
    assert job.field("Restarts") == str(restarts)
    assert outcome(job.run, FIRST) == outcome(played["straight"].result(), FIRST)
    assert not (job.run / "STOP").exists()
    assert not (job.run / "STOPPED.json").exists()


def test_a_person_who_cancels_a_job_has_it_cancelled(played):
    first, state, second = played["cancelled"].result()
    assert "all is well" in first.log  # preflight's last line
    assert state == "CANCELLED", first.log
    assert second.field("JobState") == "COMPLETED", second.log
    assert outcome(second.run, FIRST) == outcome(played["straight"].result(), FIRST)


def test_slurm_takes_the_job_that_the_readme_shows(cluster):
    _, (sbatch, *arguments) = cluster_commands()
    cluster.on("ctl", sbatch, "--test-only", *arguments)
