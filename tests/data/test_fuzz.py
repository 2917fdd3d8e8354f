"""A few of the damaged inputs that fuzz.py is for: no crash, no hang, none uncounted."""

from __future__ import annotations

from pathlib import Path

import fuzz
import pytest


@pytest.mark.parametrize(
    ("kind", "count", "fates"),
    [
        ("samples", 150, ["read", "unknown image format", "no caption"]),
        ("tars", 20, ["salvaged"]),
        ("streams", 40, ["read", "damaged"]),
        ("catalogs", 20, ["made anew"]),
        ("indexes", 20, ["made anew"]),
        ("stores", 30, ["refused", "read"]),
        ("side files", 60, ["refused", "read"]),
        ("lists", 60, ["refused", "read", "read in part"]),
    ],
)
def test_each_kind(tmp_path: Path, kind: str, count: int, fates: list[str]) -> None:
    if kind in ("side files", "lists"):
        pytest.importorskip("pyarrow")
    assert set(fates) <= set(fuzz.FUZZERS[kind](tmp_path, count, 1))


def test_the_counts_are_of_all_that_is_damaged() -> None:
    assert sum(fuzz.SHARES.values()) == 1000
    assert set(fuzz.SHARES) == set(fuzz.FUZZERS)


@pytest.mark.slow
def test_thousands_of_damaged_inputs(tmp_path: Path) -> None:
    """python tests/data/fuzz.py runs twenty thousand."""
    became = fuzz.fuzz([*fuzz.SHARES], 4000, seed=2)
    assert sum(fates.total() for fates in became.values()) == 4000
    fuzz.fuzz_samples(tmp_path, 300, seed=3, workers=2)
