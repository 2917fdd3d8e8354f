"""Damaged inputs of every kind: no crash, no hang, no lost slot, none uncounted.

    python tests/data/fuzz.py --count 20000 --seed 1                 all kinds, each its share
    python tests/data/fuzz.py --count 3000 --kinds tars streams      in pieces; --out writes the counts as JSON

What becomes of an input is one of a few fates, which are counted; anything else ends the script, and so does an input
that takes longer than LIMIT_S.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import gzip
import io
import json
import lzma
import random
import signal
import struct
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from data_kit import encoded, json_bytes, photo, sample, source, take, write_shards, write_tar

from glide_ds.data.clip_notes import Encoder, StoreNote
from glide_ds.data.clip_store import ClipStore, text_hash, write_store
from glide_ds.data.packing.intake import Intake
from glide_ds.data.tally import Cause, Unusable
from glide_ds.data.tars.shards import open_shards
from glide_ds.data.tars.storage import Storage
from glide_ds.data.tars.stream import Damaged, members
from glide_ds.data.texts.recaptions import Captions
from glide_ds.errors import DataError

LIMIT_S = 20  # for one input
Fates = Counter[str]  # how many inputs met each


@contextmanager
def in_time(what: str) -> Iterator[None]:
    """Raise where the body takes longer than LIMIT_S of this process's time."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"{what} takes more than {LIMIT_S} s")

    signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


# ---- samples: pictures, records, captions

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


def fuzz_samples(folder: Path, count: int, seed: int, workers: int = 0) -> Fates:
    """Exactly the slots of what is bad are filled with what is good, and the report counts each by its cause."""
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
            with in_time(f"{kind} {number} of seed {seed}"):
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
    assert all(report["skipped"][cause] >= times for cause, times in met.items())
    became = Fates(str(fate or "read") for fate in fates)
    became["read"] -= GOOD
    return became


# ---- tars, read by index and as streams, and what is noted of them


def broken_tar(whole: bytes, chance: random.Random) -> bytes:
    """Cut short, with bytes changed, a hole, a part twice, or several of these."""
    data = bytearray(whole[: chance.randrange(600, len(whole))] if chance.random() < 0.4 else whole)
    for _ in range(chance.choice([0, 1, 3, 30])):
        data[chance.randrange(len(data))] = chance.randrange(256)
    if chance.random() < 0.2:
        first = chance.randrange(0, len(data), 512)
        size = 512 * chance.randint(1, 6)
        data[first : first + size] = bytes(size) if chance.random() < 0.5 else data[:size]
    if chance.random() < 0.1:
        data += chance.choice([bytes(3 * 10240), whole, noise(700, chance), b"\0" * 100])
    return bytes(data)


def an_octet_tar(folder: Path) -> bytes:
    return write_tar(folder / "t.tar", [(f"{n}", sample(n)) for n in range(8)]).read_bytes()


def fuzz_tars(folder: Path, count: int, seed: int) -> Fates:
    """Damage is named, and salvaging gives what is whole; what is called sound has all of its samples."""
    chance, whole, became = random.Random(seed), an_octet_tar(folder), Fates()
    path = folder / "x.tar"
    for number in range(count):
        path.write_bytes(broken_tar(whole, chance))
        for salvage in (False, True):
            for old in folder.glob("x.tar.*"):
                old.unlink()
            index = str(folder / "index" / f"{number} {salvage}")
            try:
                with in_time(f"tar {number} of seed {seed}"):
                    opened = open_shards(str(path), index, salvage=salvage)
                    found = [opened.read(n) for n in range(len(opened))]
            except DataError as error:
                if path.name not in str(error):
                    raise
                fate = "nothing to salvage"
            else:
                assert all(found)
                fate = "salvaged" if salvage else "read"
                break
        became[fate] += 1
    assert became.total() == count
    return became


def fuzz_streams(folder: Path, count: int, seed: int) -> Fates:
    """A stream is damaged, no tar, or gives whole members to its end."""
    chance, whole, became = random.Random(seed), an_octet_tar(folder), Fates()
    packs: list[Callable[[bytes], bytes]] = [bytes, gzip.compress, bz2.compress, lzma.compress]
    path = folder / "x.bin"
    for number in range(count):
        pack = packs[number % len(packs)]
        data = pack(broken_tar(whole, chance)) if chance.random() < 0.5 else spoilt(pack(whole), chance)
        path.write_bytes(data)
        got = 0
        try:
            with in_time(f"stream {number} of seed {seed}"):
                for _ in members(str(path), Storage()):
                    got += 1
        except Damaged:
            became["damaged"] += 1
        except DataError as error:
            if path.name not in str(error):
                raise
            became["no tar"] += 1
        else:
            became["read"] += 1
    assert became.total() == count
    return became


def fuzz_notes(folder: Path, count: int, seed: int, kind: str) -> Fates:
    """Whatever becomes of a catalog or an index: the same set, a line that says so, and the file made anew."""
    chance, became = random.Random(seed), Fates()
    pattern = write_shards(folder, [2, 3])
    before = open_shards(pattern)
    path = sorted(folder.glob(f"*.{kind}"))[0]
    catalogs = list(folder.glob("*.catalog"))
    whole = path.read_bytes()
    for number in range(count):
        data = spoilt(whole, chance)
        path.write_bytes(data)
        for catalog in catalogs if kind == "index" else []:  # which would make the index's head needless
            catalog.unlink(missing_ok=True)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), in_time(f"{kind} {number} of seed {seed}"):
            again = open_shards(pattern)
            found = [again.read(n) for n in range(len(again))]
        assert [*again.heads] == [*before.heads]
        assert len(found) == 5
        if kind == "catalog":
            assert f"{path} is " in said.getvalue() or data == whole
        assert path.read_bytes() == whole
        became["read" if data == whole else "made anew"] += 1
    return became


# ---- stores and captions


def spoilt(whole: bytes, chance: random.Random) -> bytes:
    """Cut short, with bytes changed, or both."""
    data = bytearray(whole[: chance.randrange(len(whole))] if chance.random() < 0.4 else whole)
    for _ in range(chance.randint(0, 9)):
        if data:
            data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
    return bytes(data)


def fuzz_stores(folder: Path, count: int, seed: int) -> Fates:
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
    became = Fates()
    for number in range(count):
        path = chance.choice(sorted(whole))
        data = spoilt(whole[path], chance)
        path.write_bytes(data)
        try:
            with in_time(f"store {number} of seed {seed}"):
                found = ClipStore(folder / "clip", shards, encoder).rows(np.arange(5), hashes)
        except DataError as error:
            if str(folder) not in str(error):
                raise
            became["refused"] += 1
        else:
            few = int((found.view(np.uint16) != rows.view(np.uint16)).sum())
            assert few <= (9 if path.suffix == ".npy" else 0), path
            became["read"] += 1
        for each, content in whole.items():  # the catalog is made anew where it was damaged
            each.write_bytes(content)
    assert became.total() == count
    return became


def fuzz_side_files(folder: Path, count: int, seed: int) -> Fates:
    """Damaged records of captions are refused by line, or give a sample a caption, none, or a cause."""
    import pyarrow
    from pyarrow import parquet

    chance = random.Random(seed)
    lines = [
        json_bytes(key=f"{n:03d}", caption=[f"one {n}", {"text": f"two {n}", "weight": 2}]) for n in range(9)
    ]
    tables = {"side.jsonl": b"\n".join(lines)}
    table = pyarrow.table({"key": [f"{n:03d}" for n in range(9)], "caption": [f"one {n}" for n in range(9)]})
    parquet.write_table(table, folder / "side.parquet")
    tables["side.parquet"] = (folder / "side.parquet").read_bytes()
    became = Fates()
    for number in range(count):
        name = sorted(tables)[number % len(tables)]
        (folder / name).write_bytes(spoilt(tables[name], chance))
        try:
            with in_time(f"side file {number} of seed {seed}"):
                captions = Captions({"file.caption": 1.0}, str(folder / name))
        except DataError as error:
            if name not in str(error):
                raise
            became["refused"] += 1
            continue
        fate = "read"
        for n in range(9):
            try:
                text, _ = captions.read({}, chance.random(), partial(f"{n:03d}".format))
            except Unusable:
                fate = "read in part"
            else:
                assert text
        became[fate] += 1
    assert became.total() == count
    return became


# ---- what is to be packed


def fuzz_lists(folder: Path, count: int, seed: int) -> Fates:
    """A damaged list of pictures is refused by name, or each of its records is a pair or passed over."""
    from pyarrow import Table, parquet

    chance, became = random.Random(seed), Fates()
    records = [{"image": f"{n}.png", "caption": f"photo {n}"} for n in range(9)]
    for n in range(9):
        (folder / f"{n}.png").write_bytes(encoded(photo(n)))
    parquet.write_table(Table.from_pylist(records), folder / "p.parquet")
    coco = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(9)],
        "annotations": [{"image_id": n, "caption": f"photo {n}"} for n in range(9)],
    }
    lists = {
        "p.jsonl": b"\n".join(json_bytes(**record) for record in records),
        "p.csv": b"image,caption\n" + b"\n".join(f"{n}.png,photo {n}".encode() for n in range(9)),
        "p.json": json_bytes(**coco),
        "p.parquet": (folder / "p.parquet").read_bytes(),
    }
    for number in range(count):
        name = sorted(lists)[number % len(lists)]
        (folder / name).write_bytes(spoilt(lists[name], chance))
        try:
            with in_time(f"list {number} of seed {seed}"):
                intake = Intake(folder / name)
        except DataError as error:
            if name not in str(error):
                raise
            became["refused"] += 1
        else:
            assert all(pair.captions for pair in intake.pairs)
            assert all(str(passed) for passed in intake.passed)
            became["read" if len(intake.pairs) == 9 else "read in part"] += 1
    assert became.total() == count
    return became


# ---- all together

# Of a thousand inputs.
SHARES: dict[str, int] = {
    "samples": 400,
    "tars": 150,
    "streams": 100,
    "catalogs": 50,
    "indexes": 50,
    "stores": 50,
    "side files": 100,
    "lists": 100,
}
FUZZERS: dict[str, Callable[[Path, int, int], Fates]] = {
    "samples": fuzz_samples,
    "tars": fuzz_tars,
    "streams": fuzz_streams,
    "catalogs": lambda folder, count, seed: fuzz_notes(folder, count, seed, "catalog"),
    "indexes": lambda folder, count, seed: fuzz_notes(folder, count, seed, "index"),
    "stores": fuzz_stores,
    "side files": fuzz_side_files,
    "lists": fuzz_lists,
}
AT_ONCE = 1000  # inputs in a folder


def fuzz(kinds: Sequence[str], count: int, seed: int) -> dict[str, Fates]:
    """The fates of `count` inputs of these kinds, by kind."""
    became: dict[str, Fates] = {}
    shares = {kind: count * SHARES[kind] / sum(SHARES[each] for each in kinds) for kind in kinds}
    for kind in kinds:
        began, left, became[kind] = time.monotonic(), round(shares[kind]), Fates()
        for turn in range(-(-left // AT_ONCE)):
            with tempfile.TemporaryDirectory() as folder:
                became[kind] += FUZZERS[kind](Path(folder), min(AT_ONCE, left), seed + turn)
            left -= AT_ONCE
        print(
            f"{kind}: {became[kind].total()} {dict(became[kind])} {time.monotonic() - began:.0f} s", flush=True
        )
    print(f"{sum(fates.total() for fates in became.values())} damaged inputs, all counted", flush=True)
    return became


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--out", type=Path, help="write the counts here as JSON")
    args = parser.parse_args()
    became = fuzz(args.kinds, args.count, args.seed)
    if args.out:
        args.out.write_text(json.dumps({"seed": args.seed, **became}, indent=1) + "\n")


if __name__ == "__main__":
    main()
