"""What can be wrong with a sample, and the count of what became of those that were read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

EXAMPLES = 5  # kept per cause for the report


class Cause(StrEnum):
    """Why a sample cannot be used."""

    NO_IMAGE = "no image"
    CORRUPT_IMAGE = "corrupt image"
    UNKNOWN_FORMAT = "unknown image format"
    TOO_SMALL = "image too small"
    TOO_LARGE = "image too large"
    NO_CAPTION = "no caption"
    EMPTY_CAPTION = "empty caption"
    BAD_TEXT = "caption not text"
    BAD_JSON = "bad json"


class Unusable(Exception):  # noqa: N818 - a finding about a sample, not a program's error
    """A sample cannot be used; the loader counts the cause and puts another in its slot."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause, detail)
        self.cause = cause
        self.detail = detail


@dataclass
class Tally:
    """What was read, and what became of it. Sums over micro-batches."""

    read: int = 0  # samples tried, substitutes among them
    delivered: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # by cause
    filtered: Counter[str] = field(default_factory=Counter)  # by rule
    tolerated: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)  # by cause

    def skip(self, cause: str, example: str) -> None:
        self.skipped[cause] += 1
        self._example(cause, [example])

    def add(self, other: Tally) -> None:
        self.read += other.read
        self.delivered += other.delivered
        self.skipped.update(other.skipped)
        self.filtered.update(other.filtered)
        self.tolerated.update(other.tolerated)
        for cause, examples in other.examples.items():
            self._example(cause, examples)

    def _example(self, cause: str, examples: list[str]) -> None:
        kept = self.examples.setdefault(cause, [])
        kept.extend(example for example in examples if example not in kept)
        del kept[EXAMPLES:]

    @property
    def bad(self) -> int:
        return sum(self.skipped.values())

    def describe(self) -> str:
        """The causes and rules in one line, the commonest first."""
        counts = (
            self.skipped + Counter({f"filter {rule}": n for rule, n in self.filtered.items()})
        ).most_common()
        return ", ".join(f"{cause} {count}" for cause, count in counts) or "none"

    def to_dict(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "delivered": self.delivered,
            "replaced": self.bad + self.filtered.total(),
            "skipped": dict(self.skipped.most_common()),
            "filtered": dict(self.filtered.most_common()),
            "tolerated": dict(self.tolerated.most_common()),
            "examples": {cause: list(examples) for cause, examples in self.examples.items()},
        }
