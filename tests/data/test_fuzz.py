"""Damaged inputs of every kind: no crash, no hang, no lost slot, every one counted."""

from __future__ import annotations

import random
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_kit import encoded, json_bytes, photo, sample, source, take, write_shards, write_tar

from glide_ds.data.clip_notes import Encoder, StoreNote
from glide_ds.data.clip_store import ClipStore, text_hash, write_store
from glide_ds.data.tally import Cause, Unusable
from glide_ds.data.tars.shards import open_shards
from glide_ds.data.texts.recaptions import Captions
from glide_ds.errors import DataError

GOOD = 200
TEXT = b"a caption"


def flip_bits(data: bytes, chance: random.Random) -> bytes:
    broken = bytearray(data)
    for _ in range(chance.randint(1, 40)):
        broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
    return bytes(broken)


def noise(count: int, chance: random.Random) -> bytes:
    return bytes(chance.randrange(256) for _ in range(count))


def giant_png(chance: random.Random) -> bytes:
    """A sound header of up to 2^31 pixels a side, and next to nothing to fill it."""
    sides = [chance.randrange(20_000, 2**31) for _ in range(2)]
    header = b"IHDR" + struct.pack(">IIBBBBB", *sides, 8, 2, 0, 0, 0)
    start = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + start + struct.pack(">I", 1000) + b"IDAT" + noise(1004, chance)


def giant_jpeg(chance: random.Random) -> bytes:
    """A picture whose frame header says that it is up to 65,535 pixels a side."""
    data = bytearray(encoded(photo(0), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", *(chance.randrange(20_000, 65_536) for _ in range(2)))
    return bytes(data)


def damaged(kind: str, chance: random.Random) -> dict[str, bytes]:
    """A sample with one kind of damage. Some survive it, which is fine: they must then be delivered."""
    code = chance.choice(["JPEG", "PNG", "WEBP", "GIF"])
    image = encoded(photo(chance.randrange(50), chance.randint(2, 90), chance.randint(2, 90)), code)
    record = json_bytes(caption="a caption", width=4)
    wrong = chance.choice(["png", "webp", "jpeg", "gif", "bmp"])
    return {
        "bit flips": lambda: {"jpg": flip_bits(image, chance), "txt": TEXT},
        "truncated": lambda: {"jpg": image[: chance.randrange(len(image))], "txt": TEXT},
        "wrong header": lambda: {"jpg": noise(16, chance) + image[16:], "txt": TEXT},
        "renamed format": lambda: {wrong: image, "txt": TEXT},
        "giant png": lambda: {"png": giant_png(chance), "txt": TEXT},
        "giant jpeg": lambda: {"jpg": giant_jpeg(chance), "txt": TEXT},
        "bad json": lambda: {"jpg": image, "json": flip_bits(record, chance)},
        "truncated json": lambda: {"jpg": image, "json": record[: chance.randrange(len(record))]},
        "bad UTF-8": lambda: {"jpg": image, "txt": noise(20, chance)},
        "latin-1": lambda: {"jpg": image, "txt": "caf\xe9 cr\xe8me".encode("latin-1")},
        "no caption": lambda: {"jpg": image},
        "empty caption": lambda: {"jpg": image, "txt": b" \n"},
        "empty image": lambda: {"jpg": b"", "txt": TEXT},
        "one pixel": lambda: {"jpg": encoded(np.zeros((1, 1, 3), np.uint8)), "txt": TEXT},
        "no image": lambda: {"txt": TEXT},
        "no picture format": lambda: {"mp4": image, "txt": TEXT},
        "duplicate key": lambda: {"jpg": image, "txt": TEXT},
    }[kind]()


KINDS = (
    *("bit flips", "truncated", "wrong header", "renamed format", "giant png", "giant jpeg", "bad json"),
    *("truncated json", "bad UTF-8", "latin-1", "no caption", "empty caption", "empty image", "one pixel"),
    *("no image", "no picture format", "duplicate key"),
)
# What becomes of those kinds that have one fate.
CERTAIN = {
    "wrong header": Cause.UNKNOWN_FORMAT,
    "giant png": Cause.TOO_LARGE,
    "giant jpeg": Cause.TOO_LARGE,
    "no caption": Cause.NO_CAPTION,
    "empty caption": Cause.EMPTY_CAPTION,
    "empty image": Cause.CORRUPT_IMAGE,
    "one pixel": Cause.TOO_SMALL,
    "no image": Cause.NO_IMAGE,
    "no picture format": Cause.NO_IMAGE,
    "renamed format": None,
    "latin-1": None,
    "duplicate key": None,
    "good": None,
}


def run_fuzz(folder: Path, count: int, seed: int, workers: int) -> None:
    chance = random.Random(seed)
    samples = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        key = "again" if kind == "duplicate key" else f"d{number:05d}"
        samples.append((kind, (key, damaged(kind, chance))))
    samples += [("good", (f"g{n:05d}", sample(n % 50))) for n in range(GOOD)]
    chance.shuffle(samples)
    half = len(samples) // 2
    write_tar(folder / "f-000.tar", [s for _, s in samples[:half]])
    write_tar(folder / "f-001.tar", [s for _, s in samples[half:]])
    made = source(
        f"{folder}/f-{{000..001}}.tar", batch=20, workers=workers, drop_last=False, max_bad_fraction=1.0
    )
    assert made.facts()["samples"] == len(samples)
    assert made.facts()["duplicate_keys"] == sum(kind == "duplicate key" for kind, _ in samples) - 2

    fates: list[Cause | None] = []
    for number, (kind, _) in enumerate(samples):
        try:
            made.samples.load(number, 0.0)
            fates.append(None)
        except Unusable as finding:
            fates.append(Cause(finding.cause))
        assert kind not in CERTAIN or fates[-1] == CERTAIN[kind], kind

    steps = made.batches_per_epoch
    batches = take(made, steps)
    seen = []
    for step, batch in enumerate(batches):
        assert batch.slots.tolist() == list(range(20))
        assert batch.images.shape == (20, 16, 16, 3)
        drawn = made.order.draw(step, batch.slots.numpy())
        ids = batch.sample_ids.tolist()
        for wanted, found, padding in zip(drawn.ids.tolist(), ids, drawn.padding.tolist(), strict=True):
            found = -1 - found if padding else found
            assert (found == wanted) == (fates[wanted] is None)  # exactly what is bad was replaced,
            assert fates[found] is None  # by what is good
            seen.append(wanted)
    assert set(seen) == set(range(len(samples)))
    report = made.report()
    assert report["delivered"] == 20 * steps
    assert report["read"] == report["delivered"] + sum(report["skipped"].values())
    met = Counter(fates[wanted] for wanted in seen)
    met.pop(None)
    assert set(report["skipped"]) == set(report["examples"]) == set(met) >= set(CERTAIN.values()) - {None}
    assert all(report["skipped"][cause] >= count for cause, count in met.items())


def test_damaged_samples(tmp_path: Path) -> None:
    run_fuzz(tmp_path, 150, seed=1, workers=0)


@pytest.mark.slow
def test_two_thousand_damaged_samples(tmp_path: Path) -> None:
    run_fuzz(tmp_path, 2000, seed=2, workers=2)


def test_damaged_tars_are_opened_or_named(tmp_path: Path) -> None:
    """Bit flips and truncations of whole tars, headers included; what is whole of them can be read."""
    chance = random.Random(3)
    whole = write_tar(tmp_path / "t.tar", [(f"{n}", sample(n)) for n in range(8)]).read_bytes()
    named = salvageable = left_nothing = 0
    for number in range(60):
        path = tmp_path / f"x{number}.tar"
        data = bytearray(whole[: chance.randrange(600, len(whole))] if number % 2 else whole)
        for _ in range(chance.randint(0, 30)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            open_shards(str(path))
        except DataError as error:
            named += path.name in str(error)
        try:
            salvaged = open_shards(str(path), salvage=True)
        except DataError as error:
            left_nothing += "hold no sample" in str(error)
        else:
            assert all(salvaged.read(n) for n in range(len(salvaged)))
            salvageable += 1
    assert named >= 30
    assert salvageable + left_nothing == 60
    assert salvageable >= 40


def test_damaged_catalogs_are_made_anew_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever becomes of the file: the same set, and a line for each."""
    chance = random.Random(4)
    pattern = write_shards(tmp_path, [2, 3])
    before = open_shards(pattern)
    (path,) = tmp_path.glob("*.catalog")
    whole = path.read_bytes()
    for number in range(60):
        data = bytearray(whole[: chance.randrange(len(whole))] if number % 2 else whole)
        for _ in range(chance.randint(number % 2 == 0, 9)):
            place = chance.randrange(len(data) or 1)
            data[place : place + 1] = bytes([data[place] ^ chance.randrange(1, 256)] if data else b"")
        path.write_bytes(data)
        assert [*open_shards(pattern).heads] == [*before.heads]
        said = capsys.readouterr().out
        assert f"{path} is " in said or data == whole
        assert path.read_bytes() == whole


def spoilt(whole: bytes, chance: random.Random) -> bytes:
    """Cut short, with bytes changed, or both."""
    data = bytearray(whole[: chance.randrange(len(whole))] if chance.random() < 0.4 else whole)
    for _ in range(chance.randint(0, 9)):
        if data:
            data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
    return bytes(data)


def run_store_fuzz(folder: Path, count: int, seed: int) -> None:
    """A damaged store is refused by name, or gives each sample its own row but for the bytes that are changed."""
    chance = random.Random(seed)
    shards = open_shards(write_shards(folder, [2, 3]))
    encoder, rows = Encoder("fuzz", "none", "text"), np.arange(5 * 4, dtype=np.float16).reshape(5, 4)
    hashes = [text_hash(f"photo {n}") for n in range(5)]
    first = 0
    for url, head in zip(shards.urls, shards.heads, strict=True):
        part = slice(first, first + head.samples)
        note = StoreNote(encoder, "w", head.fingerprint, head.version, head.samples, 4, 0, every=first > 0)
        starts = [*range(head.samples + 1)] if first else None
        write_store(folder / "clip", url, rows[part], np.array(hashes[part], np.uint64), note, starts)
        first += head.samples
    ClipStore(folder / "clip", shards, encoder)
    whole = {path: path.read_bytes() for path in sorted((folder / "clip").iterdir())}
    assert len(whole) == 5
    became = Counter[str]()
    for _ in range(count):
        path = chance.choice(sorted(whole))
        data = spoilt(whole[path], chance)
        path.write_bytes(data)
        try:
            found = ClipStore(folder / "clip", shards, encoder).rows(np.arange(5), hashes)
        except DataError as error:
            became["refused"] += str(folder) in str(error)
        else:
            few = int((found.view(np.uint16) != rows.view(np.uint16)).sum())
            assert few <= (9 if path.suffix == ".npy" else 0), path
            became["read"] += 1
        for each, content in whole.items():  # the catalog is made anew where it was damaged
            each.write_bytes(content)
    assert became.total() == count
    assert min(became["refused"], became["read"]) > count // 10


def run_side_file_fuzz(folder: Path, count: int, seed: int) -> None:
    """Damaged records of captions are refused by line, or give a sample a caption, none, or a cause."""
    chance = random.Random(seed)
    lines = [
        json_bytes(key=f"{n:03d}", caption=[f"one {n}", {"text": f"two {n}", "weight": 2}]) for n in range(9)
    ]
    tables = {"side.jsonl": b"\n".join(lines)}
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"key": [f"{n:03d}" for n in range(9)], "caption": [f"one {n}" for n in range(9)]})
    parquet.write_table(table, folder / "side.parquet")
    tables["side.parquet"] = (folder / "side.parquet").read_bytes()
    became = Counter[str]()
    for number in range(count):
        name = sorted(tables)[number % len(tables)]
        (folder / name).write_bytes(spoilt(tables[name], chance))
        try:
            captions = Captions({"file.caption": 1.0}, str(folder / name))
        except DataError as error:
            became["refused"] += name in str(error)
            continue
        for n in range(9):
            try:
                text, _ = captions.read({}, chance.random(), lambda n=n: f"{n:03d}")  # type: ignore[misc]
            except Unusable:
                became["skipped"] += 1
            else:
                assert text
                became["read"] += 1
    assert min(became["refused"], became["read"]) > 0
    assert became.total() == count + 8 * sum(became[fate] for fate in ("skipped", "read")) // 9


def test_damaged_stores(tmp_path: Path) -> None:
    run_store_fuzz(tmp_path, 60, seed=5)


def test_damaged_side_files(tmp_path: Path) -> None:
    run_side_file_fuzz(tmp_path, 60, seed=6)


@pytest.mark.slow
def test_many_damaged_stores_and_side_files(tmp_path: Path) -> None:
    (tmp_path / "side").mkdir()
    run_store_fuzz(tmp_path, 500, seed=7)
    run_side_file_fuzz(tmp_path / "side", 8000, seed=8)
