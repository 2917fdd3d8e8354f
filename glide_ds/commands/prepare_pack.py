"""`glide-ds prepare pack`: a folder, a jsonl or a parquet of pictures and captions to balanced tar shards.

    glide-ds prepare pack photos/ --out shards/            pictures with a .txt (or .json) of the same name
    glide-ds prepare pack pairs.jsonl --out shards/        {"image": path, "caption": text, …} a line
    glide-ds prepare pack pairs.parquet --out shards/      columns image (path or bytes) and caption

Shard n holds the n-th consecutive part of the input, all parts equal but for one sample, and is written under
its name only when whole. The same input gives the same bytes. A second run is a sync by content: afterwards the folder
holds exactly what the input holds, and the summary says what was added, changed and removed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from glide_ds.commands.prepare_index import index_one
from glide_ds.data.captions import read_caption
from glide_ds.data.pictures.decode import IMAGE_EXTENSIONS, DecodeOptions, decode
from glide_ds.data.tally import Unusable
from glide_ds.data.workers import end_with
from glide_ds.errors import DataError
from glide_ds.files import replacing, write_file
from glide_ds.progress import Progress

IMAGE_FIELDS = ("image", "image_path", "path", "file_name", "filename", "file", "jpg")
TEXT_FIELDS = ("caption", "text", "TEXT", "prompt", "title")
SHEET, CELL = 8, 96  # the contact sheet has SHEET x SHEET pictures of CELL pixels
NOTE = ".packed.json"
BEFORE = ".before.json"  # there while a run is under way
PACKING = b"2"  # grows when the same input is packed otherwise
EXTENSIONS = {b"\xff\xd8\xff": "jpg", b"\x89PN": "png", b"RIF": "webp", b"GIF": "gif"}


class Pair(NamedTuple):
    """One input sample, not yet read: where its picture is, and its text."""

    image: str | bytes
    caption: str | None  # None: in a file beside the picture
    record: dict[str, Any]


class Packed(NamedTuple):
    """What became of one shard's part of the input."""

    input_hash: str  # of the bytes that the shard was made from; "" while it is being written
    samples: int
    bytes: int
    caption_lengths: list[int]
    skipped: list[str]
    contents: dict[str, str]  # of each sample: where it is in the input, and a hash of its bytes


NOTHING = Packed("", 0, 0, [], [], {})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help="a folder, a .jsonl or a .parquet")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per_shard", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=4)


def run(args: argparse.Namespace) -> None:
    summary = pack(args.input, args.out, args.per_shard, args.workers)
    print(json.dumps({key: value for key, value in summary.items() if key != "skipped"}, indent=1))
    for line in summary["skipped"][:20]:
        print(f"skipped {line}")
    for line in summary["foreign"][:20]:
        print(f"left as it is, for it was not packed here, yet would be trained on: {line}")


def pack(source: Path, out: Path, per_shard: int = 1000, workers: int = 1) -> dict[str, Any]:
    """Make `out` hold the input's shards, their indexes, summary.json and contact.png; returns the summary.

    Shards of an earlier run that the input no longer fills are removed. Raises DataError where no picture can be used;
    where the input has none, `out` stays as it was.
    """
    pairs = list(read_pairs(source))
    if not pairs or per_shard < 1:
        raise DataError(
            f"{source} has {len(pairs)} pictures for shards of {per_shard}", remedy="nothing to pack"
        )
    out.mkdir(parents=True, exist_ok=True)
    earlier = _earlier(out)
    count = -(-len(pairs) // per_shard)
    edges = [len(pairs) * n // count for n in range(count + 1)]
    parts = [(out / f"{n:06d}.tar", pairs[edges[n] : edges[n + 1]]) for n in range(count)]
    task = partial(_write_shard, source.parent if source.is_file() else source)
    with Progress("packing", count, "shards") as progress:
        if workers > 1:
            with ProcessPoolExecutor(
                min(workers, count), initializer=end_with, initargs=(os.getpid(),)
            ) as pool:
                packed = list(progress.over(pool.map(task, parts)))
        else:
            packed = list(progress.over(map(task, parts)))
    removed, foreign = _remove_others(out, {path for path, _ in parts})
    summary = _summary(packed, earlier) | {"removed_shards": removed, "foreign": foreign}
    if not summary["samples"]:
        raise DataError(
            f"none of the {len(pairs)} pictures of {source} can be used: {'; '.join(summary['skipped'][:3])}",
            "there is nothing to train on",
            "give each picture a caption, and check that the pictures open",
        )
    write_file(out / "summary.json", json.dumps(summary, indent=1))
    write_file(out / "contact.png", _contact_sheet(pairs, source))
    (out / BEFORE).unlink()
    return summary


# ---- input


def read_pairs(source: Path) -> Iterator[Pair]:
    """The input's pairs in a fixed order. Raises DataError where it is of no known kind or lacks its fields."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS:
                yield Pair(str(path.relative_to(source)), None, {})
    elif source.suffix == ".jsonl":
        for number, line in enumerate(source.read_text("utf-8").splitlines(), 1):
            if line.strip():
                yield _pair(_json_line(source, number, line), f"{source} line {number}")
    elif source.suffix == ".parquet":
        for number, record in enumerate(_parquet_rows(source)):
            yield _pair(record, f"{source} row {number}")
    else:
        raise DataError(f"{source} is no folder, .jsonl or .parquet that exists", remedy="name one of these")


def _json_line(source: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{source} line {number} is no JSON: {error}", remedy="correct it") from error
    if not isinstance(record, dict):
        raise DataError(f"{source} line {number} is no JSON object", remedy="give it an image and a caption")
    return record


def _parquet_rows(source: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet  # optional: nothing else needs it
    except ImportError as error:
        raise DataError(f"reading {source} needs pyarrow", remedy="pip install pyarrow") from error
    for batch in parquet.ParquetFile(source).iter_batches():
        yield from batch.to_pylist()


def _pair(record: dict[str, Any], where: str) -> Pair:
    image = next((record[name] for name in IMAGE_FIELDS if record.get(name) is not None), None)
    if isinstance(image, dict):  # Hugging Face's image column
        image = image.get("bytes") or image.get("path")
    text = next((record[name] for name in TEXT_FIELDS if isinstance(record.get(name), str)), None)
    if not isinstance(image, str | bytes) or text is None:
        raise DataError(
            f"{where} has the fields {', '.join(record)}",
            remedy=f"it needs one of {', '.join(IMAGE_FIELDS)} and one of {', '.join(TEXT_FIELDS)}",
        )
    rest = {
        k: v for k, v in record.items() if k not in IMAGE_FIELDS and isinstance(v, str | int | float | bool)
    }
    return Pair(image, text, rest)


# ---- output


def _write_shard(root: Path, part: tuple[Path, Sequence[Pair]]) -> Packed:
    path, pairs = part
    note = path.with_suffix(NOTE)
    digest = _digest(root, pairs)
    earlier = _read_note(note)
    if earlier and earlier.input_hash == digest and path.exists() and path.stat().st_size == earlier.bytes:
        return earlier
    write_file(note, json.dumps(NOTHING._asdict()))  # a tar that is left without its end is known as ours
    lengths, skipped, contents = [], [], dict[str, str]()
    with replacing(path) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, pair in enumerate(pairs):
            try:
                image, members = _members(root, pair)
            except (OSError, Unusable) as error:
                skipped.append(f"{pair.image if isinstance(pair.image, str) else path.name}: {error}")
                continue
            lengths.append(len(members["txt"].decode()))
            contents[_place(pair, contents)] = _hash([image, *members.values()])
            for extension, data in ({_extension(image): image} | members).items():
                info = tarfile.TarInfo(f"{path.stem}{number:06d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    packed = Packed(digest, len(lengths), path.stat().st_size, lengths, skipped, contents)
    index_one(str(path), force=True)
    write_file(note, json.dumps(packed._asdict()))
    return packed


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _digest(root: Path, pairs: Sequence[Pair]) -> str:
    """Of everything that a shard is made from: its pictures' and texts' bytes, and the way they are packed."""

    def parts() -> Iterator[bytes]:
        yield PACKING
        for pair in pairs:
            yield repr((pair.caption, pair.record, pair.image if isinstance(pair.image, str) else "")).encode()
            try:
                image, texts = _read(root, pair)
            except OSError as error:
                yield repr(error.errno).encode()
                continue
            yield image
            for extension, text in texts.items():
                yield extension.encode()
                yield text

    return _hash(parts())


def _place(pair: Pair, taken: Mapping[str, str]) -> str:
    """Where a sample is in the input, as the next run will find it again: its path, or what it is made of."""
    name = pair.image if isinstance(pair.image, str) else _hash([pair.image])
    number = 1
    while (place := f"{name}#{number}" if number > 1 else name) in taken:
        number += 1
    return place


def _read_note(note: Path) -> Packed | None:
    try:
        return Packed(**json.loads(note.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):  # or of a version before, or damaged: packed again
        return None


def _earlier(out: Path) -> Counter[tuple[str, str]]:
    """The samples that the folder held when a run was last done: place and hash. A killed one has changed its notes."""
    kept = out / BEFORE
    if not kept.exists():
        notes = (_read_note(note) for note in out.glob(f"*{NOTE}"))
        samples = [sample for packed in notes if packed for sample in packed.contents.items()]
        write_file(kept, json.dumps(samples))
    return Counter((place, content) for place, content in json.loads(kept.read_bytes()))


def _remove_others(out: Path, wanted: set[Path]) -> tuple[int, list[str]]:
    """Remove the shards that an earlier run packed and this one did not; (how many, those of somebody else)."""
    removed, foreign = 0, []
    for note in sorted(out.glob(f"*{NOTE}")):
        tar = note.with_name(note.name.removesuffix(NOTE) + ".tar")
        if tar in wanted:
            continue
        removed += tar.exists()
        for path in (
            tar,
            Path(f"{tar}.index"),
            note,
        ):  # the note last: without it the tar would be a stranger's
            path.unlink(missing_ok=True)
    for tar in sorted(out.glob("*.tar")):
        if tar not in wanted:
            foreign.append(str(tar))
    return removed, foreign


def _read(root: Path, pair: Pair) -> tuple[bytes, dict[str, bytes]]:
    """The picture's bytes and those of the texts beside it, as they are. Raises OSError."""
    if isinstance(pair.image, bytes):
        return pair.image, {}
    beside = root / pair.image
    image = beside.read_bytes()
    if pair.caption is not None:
        return image, {}
    names = {extension: beside.with_suffix(f".{extension}") for extension in ("txt", "json")}
    return image, {extension: name.read_bytes() for extension, name in names.items() if name.exists()}


def _members(root: Path, pair: Pair) -> tuple[bytes, dict[str, bytes]]:
    """The picture's bytes, unchanged, and the text members. Raises OSError or Unusable."""
    image, texts = _read(root, pair)
    decode(image, DecodeOptions(16))
    if pair.caption is not None:
        caption, _ = read_caption({"txt": pair.caption.encode()}, 0.0)
        return image, {"txt": caption.encode()} | (
            {"json": json.dumps(pair.record, ensure_ascii=False).encode()} if pair.record else {}
        )
    caption, _ = read_caption(texts, 0.0)
    return image, {**texts, "txt": caption.encode()}


def _extension(image: bytes) -> str:
    return EXTENSIONS.get(image[:3], "img")


def _summary(packed: Sequence[Packed], earlier: Counter[tuple[str, str]]) -> dict[str, Any]:
    now = Counter(sample for shard in packed for sample in shard.contents.items())
    come, gone = now - earlier, earlier - now
    changed = {place for place, _ in come} & {place for place, _ in gone}
    lengths = np.array([length for shard in packed for length in shard.caption_lengths] or [0])
    return {
        "shards": len(packed),
        "samples": sum(shard.samples for shard in packed),
        "added": come.total() - len(changed),
        "changed": len(changed),
        "removed": gone.total() - len(changed),
        "bytes": sum(shard.bytes for shard in packed),
        "samples_per_shard": [min(s.samples for s in packed), max(s.samples for s in packed)],
        "caption_characters": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "max": int(lengths.max()),
        },
        "skipped": [line for shard in packed for line in shard.skipped],
    }


def _contact_sheet(pairs: Sequence[Pair], source: Path) -> bytes:
    """PNG of pictures spread evenly over the input, as training would see them."""
    root = source.parent if source.is_file() else source
    sheet = np.full((SHEET * CELL, SHEET * CELL, 3), 255, np.uint8)
    chosen = [pairs[len(pairs) * n // SHEET**2] for n in range(min(len(pairs), SHEET**2))]
    for number, pair in enumerate(chosen):
        try:
            pixels = decode(_members(root, pair)[0], DecodeOptions(CELL))
        except (OSError, Unusable):
            continue
        top, left = (number // SHEET) * CELL, (number % SHEET) * CELL
        sheet[top : top + CELL, left : left + CELL] = pixels
    out = io.BytesIO()
    Image.fromarray(sheet).save(out, "PNG")
    return out.getvalue()
