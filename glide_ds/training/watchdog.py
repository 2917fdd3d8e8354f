"""Where every rank is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from glide_ds.config import RunConfig

T = TypeVar("T")

SET_UP = "set-up"  # outside the training loop: downloads and index files may take long


class Watch:
    """This rank's progress marks: cheap to set, read by the watchdog's thread."""

    def __init__(self) -> None:
        self.mark, self.step = SET_UP, 0
        self.count = 0  # marks passed: the same sequence on all ranks
        self.micro = 0  # batches read in this step
        self.beats = 0  # signs of life that only some ranks give

    def at(self, mark: str, step: int) -> None:
        """This rank now begins `mark` (data, forward, backward, step, log, save, sample, validate)."""
        self.micro = (self.micro + 1 if step == self.step else 1) if mark == "data" else self.micro
        self.mark, self.step = mark, step
        self.count += 1

    def beat(self) -> None:
        """A sign of life within a long mark, on this rank alone."""
        self.beats += 1

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, with a sign of life for each."""
        for item in items:
            self.beat()
            yield item


def hang_limit(config: RunConfig) -> float:
    """Seconds without a move on any rank that count as a hang."""
    return config.hang_s or config.timeout_s / 2
