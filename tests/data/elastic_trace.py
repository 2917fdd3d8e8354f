"""Runs for test_elastic_trace.py: `elastic_trace.py SHARDS FOLDER`, one uninterrupted, one stopped at odd steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

BATCH = 12
CHAINS = {"straight": ((2, 10),), "elastic": ((2, 3), (1, 5), (3, 10))}  # (ranks, up to step)


def main(shards: str, folder: Path) -> None:
    from forked_run import ForkedRun  # here, where no rank has started: it imports all that a rank needs

    options: dict[str, Any] = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": 2,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
        "data": {"shards": shards, "workers": 1, "trace": True},
    }
    for name, chain in CHAINS.items():
        run = ForkedRun(folder / name, "base", **options)
        for ranks, steps in chain:
            run.start(ranks, steps)
            assert not any(run.wait()), f"{name} on {ranks} ranks: {run.said()[-3000:]}"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
