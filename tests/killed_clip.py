"""`prepare clip` on two ranks, killed and started again: `killed_clip.py SHARDS FOLDER KILLED_AT…`.

Makes the store FOLDER/whole undisturbed, and FOLDER/N killed just after N arrays were in it; what each held then is
printed as JSON. Ranks are forked from here, where the encoder's module is loaded, so a start takes no time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import open_clip  # noqa: F401 - imported here so that no rank has to

from glide_ds.commands import prepare_clip as prepare

RANKS = 2


def start(shards: str, out: Path) -> list[int]:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    words = [shards, "--out", str(out), "--model", "builtin:tiny", "--weights", "builtin", "--batch", "7"]
    pids = []
    for rank in range(RANKS):
        pid = os.fork()
        if not pid:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
            code = 1
            try:
                os.dup2(2, 1)
                prepare.run(parser.parse_args(words))
                code = 0
            finally:
                sys.excepthook(*sys.exc_info()) if code else None  # type: ignore[arg-type]
                os._exit(code)
        pids.append(pid)
    return pids


def wait(pids: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def main(shards: str, folder: Path, moments: list[int]) -> None:
    assert wait(start(shards, folder / "whole")) == [0] * RANKS
    held, dice = {}, random.Random(0)
    for moment in moments:
        out = folder / str(moment)
        pids = start(shards, out)
        while len(list(out.glob("*.npy"))) < moment:
            time.sleep(0.0005)
        time.sleep(dice.uniform(0, 0.01))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert -signal.SIGKILL in wait(pids), "all was done before the kill"
        held[moment] = sorted(path.name for path in out.iterdir())
        assert wait(start(shards, out)) == [0] * RANKS
    print(json.dumps(held))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [int(word) for word in sys.argv[3:]])
