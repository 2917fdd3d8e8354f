"""Three phases in one command on two ranks, once left alone and once killed again and again, for
tests/test_launch.py: `killed_pipeline.py FOLDER SET…`.

The ranks are forked: a launcher takes 20 s before it trains, and has no part in what is lost.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from forked_run import ForkedRun

PHASES = [f"ds_configs/tiny/phase{n}.json" for n in (1, 2, 3)]
KILLS = (4, 9, 17, 24, 31)  # after so many traced updates of all phases


def main(folder: Path, *sets: str) -> None:
    straight, killed = (ForkedRun(folder / name) for name in ("straight", "killed"))
    begin(straight, sets)
    assert straight.wait() == [0, 0], straight.said()
    moments, trace = random.Random(0), folder / "killed" / "run" / "trace" / "rank0.jsonl"
    for updates in KILLS:
        begin(killed, sets)
        while not (trace.exists() and trace.read_text().count("\n") >= updates):
            assert killed.alive(), killed.said()
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.4))
        killed.kill([0, 1])
        killed.wait()


def begin(run: ForkedRun, sets: tuple[str, ...]) -> None:
    run.launch(2, PHASES, (*sets, f"run.dir={run.folder / 'run'}"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
