"""Where and from what a result was obtained: kept beside every figure."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def environment(device: str) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "cpu": f"{model} ({platform.machine()})",
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("COMMIT") or commit.stdout.strip(),  # a copy without its history is told
        "command": shlex.join(["python", *(_named(argument) for argument in sys.argv)]),
    }


def _named(argument: str) -> str:
    """A path of this machine says nothing on another: its name is enough."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def commit(tree: Path) -> str:
    """What stands in a clone."""
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
