"""Runs continued on other ranks, for tests/training/test_elastic.py: `elastic_runs.py FOLDER`.

FOLDER/weights.pt is what they start from; those of a phase and an optimizer are in FOLDER/PHASE-OPTIMIZER.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from train_kit import PARITY

STEPS = 2  # of each part
CHAINS = {"straight": (2,), "shrunk": (2, 1, 2), "grown": (2, 3, 4)}  # ranks of each part
KINDS = {"adapter_only-AdamW": CHAINS, "full-AdamW": CHAINS, "full-AdamW8bit": ("straight", "shrunk")}
OPTIONS: dict[str, Any] = {
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
    "train_batch_size": 12,
    "train_micro_batch_size_per_gpu": 2,  # 3, 6, 2 and 1.5, so 1 x 3, micro-batches on 2, 1, 3 and 4 ranks
    "checkpoint": {"every": STEPS, "keep": 0},
    "ema": {"decay": 0.9},
}


def main(folder: Path) -> None:
    from forked_run import (
        ForkedRun,  # here, for it imports all that a rank needs, and the tests import this file
    )

    longest = STEPS * max(len(chain) for chain in CHAINS.values())
    for kind, names in KINDS.items():
        phase, optimizer = kind.split("-")
        options = OPTIONS | {"optimizer": PARITY["optimizer"] | {"type": optimizer}}
        for name in names:
            chain = CHAINS[name]
            run = ForkedRun(folder / kind / name, phase, model={"weights": f"{folder}/weights.pt"}, **options)
            for part, ranks in enumerate(chain, start=1):
                run.start(ranks, longest if part == len(chain) else STEPS * part)
                codes = run.wait()
                assert not any(codes), f"{kind}: {name} on {ranks} ranks: {run.said()[-3000:]}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
