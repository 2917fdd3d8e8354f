"""Jobs of a real Slurm cluster on this machine, and what may befall them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train_kit import UNSTEADY, read_lines, without_launcher, write_config

ROOT = Path(__file__).parents[2]
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "ip", "nsenter", "unshare", "sshd", "pdsh")
SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
PHASES = ("adapter_only", "adapter_gates", "full")
STEPS, EVERY = 40, 5  # of each phase; between checkpoints


def missing() -> str | None:
    """Why there can be no cluster here."""
    absent = [name for name in NEEDED if not shutil.which(name, path=SYSTEM_PATH)]
    if absent:
        return f"no {', '.join(absent)} here: .ci/run installs them on Debian"
    if os.geteuid() or subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], check=False).returncode:
        return "a cluster on one machine needs root and namespaces"
    return None


class Cluster:
    """Nodes n1, n2, …, and ctl, where jobs are submitted. Gone with this process, however it ends."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        script = [str(Path(__file__).with_name("cluster.sh")), str(folder), str(nodes)]
        self.process = subprocess.Popen(
            [*namespaces, "bash", *script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", f"see the output above and {folder}/log"
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        (folder / "pid").write_text(children.read_text().strip())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)

    def on(self, node: str, *command: str, **variables: str) -> str:
        """The command's output; run from the project's root."""
        path = f"{Path(sys.executable).parent}:{SYSTEM_PATH}"
        environment = {
            **without_launcher(),
            "PATH": path,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        done = subprocess.run(
            [str(self.folder / "on"), node, *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def kill_node(self, node: str) -> None:
        """Its power is cut: every process and the link, at once."""
        self.on("ctl", "sh", "-c", f"ip netns pids {node} | xargs kill -9; ip -n {node} link set eth0 down")

    def cut_link(self, node: str, other: str) -> None:
        """What `node` sends to `other` is lost from now on; both still reach the controller."""
        address = f"10.77.0.{other.removeprefix('n')}"
        lost = ["lladdr", "02:00:00:00:00:01", "dev", "eth0", "nud", "permanent"]
        self.on(node, "ip", "neigh", "replace", address, *lost)

    def mend_link(self, node: str, other: str) -> None:
        self.on(node, "ip", "neigh", "del", f"10.77.0.{other.removeprefix('n')}", "dev", "eth0")


class Job:
    """One submitted job and its run directory."""

    def __init__(self, cluster: Cluster, number: str, run: Path) -> None:
        self.cluster, self.number, self.run = cluster, number, run
        self.left: set[str] = set()  # nodes of earlier starts

    def field(self, name: str) -> str:
        shown = self.cluster.on("ctl", "scontrol", "show", "job", self.number)
        found = re.search(rf"\b{name}=(\S+)", shown)
        assert found, shown
        return found[1]

    def nodes(self) -> list[str]:
        """Where it runs; the batch script on the first."""
        return [
            line.split()[0] for line in (self.run / "slurm" / self.number / "hostfile").read_text().splitlines()
        ]

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in self.run.parent.glob(f"*-{self.number}.log"))

    def wait(self, what: str, condition: Callable[[], Any], seconds: float = 600, every: float = 0.1) -> None:
        give_up = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < give_up, f"{what}: not within {seconds} s\n{self.log[-5000:]}"
            time.sleep(every)

    def wait_for_step(self, step: int, folder: str = "phase1") -> None:
        """Until that checkpoint is committed."""

        def committed() -> bool:
            made = (self.run / folder).glob("step-????????/manifest.json")
            return any(int(path.parent.name.removeprefix("step-")) >= step for path in made)

        self.wait(f"checkpoint {step}", committed)

    def update(self, **fields: str) -> None:
        changes = [f"{name}={value}" for name, value in fields.items()]
        self.cluster.on("ctl", "scontrol", "update", f"JobId={self.number}", *changes)

    def wait_for_requeue(self, times: int, **fields: str) -> dict[str, Any]:
        """Until it's back in the queue, and then run again at once rather than in Slurm's two minutes.

        On other nodes: a busy slurmctld repeats its order to end the job after a minute, and a start that is
        there by then would have it for its own. Returns what the run left in STOPPED.json, which the new start
        removes at once; nothing where it did not stop well.
        """
        self.wait("requeue", lambda: int(self.field("Restarts")) == times)
        self.left |= set(self.nodes())
        self.wait("pending", lambda: self.field("JobState") == "PENDING")
        marker = self.run / "STOPPED.json"
        stopped: dict[str, Any] = json.loads(marker.read_text()) if marker.exists() else {}
        self.update(ExcNodeList=",".join(sorted(self.left)), StartTime="now", **fields)
        return stopped

    def finish(self) -> str:
        """Its state at the end."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        self.wait("end", lambda: self.field("JobState") in ended)
        return self.field("JobState")

    def rank_pids(self) -> list[int]:
        """The training processes, by rank (not those of their data loaders)."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                command = (folder / "cmdline").read_bytes().decode().split("\0")
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                of_parent = Path(f"/proc/{parent}/cmdline").read_bytes().decode()
                if f"run.dir={self.run}" in command and "launch/train.py" in command and "rank.sh" in of_parent:
                    found.append(int(folder.name))
        return sorted(found)

    def signal_ranks(self, number: signal.Signals) -> None:
        for pid in self.rank_pids():
            os.kill(pid, number)


def submit(
    cluster: Cluster, folder: Path, *options: str, phases: tuple[str, ...] = PHASES[:1], **variables: str
) -> list[Job]:
    """One job per phase by slurm/submit_phases.sh: two nodes, a rank on each, the run directory `folder`/run."""
    sets = [f"run.dir={folder}/run", *variables.pop("sets", "").split()]
    configs = [str(config(folder, phase)) for phase in phases]
    sbatch = ["--nodes=2", "--gpus-per-node=1", f"--output={folder}/%x-%j.log", *options]
    arguments = ["--ds_config", *configs, "--set", *sets]
    variables = {"GLIDE_PREFLIGHT": "0", **variables}
    out = cluster.on("ctl", "bash", "slurm/submit_phases.sh", *sbatch, "--", *arguments, **variables)
    numbers = [line.split()[0] for line in out.splitlines() if not line.startswith("slurm:")]
    return [Job(cluster, number, folder / "run") for number in numbers]


def config(folder: Path, phase: str) -> Path:
    train = {"phase": phase, "steps": STEPS, "recompute": "none"}
    return write_config(folder, phase, train=train, log={"every": 5}, checkpoint={"every": EVERY})


def outcome(run: Path, phases: tuple[str, ...] = PHASES) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """What a run has to show, but for its speed: each phase's metrics lines, and every rank's trace lines."""
    metrics = [line for line in read_lines(run / "metrics.jsonl") if line["phase"] in phases]
    steady = [{key: value for key, value in line.items() if key not in UNSTEADY} for line in metrics]
    traces = [
        [
            json.dumps(line)
            for line in read_lines(run / "trace" / f"rank{rank}.jsonl")
            if line["phase"] in phases
        ]
        for rank in range(2)
    ]
    return steady, traces
