"""A run for test_surroundings.py: `lost_shards.py SHARDS FOLDER`, two ranks whose shards go while they train."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(shards: Path, folder: Path) -> None:
    from forked_run import ForkedRun  # here, where no rank has started: it imports all that a rank needs

    run = ForkedRun(folder, "base", data={"shards": str(shards), "workers": 1})
    run.start(2, 100_000, checkpoint={"every": 5})
    until = time.monotonic() + 120
    while run.newest() is None:
        assert time.monotonic() < until, run.said()[-3000:]
        assert run.alive(), run.said()[-3000:]
        time.sleep(0.02)
    shards.rename(shards.with_name("elsewhere"))
    lost = run.wait()
    said = run.said()
    shards.with_name("elsewhere").rename(shards)
    run.start(2, run.newest().step + 5)  # type: ignore[union-attr]
    print(json.dumps({"lost": lost, "said": said, "again": run.wait(), "said_again": run.said()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
