"""Which of a sample's captions are used: `data.captions`, and `data.caption_file` for those made afterwards."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glide_ds.data.tally import Cause, Unusable
from glide_ds.data.tars.storage import LocalFile, reading
from glide_ds.data.texts.captions import (
    choices_of,
    choose,
    loads,
    parse_json,
    read_caption,
    read_captions,
    tidy,
)
from glide_ds.data.texts.encodings import decode_text
from glide_ds.errors import DataError

KEY_FIELDS = ("key", "__key__")
LINES = ".lines"  # behind a text member's name: each of its lines is a caption
RECORD, SIDE = "json", "file"


class Captions:
    """The captions of samples by the fields that `data.captions` names, each with its weight.

    `txt`, `caption`, …: a text member; `txt.lines`: one caption a line; `json.a.b`: of the JSON record; `file.a`: of
    the sample's record in the side file. No fields: a text, else the record's first field that has any (`captions`).
    """

    def __init__(self, fields: Mapping[str, float] | None = None, file: str | None = None) -> None:
        """Raises DataError where the side file can't be understood, SurroundingsError where it can't be read."""
        self._fields = [(name, weight) for name, weight in (fields or {}).items() if weight > 0]
        paths = [name.split(".") for name, _ in self._fields]
        self._file = (
            SideFile(file, [path[1] for path in paths if path[0] == SIDE and path[1:]]) if file else None
        )

    @property
    def named(self) -> bool:
        """Whether fields are named."""
        return bool(self._fields)

    @property
    def reads_record(self) -> bool:
        """Whether the JSON record is read wherever there is one."""
        return any(name.split(".")[0] == RECORD for name, _ in self._fields)

    def read(
        self, members: Mapping[str, bytes], draw: float, key: Callable[[], str]
    ) -> tuple[str, tuple[str, ...]]:
        """A sample's caption, one of them by `draw` in [0, 1), and notes. `key` gives the sample's key when asked.

        Raises Unusable where there is none.
        """
        if not self._fields:
            return read_caption(members, draw)
        choices, notes = self._choices(members, key)
        return choose(choices, draw), notes

    def all(self, members: Mapping[str, bytes], key: Callable[[], str]) -> list[str]:
        """Every caption that `read` may give, each once. Raises Unusable where there is none."""
        choices = self._choices(members, key)[0] if self._fields else read_captions(members)[0]
        return list(dict.fromkeys(text for text, _ in choices))

    def _choices(
        self, members: Mapping[str, bytes], key: Callable[[], str]
    ) -> tuple[list[tuple[str, float]], tuple[str, ...]]:
        found: list[tuple[str, float]] = []
        notes: dict[str, None] = {}
        bad: Unusable | None = None
        for name, weight in self._fields:
            try:
                texts, utf8 = self._of(name, members, key)
            except Unusable as error:
                bad = bad or error  # another field may yet have one
                continue
            clean = [(tidy(text), part) for text, part in texts]
            clean = [(text, part) for text, part in clean if text]
            total = sum(part for _, part in clean)
            found += [(text, weight * (part / total if total else 1 / len(clean))) for text, part in clean]
            if not utf8:
                notes["caption not UTF-8"] = None
        if found:
            return found, tuple(notes)
        if bad:
            raise bad
        names = ", ".join(name for name, _ in self._fields)
        raise Unusable(
            Cause.NO_CAPTION, f"none of data.captions ({names}); members: {', '.join(sorted(members))}"
        )

    def _of(
        self, name: str, members: Mapping[str, bytes], key: Callable[[], str]
    ) -> tuple[list[tuple[str, float]], bool]:
        """(captions with weights, whether they were UTF-8) of one field."""
        member, *path = name.split(".")
        if member == SIDE and self._file:
            return choices_of(_at(self._file.record(key()), path)), True
        if member == RECORD:
            if RECORD not in members:
                return [], True
            record, utf8 = parse_json(members[RECORD])
            return choices_of(_at(record, path)), utf8
        extension = name.removesuffix(LINES)
        if extension not in members:
            return [], True
        text, utf8 = decode_text(members[extension])
        return [(part, 1.0) for part in (text.split("\n") if name.endswith(LINES) else [text])], utf8


def _at(record: Any, path: list[str]) -> Any:
    for name in path:
        record = record.get(name) if isinstance(record, dict) else None
    return record


class SideFile:
    """Records by sample key, of JSON lines or parquet. In memory are 16 bytes a record, and parquet's named fields."""

    def __init__(self, path: str, fields: Sequence[str] = ()) -> None:
        """Raises DataError where it can't be understood, SurroundingsError where it can't be read."""
        self.path, self._fields = path, fields
        if not os.path.isfile(path):
            raise DataError(f"data.caption_file {path} does not exist", remedy="correct the path")
        with reading(path):
            if path.endswith(".parquet"):
                self._table, keys = _parquet(path, fields)
                places = array("q", range(len(keys)))
            else:
                self._table, self._lines = None, LocalFile(path)
                keys, places = _index_lines(path)
        hashes = np.array(keys, np.uint64)
        if not len(hashes):
            raise DataError(
                f"data.caption_file {path} has no record with a key",
                "no sample can be found in it",
                f"give each record the sample's key, as in the tar, by the field {KEY_FIELDS[0]}",
            )
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._places = hashes[order], np.array(places, np.int64)[order]
        if (self._hashes[1:] == self._hashes[:-1]).any():
            raise DataError(
                f"data.caption_file {path} has two records of one key",
                "it isn't known which one is meant",
                "give each key one record, with a list of captions where it has several",
            )

    def __deepcopy__(self, memo: object) -> SideFile:
        return self  # nothing in it changes, and a copy would read by a descriptor that this one closes

    def __reduce__(self) -> tuple[type[SideFile], tuple[str, Sequence[str]]]:
        return SideFile, (self.path, self._fields)

    def record(self, key: str) -> dict[str, Any]:
        """A sample's record; an empty one where the file has none. Raises SurroundingsError where it can't be read."""
        wanted = _hash(key)
        row = int(np.searchsorted(self._hashes, wanted))
        if row == len(self._hashes) or int(self._hashes[row]) != wanted:
            return {}
        place = int(self._places[row])
        if self._table is not None:
            return {name: self._table.column(name)[place].as_py() for name in self._table.column_names}
        with reading(self.path):
            start, size = place >> 24, place & 0xFFFFFF
            return parse_json(self._lines.read(start, size))[0]


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "little")


def _index_lines(path: str) -> tuple[array[int], array[int]]:
    """(hashes of keys, place of each line: its offset << 24 | its size)."""
    hashes, places, offset = array("Q"), array("q"), 0
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                record, key = _record(path, number, line)
                if key is None:
                    raise DataError(
                        f"{path} line {number} has the fields {', '.join(record)[:200]}",
                        "no sample can be told by it",
                        f"give each record the sample's key by the field {KEY_FIELDS[0]}",
                    )
                hashes.append(_hash(key))
                places.append(offset << 24 | min(len(line), 0xFFFFFF))
            offset += len(line)
    return hashes, places


def _record(path: str, number: int, line: bytes) -> tuple[dict[str, Any], str | None]:
    try:
        record = loads(line)
        if not isinstance(record, dict):
            raise ValueError(f"a {type(record).__name__}, no record")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} line {number} is no JSON record: {str(error)[:80]}", remedy="correct it"
        ) from error
    return record, next((str(record[name]) for name in KEY_FIELDS if record.get(name) is not None), None)


def _parquet(path: str, fields: Sequence[str]) -> tuple[Any, array[int]]:
    """(the table of those fields, hashes of its keys)."""
    try:
        from pyarrow import ArrowException, large_string, parquet, schema, string, types
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow", remedy="pip install 'glide_ds[pack]'") from error
    try:
        names = parquet.read_schema(path).names
        key = next((name for name in KEY_FIELDS if name in names), KEY_FIELDS[0])
        if missing := [name for name in (key, *fields) if name not in names]:
            raise DataError(
                f"data.caption_file {path} has the fields {', '.join(names)[:200]}, not {', '.join(missing)}",
                "no caption can be found in it",
                f"name those it has in data.captions; a record's sample is told by its key, in the field {key}",
            )
        table = parquet.read_table(path, columns=[key, *fields])
        binary = {types.is_binary: string(), types.is_large_binary: large_string()}  # texts of older writers
        kinds = [
            next((text for is_one, text in binary.items() if is_one(each.type)), each.type)
            for each in table.schema
        ]
        table = table.cast(schema(list(zip(table.column_names, kinds, strict=True))))
        table.validate(full=True)  # else a text that is none would be met while training
    except (ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(
            f"{path} can't be read as parquet: {str(error)[:200]}", remedy="write it again"
        ) from error
    keys = (name for chunk in table.column(key).chunks for name in chunk.to_pylist())
    return table, array("Q", (_hash(str(name)) for name in keys))
