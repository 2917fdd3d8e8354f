"""What tests/training/test_elastic.py looks at: `elastic_runs.py FOLDER PHASE`, runs continued on other ranks.

FOLDER/weights.pt is what they start from.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from forked_run import ForkedRun
from train_kit import PARITY

STEPS = 2  # of each part
CHAINS = {"straight": (2,), "shrunk": (2, 1, 2), "grown": (2, 3, 4)}
OPTIONS: dict[str, Any] = {
    "optimizer": PARITY["optimizer"],
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
    "train_batch_size": 12,
    "train_micro_batch_size_per_gpu": 2,  # 3, 6, 2 and 1.5, so 1 x 3, micro-batches on 2, 1, 3 and 4 ranks
    "checkpoint": {"every": STEPS, "keep": 0},
    "ema": {"decay": 0.9},
}


def main(folder: Path, phase: str) -> None:
    longest = STEPS * max(len(chain) for chain in CHAINS.values())
    for name, chain in CHAINS.items():
        run = ForkedRun(folder / name, phase, model={"weights": f"{folder}/weights.pt"}, **OPTIONS)
        for part, ranks in enumerate(chain, start=1):
            run.start(ranks, longest if part == len(chain) else STEPS * part)
            codes = run.wait()
            assert not any(codes), f"{name} on {ranks} ranks: {run.said()[-3000:]}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
