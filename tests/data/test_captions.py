"""Every layout's caption is found, and what has none says why."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from data_kit import json_bytes

from glide_ds.data.tally import Cause, Unusable
from glide_ds.data.texts.captions import read_caption


@pytest.mark.parametrize(
    ("members", "caption"),
    [
        ({"txt": b"  a cat\n"}, "a cat"),
        ({"txt": b"a\tcat \r\n  sits"}, "a cat sits"),
        ({"txt": b"\xef\xbb\xbfa cat"}, "a cat"),
        ({"txt": "ein Käfer 🐞".encode()}, "ein Käfer 🐞"),
        ({"json": json_bytes(caption="from json")}, "from json"),
        ({"json": json_bytes(TEXT="laion", url="u", width=3)}, "laion"),
        ({"json": json_bytes(caption=None, text="second field")}, "second field"),
        ({"txt": b"text first", "json": json_bytes(caption="json")}, "text first"),
        ({"txt": b" \n", "json": json_bytes(caption="json fills in")}, "json fills in"),
        ({"txt": b"text is enough", "json": b"{broken"}, "text is enough"),
        ({"json": json_bytes(captions=["", "only this"])}, "only this"),
        (
            {"json": b'[{"image_id": 9, "id": 661, "caption": "an annotation of COCO"}]'},
            "an annotation of COCO",
        ),
        ({"json": rb'{"caption": "lone \ud800 surrogate"}'}, "lone surrogate"),
    ],
)
def test_captions_are_found(members: dict[str, bytes], caption: str) -> None:
    assert read_caption(members, 0.0) == (caption, ())


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ({"jpg": b""}, Cause.NO_CAPTION),
        ({"json": json_bytes(url="u")}, Cause.NO_CAPTION),
        ({"json": json_bytes(caption=7)}, Cause.NO_CAPTION),
        ({"txt": b" \n\t"}, Cause.EMPTY_CAPTION),
        ({"json": json_bytes(caption="")}, Cause.EMPTY_CAPTION),
        ({"json": b"{"}, Cause.BAD_JSON),
        ({"json": b"[1]"}, Cause.NO_CAPTION),
        ({"json": b"1"}, Cause.BAD_JSON),
        ({"json": b"[" * 100_000}, Cause.BAD_JSON),
        ({"txt": b"\xff\x00\x01\x9d"}, Cause.BAD_TEXT),
    ],
)
def test_causes(members: dict[str, bytes], cause: Cause) -> None:
    with pytest.raises(Unusable) as found:
        read_caption(members, 0.0)
    assert found.value.cause == cause


@pytest.mark.parametrize("data", ["caf\xe9".encode("cp1252"), "caf\xe9".encode("utf-16")])
def test_other_encodings_are_tolerated_and_noted(data: bytes) -> None:
    assert read_caption({"txt": data}, 0.0) == ("café", ("caption not UTF-8",))


def test_one_of_several_captions_by_weight() -> None:
    record = {"captions": [{"text": "rare"}, {"text": "often", "weight": 3}, {"caption": "never", "weight": 0}]}
    members = {"json": json.dumps(record).encode()}
    drawn = Counter(read_caption(members, n / 400)[0] for n in range(400))
    assert drawn == {"rare": 100, "often": 300}


def nested(depth: int) -> dict[str, bytes]:
    return {"json": b'{"captions": ' + b"[" * depth + b'"deep"' + b"]" * depth + b"}"}


def test_captions_nested_deep_are_read_or_counted() -> None:
    assert read_caption(nested(600), 0.0)[0] == "deep"
    with pytest.raises(Unusable, match=Cause.BAD_JSON):  # deeper than Python's parser goes
        read_caption(nested(30_000), 0.0)


@pytest.mark.parametrize(
    "weight", ["NaN", "Infinity", "1" + "0" * 400, "1" + "0" * 5000, "-1", "true", '"2"', "[]"]
)
def test_a_weight_that_is_no_finite_number_counts_as_one(weight: str) -> None:
    record = f'{{"captions": [{{"text": "a", "weight": {weight}}}, {{"text": "b", "weight": 1}}]}}'
    drawn = Counter(read_caption({"json": record.encode()}, n / 100)[0] for n in range(100))
    assert drawn == {"a": 50, "b": 50}


def test_weights_whose_sum_is_not_finite() -> None:
    record = json_bytes(captions=[{"text": text, "weight": 1e308} for text in "abcd"])
    drawn = Counter(read_caption({"json": record}, n / 100)[0] for n in range(100))
    assert drawn == dict.fromkeys("abcd", 25)


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1" + "0" * 5000, "NaN"])
def test_numbers_of_no_concern_spoil_no_caption(number: str) -> None:
    assert read_caption({"json": f'{{"size": {number}, "caption": "a"}}'.encode()}, 0.0)[0] == "a"
