"""Starts ranks of launch/train.py by forking from a process that has imported everything: a second instead of ten.

Reads one JSON command a line: {"start": …} answers the new rank's process id, {"wait": pid} its exit code, negative
for a signal. A fault is put into the rank's data: the training code knows nothing of it.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import imported  # noqa: F401

from glide_ds.data.loader import MicroBatches

ROOT = Path(__file__).parents[2]


def sleep_forever_here() -> None:
    time.sleep(1e6)


def put_in(fault: str, at: int) -> None:
    """Change what building the micro-batch of global batch `at` does; every one takes 50 ms."""
    build = MicroBatches.__getitem__

    def faulty(self: MicroBatches, item: tuple[int, int]) -> Any:
        time.sleep(0.05)
        if item[0] >= at:
            if fault == "sleep":
                sleep_forever_here()
            if fault == "raise":
                raise ZeroDivisionError("planted")
            if fault == "memory":
                torch.empty(1 << 46)
            if fault == "hold the lock":
                sys.setswitchinterval(1e6)
                while True:
                    pass
        return build(self, item)

    MicroBatches.__getitem__ = faulty  # type: ignore[method-assign]


def rank(environment: dict[str, str], arguments: list[str], log: str, fault: str, at: int) -> None:
    os.setpgid(0, 0)
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    put_in(fault, at)
    sys.argv = ["train.py", *arguments]
    runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            _, status = os.waitpid(command["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            rank(**command["start"])


if __name__ == "__main__":
    main()
