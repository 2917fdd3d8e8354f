"""Who opens a data set together: each looks at its part of the shards and tells the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class Peers(Protocol):
    """Processes that open a data set together. All of them make the same calls in the same order."""

    shown: bool  # whether this one says how far it is

    def mine(self, count: int) -> NDArray[np.int64]:
        """Which of `count` shards this process looks at, in its order."""
        ...

    def each(self, action: Callable[[], T]) -> list[T]:
        """What `action` gives, process by process. Where it fails on one, all raise that error."""
        ...

    def first(self, action: Callable[[], T]) -> T:
        """What `action` gives on the first of them, on all. Where it fails, all raise that error."""
        ...


class Alone:
    """A process that looks at all shards itself.

    `part` = (number, count) lets several that don't wait for one another begin at different shards, so that together
    they scan each missing one about once.
    """

    shown = True

    def __init__(self, part: tuple[int, int] = (0, 1)) -> None:
        self._part = part

    def mine(self, count: int) -> NDArray[np.int64]:
        return np.roll(np.arange(count), -(self._part[0] * count // self._part[1]))

    def each(self, action: Callable[[], T]) -> list[T]:
        return [action()]

    def first(self, action: Callable[[], T]) -> T:
        return action()
