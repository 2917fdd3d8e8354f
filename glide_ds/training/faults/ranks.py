"""What all ranks do alike: they agree on an error, or go on together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from glide_ds.errors import GlideError

T = TypeVar("T")


def agreed(action: Callable[[], T]) -> T:
    """`action()`'s value; where it fails on some ranks, all ranks raise the lowest one's error.

    Called by all ranks alike. Without this, one rank's mistake leaves the others waiting for it.
    """
    failure: GlideError | None = None
    value: T | None = None
    try:
        value = action()
    except GlideError as error:
        failure = error
    except OSError as error:
        failure = GlideError(str(error), remedy="check the path, its permissions and the free space")
    failures: list[GlideError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for first in failures:
        if first is not None:
            first.on_all_ranks = True
            raise first
    return value  # type: ignore[return-value]


class Ranks:
    """The ranks of the run, where they open a data set together: data/tars/peers.py's Peers."""

    def __init__(self) -> None:
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self.shown = self._rank == 0

    def mine(self, count: int) -> NDArray[np.int64]:
        first, end = (number * count // self._size for number in (self._rank, self._rank + 1))
        return np.arange(first, end)

    def each(self, action: Callable[[], T]) -> list[T]:
        value = agreed(action)
        values: list[T] = [value] * self._size
        dist.all_gather_object(values, value)
        return values

    def first(self, action: Callable[[], T]) -> T:
        values: list[T | None] = [agreed(lambda: action() if self._rank == 0 else None)]
        dist.broadcast_object_list(values, src=0)
        return values[0]  # type: ignore[return-value]


def attempt(action: Callable[[], object]) -> str | None:
    """What went wrong, for where an error has to be told to other ranks first."""
    try:
        action()
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        return f"{type(error).__name__}: {error}"
    return None
