"""`glide-ds prepare pack`: a folder or a list of pictures and captions to balanced tar shards.

    glide-ds prepare pack photos/ --out shards/            pictures with texts of the same name, or a metadata.jsonl
    glide-ds prepare pack pairs.jsonl --out shards/        {"image": path, "caption": text, …} a line; .csv, .tsv too
    glide-ds prepare pack pairs.parquet --out shards/      columns image (path or bytes) and caption; folders of them
    glide-ds prepare pack captions_train2017.json …        COCO's captions, beside the folder of its pictures

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
from glide_ds.data.intake import Intake, Pair, Passed, Row, Rows
from glide_ds.data.pictures.decode import DecodeOptions, decode
from glide_ds.data.tally import Cause, Unusable
from glide_ds.data.tars.catalog import CATALOGS, Place, look
from glide_ds.data.tars.storage import Storage
from glide_ds.data.texts.captions import read_caption
from glide_ds.data.workers import end_with
from glide_ds.errors import DataError
from glide_ds.files import replacing, user_path, write_file
from glide_ds.progress import Progress

SHEET, CELL = 8, 96  # the contact sheet has SHEET x SHEET pictures of CELL pixels
NOTE = ".packed.json"
BEFORE = ".before.json"  # there while a run is under way
PACKING = b"3"  # grows when the same input is packed otherwise
EXTENSIONS = {b"\xff\xd8\xff": "jpg", b"\x89PN": "png", b"RIF": "webp", b"GIF": "gif"}


class Packed(NamedTuple):
    """What became of one shard's part of the input."""

    input_hash: str  # of the bytes that the shard was made from; "" while it is being written
    samples: int
    bytes: int
    caption_lengths: list[int]
    skipped: list[str]
    contents: dict[str, str]  # of each sample: where it is in the input, and a hash of its bytes


NOTHING = Packed("", 0, 0, [], [], {})
ROWS = Rows()  # of this process


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=user_path, help="a folder, .jsonl, .csv, .tsv, .json or .parquet")
    parser.add_argument("--out", type=user_path, required=True)
    parser.add_argument("--per_shard", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=4)


def run(args: argparse.Namespace) -> None:
    summary = pack(args.input, args.out, args.per_shard, args.workers)
    print(json.dumps({key: value for key, value in summary.items() if key != "skipped"}, indent=1))
    for line in summary["skipped"][:20]:
        print(f"skipped {line}")
    for line in summary["foreign"][:20]:
        print(f"left as it is, for it was not packed here, yet would be trained on: {line}")
    print(f"Next: glide-ds preflight --ds_config ds_configs/base.json --set data.shards='{args.out}/*.tar'")


def pack(source: Path, out: Path, per_shard: int = 1000, workers: int = 1) -> dict[str, Any]:
    """Make `out` hold the input's shards, their indexes, summary.json and contact.png; returns the summary.

    Shards of an earlier run that the input no longer fills are removed. Raises DataError where no picture can be used;
    where the input has none, `out` stays as it was.
    """
    intake = Intake(source, out)
    pairs = intake.pairs
    if not pairs or per_shard < 1:
        why = "".join(f"; {passed}" for passed in intake.passed[:3])
        raise DataError(
            f"{source} has {len(pairs)} pictures for shards of {per_shard}{why}", remedy="nothing to pack"
        )
    out.mkdir(parents=True, exist_ok=True)
    earlier = _earlier(out)
    count = -(-len(pairs) // per_shard)
    edges = [len(pairs) * n // count for n in range(count + 1)]
    parts = [(out / f"{n:06d}.tar", pairs[edges[n] : edges[n + 1]]) for n in range(count)]
    task = partial(_write_shard, intake.root)
    with Progress("packing", count, "shards") as progress:
        if workers > 1:
            with ProcessPoolExecutor(
                min(workers, count), initializer=end_with, initargs=(os.getpid(),)
            ) as pool:
                packed = list(progress.over(pool.map(task, parts)))
        else:
            packed = list(progress.over(map(task, parts)))
    removed, foreign = _remove_others(out, {path for path, _ in parts})
    summary = _summary(packed, earlier, intake) | {"removed_shards": removed, "foreign": foreign}
    if not summary["samples"]:
        raise DataError(
            f"none of the {len(pairs)} pictures of {source} can be used: {'; '.join(summary['skipped'][:3])}",
            "there is nothing to train on",
            "give each picture a caption, and check that the pictures open",
        )
    write_file(out / "summary.json", json.dumps(summary, indent=1))
    write_file(out / "contact.png", _contact_sheet(pairs, intake.root))
    _write_catalog(out, [str(path) for path, _ in parts])
    (out / BEFORE).unlink()
    return summary


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
                skipped.append(str(Passed(_called(pair, path), _why(error))))
                continue
            lengths.append(len(read_caption(members, 0.0)[0]))
            contents[_place(pair, _hash([image]), contents)] = _hash([image, *members.values()])
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


def _called(pair: Pair, path: Path) -> str:
    if isinstance(pair.image, Row):
        return f"{pair.image.file} row {pair.image.number}"
    return pair.image if isinstance(pair.image, str) else f"a picture for {path.name}"


def _why(error: OSError | Unusable) -> str:
    if isinstance(error, Unusable):
        return f"{error.cause}: {error.detail}" if error.detail else str(error.cause)
    return error.strerror or str(error)


def _digest(root: Path, pairs: Sequence[Pair]) -> str:
    """Of everything that a shard is made from: its pictures' and texts' bytes, and the way they are packed."""

    def parts() -> Iterator[bytes]:
        yield PACKING
        for pair in pairs:
            kinds = [kind for kind, _ in pair.beside]
            yield repr(
                (pair.captions, pair.record, pair.image if isinstance(pair.image, str) else "", kinds)
            ).encode()
            try:
                image, texts = _read(root, pair)
            except OSError as error:
                yield repr(error.errno).encode()
                continue
            yield image
            yield from texts.values()

    return _hash(parts())


def _place(pair: Pair, image: str, taken: Mapping[str, str]) -> str:
    """Where a sample is in the input, as the next run will find it again: its path, or what it is made of."""
    name = pair.image if isinstance(pair.image, str) else image
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


def _write_catalog(out: Path, tars: Sequence[str]) -> None:
    """Write the catalog of these shards, and remove those of what the folder held before."""
    wanted = Path(Place.for_shards(tars, None).urls[0]).name
    for path in out.glob(CATALOGS):
        if path.name != wanted:
            path.unlink()
    look(tars, Storage())


def _read(root: Path, pair: Pair) -> tuple[bytes, dict[str, bytes]]:
    """The picture's bytes and those of the texts beside it, as they are. Raises OSError."""
    if isinstance(pair.image, bytes):
        return pair.image, {}
    if isinstance(pair.image, Row):
        return ROWS.read(pair.image, root), {}
    return (root / pair.image).read_bytes(), {kind: (root / text).read_bytes() for kind, text in pair.beside}


def _members(root: Path, pair: Pair) -> tuple[bytes, dict[str, bytes]]:
    """The picture's bytes, unchanged where training reads them, and the text members. Raises OSError or Unusable."""
    image, texts = _read(root, pair)
    image = _readable(image)
    decode(image, DecodeOptions(16))
    if not pair.captions:
        caption, _ = read_caption(texts, 0.0)
        return image, {kind: text for kind, text in texts.items() if kind == "json"} | {"txt": caption.encode()}
    if len(pair.captions) > 1:  # of which training draws one
        told = {"json": json.dumps({**pair.record, "captions": pair.captions}).encode()}
        read_caption(told, 0.0)
        return image, told
    caption, _ = read_caption({"txt": pair.captions[0].encode("utf-8", "ignore")}, 0.0)
    told = (
        {"json": json.dumps(pair.record, ensure_ascii=False).encode("utf-8", "ignore")} if pair.record else {}
    )
    return image, {"txt": caption.encode()} | told


def _readable(image: bytes) -> bytes:
    """A HEIC picture as JPEG, for training reads no HEIC; any other as it is."""
    if image[4:8] != b"ftyp" or image[8:12] not in (b"heic", b"heix", b"mif1", b"heim", b"hevc", b"msf1"):
        return image
    try:
        import pillow_heif
    except ImportError:
        raise Unusable(
            Cause.UNKNOWN_FORMAT, "HEIC is read by pillow-heif, which is missing: pip install 'glide_ds[pack]'"
        ) from None
    try:
        opened = pillow_heif.open_heif(io.BytesIO(image), convert_hdr_to_8bit=True).to_pillow()
    except (ValueError, OSError, RuntimeError) as error:
        raise Unusable(Cause.CORRUPT_IMAGE, str(error)[:120]) from None
    out = io.BytesIO()
    opened.convert("RGB").save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def _extension(image: bytes) -> str:
    return "avif" if image[4:8] == b"ftyp" else EXTENSIONS.get(image[:3], "img")


def _summary(packed: Sequence[Packed], earlier: Counter[tuple[str, str]], intake: Intake) -> dict[str, Any]:
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
        "skipped": [*map(str, intake.passed), *(line for shard in packed for line in shard.skipped)],
        "other_files": dict(intake.others.most_common()),
    }


def _contact_sheet(pairs: Sequence[Pair], root: Path) -> bytes:
    """PNG of pictures spread evenly over the input, as training would see them."""
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
