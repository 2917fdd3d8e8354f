"""Filters drop what they say, count it by rule, and are off by default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_kit import json_bytes, sample, source, take, write_tar

from glide_ds.config import FilterConfig
from glide_ds.data.filters import Filtered, check
from glide_ds.errors import ConfigError, DataError

RECORD = {
    "width": 300,
    "height": 200,
    "similarity": 0.31,
    "punsafe": 0.02,
    "NSFW": "UNLIKELY",
    "LANGUAGE": "en",
}


@pytest.mark.parametrize(
    ("keeps", "drops"),
    [
        ({"min_size": 200}, {"min_size": 201}),
        ({"max_aspect": 1.5}, {"max_aspect": 1.49}),
        ({"min_similarity": 0.31}, {"min_similarity": 0.32}),
        ({"max_punsafe": 0.02}, {"max_punsafe": 0.01}),
        ({"nsfw": ("unlikely",)}, {"nsfw": ("UNSURE",)}),
        ({"language": ("de", "en")}, {"language": ("de",)}),
    ],
)
def test_rules(keeps: dict[str, Any], drops: dict[str, Any]) -> None:
    members = {"json": json_bytes(**RECORD)}
    check(members, FilterConfig(**keeps))
    (rule,) = drops
    with pytest.raises(Filtered) as dropped:
        check(members, FilterConfig(**drops))
    assert dropped.value.cause == rule
    with pytest.raises(Filtered, match="not recorded"):
        check({"json": b"{}"}, FilterConfig(**drops))


NO_NUMBERS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "1" + "0" * 400,
    "1" + "0" * 5000,
    "true",
    '"nan"',
    '"inf"',
)
NO_NUMBERS += ('"much"', '""', "[0.01]", '{"value": 0.01}', "[" * 600 + "0" + "]" * 600)


@pytest.mark.parametrize(
    "rule", [{"min_size": 1}, {"max_aspect": 9.0}, {"min_similarity": -1.0}, {"max_punsafe": 1.0}]
)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: value[:12])
def test_what_is_no_finite_number_is_not_recorded(rule: dict[str, Any], value: str) -> None:
    for field in ("width", "height", "similarity", "punsafe"):
        record = json.dumps({**RECORD, field: "?"}).replace('"?"', value).encode()
        (name,) = rule
        if (
            field
            in {"min_similarity": "similarity", "max_punsafe": "punsafe"}.get(name, "width height").split()
        ):
            with pytest.raises(Filtered, match="not recorded") as dropped:
                check({"json": record}, FilterConfig(**rule))
            assert len(str(dropped.value)) < 200
        else:
            check({"json": record}, FilterConfig(**rule))


@pytest.mark.parametrize(
    ("rule", "record"),
    [
        ({"max_punsafe": 0.5}, {"punsafe": -1}),
        ({"max_aspect": 2.0}, {"width": 0, "height": 0}),
        ({"max_aspect": 2.0}, {"width": 300, "height": -1}),
        ({"min_size": 64}, {"width": -1, "height": -1}),
    ],
    ids=str,
)
def test_what_stands_for_unknown_is_not_recorded(rule: dict[str, Any], record: dict[str, Any]) -> None:
    with pytest.raises(Filtered, match="not recorded"):
        check({"json": json_bytes(**record)}, FilterConfig(**rule))


@pytest.mark.parametrize("rule", ["nsfw", "language"])
@pytest.mark.parametrize(
    "value", [*NO_NUMBERS[:4], NO_NUMBERS[-3], NO_NUMBERS[-1]], ids=lambda value: value[:12]
)
def test_what_is_no_word_is_not_recorded(rule: str, value: str) -> None:
    members = {"json": f'{{"NSFW": {value}, "LANGUAGE": {value}}}'.encode()}
    with pytest.raises(Filtered, match="not recorded"):
        check(members, FilterConfig(**{rule: ("nan", "inf", "-inf", "[0.01]")}))


def test_off_by_default() -> None:
    check({}, FilterConfig())
    with pytest.raises(ConfigError, match="max_aspect"):
        FilterConfig.of({"max_aspect": 0.5}, "data.filter")


def test_the_report_counts_by_rule(tmp_path: Path) -> None:
    samples = [(f"{n}", sample(n, json=json_bytes(similarity=n / 20))) for n in range(20)]
    path = str(write_tar(tmp_path / "x.tar", samples))
    made = source(path, batch=20, filter=FilterConfig(min_similarity=0.5), max_bad_fraction=0.0)
    (batch,) = take(made, 1)
    assert min(batch.sample_ids) >= 10
    report = made.report()
    assert report["filtered"]["min_similarity"] >= 10
    assert report["skipped"] == {}
    with pytest.raises(DataError, match=r"filter min_similarity 256.*loosen data\.filter"):
        take(source(path, filter=FilterConfig(min_similarity=2.0)), 1)
