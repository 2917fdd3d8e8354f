"""The pictures and captions that people have, in the forms they have them in: what `prepare pack` makes shards of.

A folder of pictures with texts beside them or a metadata file of Hugging Face's imagefolder; JSON lines, CSV, TSV,
COCO's captions; parquet, a file or a folder of them, with paths, bytes or Hugging Face's {bytes, path}. What is wrong
with one record is that record's fault, told and passed over.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from glide_ds.data.pictures.decode import IMAGE_EXTENSIONS
from glide_ds.data.tally import Unusable
from glide_ds.data.tars.storage import reading
from glide_ds.data.texts.captions import loads
from glide_ds.data.texts.encodings import decode_text
from glide_ds.errors import DataError

IMAGE_FIELDS = (
    "image",
    "image_path",
    "path",
    "file_name",
    "filename",
    "file",
    "filepath",
    "jpg",
    "png",
    "webp",
    "img",
)
TEXT_FIELDS = ("caption", "captions", "text", "prompt", "title", "description", "alt")
BESIDE = (
    "txt",
    "text",
    "caption",
    "json",
)  # endings of a picture's texts; the first three stand for one another
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv")
RECORDS = (".jsonl", ".ndjson", ".csv", ".tsv", ".json", ".parquet")
ROWS = 16  # of a parquet file in memory at once: a picture takes some 100 KB
HEIF = ("heic", "heif", "hif")
# Pictures that nobody can read without knowing what is wanted of them.
REFUSED = {
    **dict.fromkeys(
        ("svg", "svgz", "eps", "ai", "pdf"), "drawings have no pixels of their own; draw them as PNG"
    ),
    **dict.fromkeys(
        ("cr2", "cr3", "nef", "arw", "dng", "raf", "orf", "rw2", "pef", "srw", "raw"),
        "a camera's raw data has no colours yet; develop it to JPEG or TIFF",
    ),
    **dict.fromkeys(("psd", "xcf", "kra", "clip"), "a program's own file; export it as PNG"),
    **dict.fromkeys(
        ("jxl", "jp2", "j2k", "exr", "hdr", "tga", "ico"), "a format that isn't read; convert it to PNG"
    ),
}

csv.field_size_limit(1 << 30)


class Row(NamedTuple):
    """A picture's bytes in a parquet file, to be read when they are wanted."""

    file: str
    number: int
    column: str


class Pair(NamedTuple):
    """One input sample, not yet read: where its picture is, and its text."""

    image: str | bytes | Row
    captions: tuple[str, ...]  # none: in the texts beside the picture
    record: dict[str, Any]
    beside: tuple[tuple[str, str], ...] = ()  # (ending, path) of the texts


class Passed(NamedTuple):
    """One that can't be a sample."""

    what: str
    why: str

    def __str__(self) -> str:
        # A file's name may be of bytes that are no text.
        return f"{self.what}: {self.why}".encode("utf-8", "backslashreplace").decode()


class Intake:
    """The pairs of an input in a fixed order, and what was passed over on the way."""

    def __init__(self, source: Path, out: Path | None = None) -> None:
        """`out` lies within the input at times, and is no part of it.

        Raises DataError where the input as a whole can't be read, SurroundingsError where its disk can't.
        """
        self.root = source if source.is_dir() else source.parent
        self.passed: list[Passed] = []
        self.others: Counter[str] = Counter()  # files that are neither pictures nor texts, by ending
        self._out = out.resolve() if out else None
        if self._out == source.resolve():
            raise DataError(
                f"--out {out} is the input itself",
                "its shards would be packed again",
                "name another folder for --out",
            )
        with reading(str(source)):
            self.pairs = list(self._read(source))

    def _read(self, source: Path) -> Iterator[Pair]:
        if source.is_dir():
            yield from self._folder(source)
        elif source.is_file() and source.suffix.lower() in RECORDS:
            yield from self._records(source, self.root)
        else:
            ending = "" if source.exists() else "; it does not exist"
            raise DataError(
                f"{source} is no folder, .jsonl, .csv, .tsv, .json or .parquet that exists{ending}",
                remedy="name one of these",
            )

    # ---- folders

    def _folder(self, source: Path) -> Iterator[Pair]:
        found = False
        tables, tars = [], []
        for place, names in walk(source, self._out):
            told = self._metadata(place, names)
            by_lower = {unicodedata.normalize("NFC", name).lower(): name for name in names}
            for name in names:
                ending = os.path.splitext(name)[1].lower().lstrip(".")
                if ending in REFUSED:
                    self.passed.append(
                        Passed(_below(source, place / name), f".{ending} is not packed: {REFUSED[ending]}")
                    )
                elif ending in IMAGE_EXTENSIONS or ending in HEIF:
                    found = True
                    yield self._picture(source, place, name, told, by_lower)
                elif ending == "parquet":
                    tables.append(place / name)
                elif ending == "tar":
                    tars.append(place / name)
                elif ending not in BESIDE and name.lower() not in METADATA:
                    self.others[ending] += 1
        if not found and tars:
            raise DataError(
                f"{source} holds tar shards, such as {tars[0]}",
                "there is nothing to pack",
                "give them to data.shards as they are; `glide-ds prepare index` looks whether they are whole",
            )
        for table in tables if not found else []:
            yield from self._records(table, table.parent)

    def _picture(
        self,
        source: Path,
        place: Path,
        name: str,
        told: Mapping[str, Pair],
        by_lower: Mapping[str, str],
    ) -> Pair:
        image = _below(source, place / name)
        if (pair := told.get(unicodedata.normalize("NFC", name))) is not None:
            return pair._replace(image=image)
        lower = unicodedata.normalize("NFC", name).lower()
        stems = (os.path.splitext(lower)[0], lower)  # photo.txt, or photo.jpg.txt
        beside = []
        for ending in BESIDE:
            names = (by_lower.get(f"{stem}.{ending}") for stem in stems)
            beside += [(ending, _below(source, place / text)) for text in names if text][:1]
        return Pair(image, (), {}, tuple(beside))

    def _metadata(self, place: Path, names: list[str]) -> dict[str, Pair]:
        """What a metadata file says of the pictures in its folder, and below it, by name."""
        told: dict[str, Pair] = {}
        for name in names:
            if name.lower() in METADATA:
                for pair in self._records(place / name, place):
                    if isinstance(pair.image, str):
                        told[unicodedata.normalize("NFC", os.path.normpath(pair.image))] = pair
        return told

    # ---- records

    def _records(self, file: Path, root: Path) -> Iterator[Pair]:
        kind = file.suffix.lower()
        if kind == ".parquet":
            yield from self._parquet(file)
            return
        records: Iterable[tuple[str, Any]]
        data = file.read_bytes()
        if kind in (".csv", ".tsv"):
            records = self._table(file, data, "\t" if kind == ".tsv" else ",")
        elif kind == ".json":
            records = self._json(file, data)
        else:
            records = self._lines(file, data)
        for where, record in records:
            yield from self._pair(record, where)

    def _pair(self, record: Any, where: str) -> Iterator[Pair]:
        if not isinstance(record, dict):
            self.passed.append(
                Passed(where, f"it is a {type(record).__name__}, no record with an image and a caption")
            )
            return
        by_name = {str(name).strip().lower(): value for name, value in record.items()}
        image = next((by_name[name] for name in IMAGE_FIELDS if by_name.get(name)), None)
        if isinstance(image, dict):  # Hugging Face's image column
            image = image.get("bytes") or image.get("path")
        captions = _captions(by_name)
        if not isinstance(image, str | bytes | Row) or not captions:
            self.passed.append(
                Passed(
                    f"{where} has the fields {', '.join(map(str, record))[:200]}",
                    f"it needs one of {', '.join(IMAGE_FIELDS)} and one of {', '.join(TEXT_FIELDS)}",
                )
            )
        elif isinstance(image, str) and image.split(":", 1)[0] in ("http", "https", "s3", "gs", "data"):
            self.passed.append(
                Passed(where, f"{image[:80]} is no file here; fetch it first, as img2dataset does")
            )
        else:
            rest = {
                k: v
                for k, v in record.items()
                if str(k).strip().lower() not in IMAGE_FIELDS and isinstance(v, str | int | float | bool)
            }
            yield Pair(image.removeprefix("file://") if isinstance(image, str) else image, captions, rest)

    def _lines(self, file: Path, data: bytes) -> Iterator[tuple[str, Any]]:
        # Only a line feed ends a line of JSON: U+2028 and its like may stand within a text.
        lines: Iterable[bytes | str] = data.split(b"\n")
        if b"\0" in data[:1000]:
            lines = _text(file, data).split("\n")
        for number, line in enumerate(lines, 1):
            where = f"{file} line {number}"
            if not line.strip():
                continue
            try:
                text = line if isinstance(line, str) else decode_text(line)[0]
                yield where, loads(text)
            except (ValueError, RecursionError) as error:
                self.passed.append(Passed(where, f"is no JSON: {str(error)[:80]}"))
            except Unusable as error:
                self.passed.append(Passed(where, f"is no text: {error.detail}"))

    def _table(self, file: Path, data: bytes, separator: str) -> Iterator[tuple[str, Any]]:
        text = _text(file, data)
        if separator == ",":  # a semicolon is what spreadsheets write where a comma ends the whole numbers
            separator = max(",;\t|", key=text.partition("\n")[0].count)
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, restkey="")
        try:
            for record in rows:
                yield (
                    f"{file} line {rows.line_num}",
                    {key: value for key, value in record.items() if key and value},
                )
        except csv.Error as error:
            self.passed.append(Passed(f"{file} line {rows.line_num} and what follows", str(error)))

    def _json(self, file: Path, data: bytes) -> Iterator[tuple[str, Any]]:
        try:
            whole = loads(_text(file, data))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{file} is no JSON: {str(error)[:80]}",
                remedy="correct it, or name it .jsonl where it has a record a line",
            ) from error
        if isinstance(whole, dict) and isinstance(whole.get("annotations"), list):
            yield from self._coco(file, whole)
        elif isinstance(whole, list):
            yield from ((f"{file} record {number}", record) for number, record in enumerate(whole, 1))
        else:
            raise DataError(
                f"{file} is neither a list of records nor COCO's captions",
                remedy='give it {"images": […], "annotations": […]}, or [{"image": …, "caption": …}, …]',
            )

    def _coco(self, file: Path, whole: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        captions: dict[str, list[Any]] = {}
        for note in whole["annotations"]:
            if isinstance(note, dict) and isinstance(note.get("image_id"), int | str):
                captions.setdefault(str(note["image_id"]), []).append(note.get("caption"))
        listed = whole.get("images")
        images = [image for image in listed if isinstance(image, dict)] if isinstance(listed, list) else []
        names = [str(image.get("file_name")) for image in images]
        folder = _folder_of(file.parent, names[:20])
        for number, image in enumerate(images, 1):
            image_id, name = image.get("id"), image.get("file_name")
            texts = captions.get(str(image_id), []) if isinstance(image_id, int | str) else []
            where = str(folder / name) if isinstance(name, str) else None
            yield f"{file} image {number}", {"image": where, "captions": texts, "image_id": image_id}

    def _parquet(self, file: Path) -> Iterator[Pair]:
        try:
            from pyarrow import ArrowException, parquet, types
        except ImportError as error:
            raise DataError(f"reading {file} needs pyarrow", remedy="pip install 'glide_ds[pack]'") from error
        try:
            with parquet.ParquetFile(file) as table:
                # Bytes stay where they are until they are packed: a row says where that is.
                held = [
                    field.name
                    for field in table.schema_arrow
                    if field.name.strip().lower() in IMAGE_FIELDS
                    and (
                        types.is_binary(field.type)
                        or types.is_large_binary(field.type)
                        or types.is_struct(field.type)
                    )
                ]
                # Times are nothing that a record keeps, and may lie beyond what Python has.
                wanted = [
                    field.name
                    for field in table.schema_arrow
                    if field.name not in held and not types.is_temporal(field.type)
                ]
                number = 0
                for batch in table.iter_batches(batch_size=1024, columns=wanted):
                    for record in batch.to_pylist() if wanted else [{} for _ in range(batch.num_rows)]:
                        places = {name: Row(str(file), number, name) for name in held}
                        yield from self._pair({**places, **record}, f"{file} row {number}")
                        number += 1
        except (ArrowException, OSError, ValueError, OverflowError) as error:
            raise DataError(
                f"{file} can't be read as parquet: {str(error)[:200]}", remedy="fetch or write it again"
            ) from error


def walk(source: Path, out: Path | None = None) -> Iterator[tuple[Path, list[str]]]:
    """(folder, its files by name), following links to folders but not around, passing over hidden ones and `out`."""
    seen = set()
    for place, folders, names in os.walk(source, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen or Path(place).resolve() == out:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(place), sorted(name for name in names if not name.startswith("."))


class Rows:
    """Pictures' bytes of parquet files, read in order: a few in memory at a time."""

    def __init__(self) -> None:
        self._at: tuple[str, str, int] | None = None
        self._values: Iterator[Any] = iter(())

    def read(self, row: Row, root: Path) -> bytes:
        """Raises OSError where the row has no picture, or is not there."""
        if self._at is None or self._at[:2] != (row.file, row.column) or self._at[2] > row.number:
            self._at, self._values = (row.file, row.column, 0), self._open(row)
        value = None
        for number in range(self._at[2], row.number + 1):
            value = next(self._values, None)
            self._at = (row.file, row.column, number + 1)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return file_bytes(root / value)
        if not isinstance(value, bytes):
            raise OSError(f"row {row.number} of {row.file} has no picture")
        return value

    @staticmethod
    def _open(row: Row) -> Iterator[Any]:
        from pyarrow import parquet

        with parquet.ParquetFile(row.file, pre_buffer=False, buffer_size=1 << 20) as table:
            groups = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            for group, _ in enumerate(groups):
                for batch in table.iter_batches(batch_size=ROWS, columns=[row.column], row_groups=[group]):
                    yield from batch.column(0).to_pylist()


def file_bytes(path: Path) -> bytes:
    """What a regular file holds. Raises OSError; a pipe would never end, and not every string can be a name."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return path.read_bytes()
    except ValueError as error:
        raise OSError(errno.EINVAL, f"no file is called that ({error})") from error


def _captions(record: Mapping[str, Any]) -> tuple[str, ...]:
    for name in TEXT_FIELDS:
        value = record.get(name)
        texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        if found := tuple(text for text in texts if isinstance(text, str) and text.strip()):
            return found
    return ()


def _below(root: Path, path: Path) -> str:
    return str(path.relative_to(root))


def _text(file: Path, data: bytes) -> str:
    try:
        return decode_text(data)[0]
    except Unusable as error:
        raise DataError(
            f"{file} is no text: {error.detail}", "no record can be read", "save it as UTF-8"
        ) from error


def _folder_of(beside: Path, names: list[str]) -> Path:
    """The folder that COCO's pictures lie in: that of the captions, or one beside it or below it."""
    places = [beside, *_folders(beside), beside.parent, *_folders(beside.parent)]
    return next((place for place in places if any((place / name).is_file() for name in names)), beside)


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir())
