"""Pictures and captions to balanced tar shards, and a part of them set aside as held-out shards.

Shard n holds the n-th consecutive part of the input, all parts equal but for one sample, and is written under
its name only when whole. The same input gives the same bytes. A second run is a sync by content: afterwards the folder
holds exactly what the input holds, and the summary says what was added, changed and removed.

Which pictures are held out follows from their bytes alone, so that one stays where it is whatever comes and goes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from glide_ds.data.packing.intake import Intake, Pair, Passed, Row, Rows, file_bytes
from glide_ds.data.pictures.decode import DecodeOptions, decode
from glide_ds.data.tally import Cause, Unusable
from glide_ds.data.tars.catalog import CATALOGS, Place, look
from glide_ds.data.tars.index import scan_shard, store_index
from glide_ds.data.tars.storage import Storage
from glide_ds.data.tars.writing import writing_shard
from glide_ds.data.texts.captions import read_caption
from glide_ds.data.workers import end_with
from glide_ds.errors import DataError
from glide_ds.files import check_place, write_file
from glide_ds.progress import Progress

SHEET, CELL = 8, 96  # the contact sheet has SHEET x SHEET pictures of CELL pixels
HELD_OUT = "held-out"  # a folder beside the shards that are trained on
SHARE = ".hold_out"  # in it: the share that was asked for
NOTE = ".packed.json"
BEFORE = ".before.json"  # there while a run is under way
PACKING = b"4"  # grows when the same input is packed otherwise
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

T = TypeVar("T")
R = TypeVar("R")


def pack(
    source: Path,
    out: Path,
    per_shard: int = 1000,
    workers: int = 1,
    *,
    hold_out: float | None = None,
    only: Container[str] | None = None,
) -> dict[str, Any]:
    """Make `out` hold the input's shards, their indexes, summary.json and contact.png; returns the summary.

    `hold_out` is the share of the pictures that goes to shards in `out`/held-out instead; None: the share that `out`
    was packed with, else none. `only`: the pictures to take, by absolute path. Shards of an earlier run that the input
    no longer fills are removed. Raises DataError where no picture can be used, and where `out` was packed with another
    share; where the input has none, `out` stays as it was.
    """
    intake = Intake(source, out)
    pairs = [pair for pair in intake.pairs if only is None or str(intake.root / str(pair.image)) in only]
    if not pairs or per_shard < 1:
        why = "".join(f"; {passed}" for passed in intake.passed[:3])
        raise DataError(
            f"{source} has {len(pairs)} pictures for shards of {per_shard}{why}", remedy="nothing to pack"
        )
    share, late = _share(out, hold_out)
    held: list[Pair] = []
    if share:
        held, pairs = _parted(intake.root, pairs, share, workers)
        if not pairs:
            raise DataError(
                f"--hold_out {share} sets all {len(held)} pictures of {source} aside",
                "none is left to train on",
                "give a smaller share, or more pictures",
            )
    packed = _fill(out, pairs, intake.root, per_shard, workers)
    summary = {
        **packed.summary(),
        "skipped": [*map(str, intake.passed), *packed.skipped],
        "other_files": dict(intake.others.most_common()),
    }
    if share:
        aside = _fill(out / HELD_OUT, held, intake.root, per_shard, workers)
        summary["skipped"] += aside.skipped
        summary["held_out"] = {"share": share, **aside.summary(), "trained_before": late and bool(held)}
        (out / HELD_OUT / BEFORE).unlink()
    if not summary["samples"]:
        raise DataError(
            f"none of the {len(pairs)} pictures of {source} can be used: {'; '.join(summary['skipped'][:3])}",
            "there is nothing to train on",
            "give each picture a caption, and check that the pictures open",
        )
    write_file(out / "summary.json", json.dumps(summary, indent=1))
    write_file(out / "contact.png", _contact_sheet(pairs, intake.root))
    (out / BEFORE).unlink()
    return summary


# ---- held out


def _share(out: Path, asked: float | None) -> tuple[float, bool]:
    """(the share to hold out, whether shards were packed here before there was one). Raises DataError."""
    note = out / HELD_OUT / SHARE
    before = float(note.read_text()) if note.exists() else None
    if asked and not any(note.parent.glob("*.tar")):  # nothing was held out yet
        before = None
    if asked is not None and not 0 <= asked < 1:
        raise DataError(
            f"--hold_out {asked} is no share", remedy="give a number from 0 to below 1, such as 0.02"
        )
    if before is not None and asked is not None and asked != before:
        raise DataError(
            f"--hold_out {asked}, but {out} was packed with {before}",
            "pictures that were held out would be trained on, or the other way round",
            f"give {before}, or none, or another folder for --out",
        )
    check_place(out)
    if before is not None or not asked:
        return before or 0.0, False
    (out / HELD_OUT).mkdir(parents=True, exist_ok=True)
    write_file(note, f"{asked}\n")
    return asked, any(out.glob(f"*{NOTE}"))


def _parted(root: Path, pairs: Sequence[Pair], share: float, workers: int) -> tuple[list[Pair], list[Pair]]:
    """(the pairs that are held out, the others)."""
    parts = [pairs[first : first + 1000] for first in range(0, len(pairs), 1000)]
    with Progress("setting aside", len(parts), "parts") as progress:
        found = _mapped(partial(_are_held_out, root, share), parts, workers, progress)
        sides = [side for part in found for side in part]
    sided = list(zip(pairs, sides, strict=True))
    return [pair for pair, held in sided if held], [pair for pair, held in sided if not held]


def _are_held_out(root: Path, share: float, pairs: Sequence[Pair]) -> list[bool]:
    sides = []
    for pair in pairs:
        try:
            image = _image(root, pair)
        except OSError:  # which the writing of its shard will tell
            image = None
        sides.append(image is not None and is_held_out(image, share))
    return sides


def is_held_out(image: bytes, share: float) -> bool:
    """Whether a picture of these bytes is in the `share` that is held out: whatever its name, caption and company."""
    number = int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "little")
    return number < share * 2**64


# ---- output


class Filled(NamedTuple):
    """What became of a folder of shards."""

    packed: list[Packed]
    earlier: Counter[tuple[str, str]]
    removed_shards: int
    foreign: list[str]

    @property
    def skipped(self) -> list[str]:
        return [line for shard in self.packed for line in shard.skipped]

    def summary(self) -> dict[str, Any]:
        now = Counter(sample for shard in self.packed for sample in shard.contents.items())
        come, gone = now - self.earlier, self.earlier - now
        changed = {place for place, _ in come} & {place for place, _ in gone}
        lengths = np.array([length for shard in self.packed for length in shard.caption_lengths] or [0])
        sizes = [shard.samples for shard in self.packed] or [0]
        return {
            "shards": len(self.packed),
            "samples": sum(sizes),
            "added": come.total() - len(changed),
            "changed": len(changed),
            "removed": gone.total() - len(changed),
            "bytes": sum(shard.bytes for shard in self.packed),
            "samples_per_shard": [min(sizes), max(sizes)],
            "caption_characters": {
                "min": int(lengths.min()),
                "median": float(np.median(lengths)),
                "max": int(lengths.max()),
            },
            "removed_shards": self.removed_shards,
            "foreign": self.foreign,
        }


def _fill(out: Path, pairs: Sequence[Pair], root: Path, per_shard: int, workers: int) -> Filled:
    """Make `out` hold the shards of these pairs and no other that was packed here."""
    out.mkdir(parents=True, exist_ok=True)
    earlier = _earlier(out)
    count = -(-len(pairs) // per_shard)
    edges = [len(pairs) * n // count for n in range(count + 1)] if count else []
    parts = [(out / f"{n:06d}.tar", pairs[edges[n] : edges[n + 1]]) for n in range(count)]
    with Progress("packing", count, "shards") as progress:
        packed = list(_mapped(partial(_write_shard, root), parts, workers, progress))
    removed, foreign = _remove_others(out, {path for path, _ in parts})
    _write_catalog(out, [str(path) for path, _ in parts])
    return Filled(packed, earlier, removed, foreign)


def _mapped(task: Callable[[T], R], parts: Sequence[T], workers: int, progress: Progress) -> Iterator[R]:
    if workers <= 1 or len(parts) <= 1:
        yield from progress.over(map(task, parts))
        return
    with ProcessPoolExecutor(min(workers, len(parts)), initializer=end_with, initargs=(os.getpid(),)) as pool:
        yield from progress.over(pool.map(task, parts))


def _write_shard(root: Path, part: tuple[Path, Sequence[Pair]]) -> Packed:
    path, pairs = part
    note = path.with_suffix(NOTE)
    digest = _digest(root, pairs)
    earlier = _read_note(note)
    if earlier and earlier.input_hash == digest and path.exists() and path.stat().st_size == earlier.bytes:
        return earlier
    write_file(note, json.dumps(NOTHING._asdict()))  # a tar that is left without its end is known as ours
    lengths, skipped, contents = [], [], dict[str, str]()
    with writing_shard(path) as add:
        for number, pair in enumerate(pairs):
            try:
                image, members = _members(root, pair)
            except (OSError, Unusable) as error:
                skipped.append(str(Passed(_called(pair, path), _why(error))))
                continue
            lengths.append(len(read_caption(members, 0.0)[0]))
            contents[_place(pair, _hash([image]), contents)] = _hash([image, *members.values()])
            add(f"{path.stem}{number:06d}", {_extension(image): image} | members)
    packed = Packed(digest, len(lengths), path.stat().st_size, lengths, skipped, contents)
    store_index(str(path), scan_shard(str(path)), Storage(), beside=True)
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
    wanted = Path(Place.for_shards(tars, None).urls[0]).name if tars else ""
    for path in out.glob(CATALOGS):
        if path.name != wanted:
            path.unlink()
    if tars:
        look(tars, Storage())


def _read(root: Path, pair: Pair) -> tuple[bytes, dict[str, bytes]]:
    """The picture's bytes and those of the texts beside it, as they are. Raises OSError."""
    return _image(root, pair), {kind: file_bytes(root / text) for kind, text in pair.beside}


def _image(root: Path, pair: Pair) -> bytes:
    if isinstance(pair.image, bytes):
        return pair.image
    return ROWS.read(pair.image, root) if isinstance(pair.image, Row) else file_bytes(root / pair.image)


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
