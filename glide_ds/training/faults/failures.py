"""What an error means: a peer that is gone, or a mistake that a person can mend."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from glide_ds.config import BatchArithmetic, Config
from glide_ds.errors import DataError, GlideError

# Gloo raises a plain RuntimeError for a closed connection and for a time-out.
_LOST = re.compile(
    r"gloo/|NCCL|Connection (closed|reset) by peer|Connection refused|Timed out waiting|Broken pipe"
)
_NO_HOST_MEMORY = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory")
_WORKER_DIED = re.compile(
    r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (is killed by signal|exited unexpectedly)"
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank, or the way to it, is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
    )


def brief(error: BaseException) -> str:
    """The first sentence of a library's message, without the place in its source."""
    return re.sub(r"^\[\S*\] ", "", str(error).partition("\n")[0]).partition(". ")[0]


@contextmanager
def explained(config: Config, arithmetic: BatchArithmetic) -> Iterator[None]:
    """Turn errors of the machine that a person can mend into GlideErrors that name the remedy."""
    try:
        yield
    except RuntimeError as error:
        if (told := explanation(error, config, arithmetic)) is None:
            raise
        raise told from error


def explanation(error: RuntimeError, config: Config, arithmetic: BatchArithmetic) -> GlideError | None:
    """What to do about `error`, if that is known."""
    fact = str(error).partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError) or _NO_HOST_MEMORY.search(str(error)):
        train = config.train
        smaller = max(1, arithmetic.micro_batch // 2)
        remedies = []
        if arithmetic.micro_batch > 1:
            remedies.append(
                f"train_micro_batch_size_per_gpu={smaller} instead of {arithmetic.micro_batch} (the global batch "
                f"of {arithmetic.global_batch} stays)"
            )
        if train.recompute != "blocks":
            remedies.append("train.recompute=blocks")
        if arithmetic.world_size == 1 or not remedies:
            remedies.append("more ranks, which share the optimizer's state")
        return GlideError(f"memory is used up ({fact})", "no step can be taken", f"try {', '.join(remedies)}")
    if _WORKER_DIED.search(str(error)):
        return DataError(
            f"a loader worker ended ({fact}), most often killed because the host's memory was used up",
            remedy=f"lower data.workers={config.data.workers}, or look into the system's log",
        )
    return None
