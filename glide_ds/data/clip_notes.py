"""The notes of a store of CLIP embeddings: what made each shard's, and of which samples.

A note is NAME.SHARD.MADE.json beside its array (see clip_store). A start knows all of them by the store's own catalog,
one file; those that changed since it was made are read.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glide_ds.config import ClipConfig
from glide_ds.data.pictures.decode import Cropping
from glide_ds.data.tars.catalog import (
    TURNS,
    Place,
    by_threads,
    cached,
    load_catalog,
    packed,
    sayer,
    store_catalog,
    unpacked,
)
from glide_ds.data.tars.peers import Alone, Peers
from glide_ds.data.tars.shards import ShardSet
from glide_ds.data.tars.storage import Storage, fault, local_path, reading
from glide_ds.errors import DataError
from glide_ds.masking import bare, masked
from glide_ds.progress import Progress

NOTES = "notes.catalog"
NO_SHARDS = np.zeros(0, np.int64)


# ---- one


@dataclass(frozen=True)
class Encoder:
    """What made the embeddings; all of it must agree with the run that uses them."""

    model: str
    weights: str
    source: str  # text | image
    crop: str | None = None  # how pictures were made square, as data.crop and data.trim say
    trim: bool | None = None


def encoders(clip: ClipConfig, cropping: Cropping) -> list[Encoder]:
    """What must have made a run's embeddings: those of captions, of pictures, or both."""
    of_text = Encoder(clip.model, clip.weights, "text")
    of_pictures = Encoder(clip.model, clip.weights, "image", *cropping)
    return [encoder for encoder in (of_text, of_pictures) if clip.source in (encoder.source, "both")]


@dataclass(frozen=True)
class StoreNote:
    """The sidecar of one shard's embeddings."""

    encoder: Encoder
    weights_hash: str
    fingerprint: str  # of the shard
    version: str  # of the shard's file: where it is the same, nothing in it has changed
    samples: int
    dim: int
    missing: int  # samples without an embedding
    every: bool = False  # each of a sample's captions has one, so any of them may be drawn

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()


def read_note(path: Path) -> StoreNote:
    """Raises DataError where the note is missing or damaged, SurroundingsError where it can't be read."""
    try:
        stored = json.loads(path.read_bytes())
        if "fingerprint" not in stored and "key_hash" in stored:
            raise DataError(
                f"the embeddings {path} are of a version before, which kept no hash of what was embedded",
                "they could be those of other captions or pictures",
                "run `glide-ds prepare clip` again, which makes them anew beside the old ones",
            )
        return StoreNote(**{**stored, "encoder": Encoder(**stored["encoder"])})
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise fault(str(path), error) from error
        raise no_embeddings(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise no_embeddings(path, error) from error


def no_embeddings(place: Path, why: object) -> DataError:
    return DataError(
        f"no CLIP embeddings at {place} ({why})",
        remedy="run `glide-ds prepare clip` for these shards, or unset data.clip_store to encode captions "
        "while training",
    )


class Places:
    """The notes in a store, by the names of their shards. Listed once."""

    def __init__(self, folder: str | Path) -> None:
        """Raises SurroundingsError where the folder can't be listed; one that is not there holds nothing."""
        self.folder, self._notes = Path(folder), defaultdict[str, list[Path]](list)
        try:
            names = sorted(os.listdir(folder))
        except FileNotFoundError:
            names = []
        except OSError as error:
            raise fault(str(folder), error) from error
        for name in names:
            if name.endswith(".json") and not name.startswith("."):
                self._notes[name.removesuffix(".json").rsplit(".", 2)[0]].append(self.folder / name)

    def of(self, url: str, fingerprint: str) -> list[Path]:
        """The notes of what was made of a shard as it is now."""
        begin = f"{stem(url)}.{fingerprint[:12]}."
        return [path for path in self._notes.get(stem(url), []) if path.name.startswith(begin)]

    def before(self, url: str) -> list[Path]:
        """The notes of every shard of that name, and of a version before."""
        old = [path for path in self._notes.get(stem(url).rpartition(".")[0], []) if stem(url) in path.name]
        return self._notes.get(stem(url), []) + old

    def all(self) -> Iterable[Path]:
        return (path for paths in self._notes.values() for path in paths)


def stem(url: str) -> str:
    """The name of a shard's embeddings begins so."""
    name = os.path.basename(local_path(bare(url))).removesuffix(".tar")
    return masked(name) if "=" in name else name


# ---- all notes of a set


class MadeBy(NamedTuple):
    """What many notes have in common."""

    encoder: Encoder
    weights_hash: str
    every: bool  # as in a note

    @classmethod
    def of(cls, note: StoreNote) -> MadeBy:
        return cls(note.encoder, note.weights_hash, note.every)


@dataclass(frozen=True, eq=False)
class Notes:
    """What M notes say, and which shards they are of, once that is known; sorted by shard then.

    Arrays, for an object per shard would take more memory than all the rest.
    """

    shards: NDArray[np.int64]  # [M], the shard's number; [0] where it isn't known
    rows: NDArray[np.void]  # [M], of note_type
    made_by: tuple[MadeBy, ...]

    def take(self, which: NDArray[Any]) -> Notes:
        return Notes(self.shards[which] if len(self.shards) else self.shards, self.rows[which], self.made_by)

    def those(self, fitting: Callable[[MadeBy], bool]) -> NDArray[np.bool_]:
        """[M], whether what made them is fitting."""
        return np.array([fitting(each) for each in self.made_by], np.bool_)[self.rows["made_by"]]

    def of_files(self, names: Sequence[str]) -> Notes:
        """Without those whose files are gone."""
        return self.take(np.isin(self.rows["name"], [name.encode() for name in names]))

    @classmethod
    def of(cls, names: Sequence[str], files: Sequence[tuple[int, int]], notes: Sequence[StoreNote]) -> Notes:
        """Of files with these names, sizes and times of change, as yet of no shard."""
        made_by = list(dict.fromkeys(MadeBy.of(note) for note in notes))
        encoded = [name.encode() for name in names]
        rows = np.zeros(len(names), note_type(max(map(len, encoded), default=1)))
        rows["name"] = encoded
        rows["bytes"], rows["changed"] = np.array(files, np.int64).reshape(-1, 2).T
        rows["fingerprint"] = [note.fingerprint.encode() for note in notes]
        rows["samples"], rows["dim"] = [note.samples for note in notes], [note.dim for note in notes]
        rows["made_by"] = [made_by.index(MadeBy.of(note)) for note in notes]
        return cls(NO_SHARDS, rows, tuple(made_by))

    @classmethod
    def joined(cls, parts: Sequence[Notes]) -> Notes:
        """The rows of all, in their order, as yet of no shard."""
        rows = np.concatenate([part.rows for part in parts])
        known: dict[MadeBy, int] = {}
        first = 0
        for part in parts:
            numbers = np.array([known.setdefault(each, len(known)) for each in part.made_by], np.int64)
            rows["made_by"][first : first + len(part.rows)] = numbers[part.rows["made_by"]]
            first += len(part.rows)
        return cls(NO_SHARDS, rows, tuple(known))

    def to_bytes(self) -> bytes:
        made_by = [(asdict(made.encoder), made.weights_hash, made.every) for made in self.made_by]
        return packed(NOTES, {"name_bytes": self.rows["name"].itemsize, "made_by": made_by}, self.rows)

    @classmethod
    def from_bytes(cls, data: bytes, of: str) -> Notes:
        """Raises ValueError, KeyError or TypeError where the bytes are no whole catalog of notes."""
        head, body = unpacked(of, data)
        rows = np.frombuffer(body, note_type(head["name_bytes"]))
        made_by = tuple(MadeBy(Encoder(**encoder), *rest) for encoder, *rest in head["made_by"])
        return cls(NO_SHARDS, rows, made_by)


def note_type(name_bytes: int) -> np.dtype[np.void]:
    """Of a note's row: its file without an ending, of what size and time, and what it says."""
    file = ("name", f"S{name_bytes}"), ("bytes", "<i8"), ("changed", "<i8")
    return np.dtype([*file, ("fingerprint", "S32"), *((name, "<i8") for name in ("samples", "dim", "made_by"))])


def read_notes(folder: str | Path, shards: ShardSet, peers: Peers | None = None) -> Notes:
    """The notes of what was made of these shards as they are: by the store's own catalog where it holds.

    It lies in the store, or in the cache where that is read-only; a note with another size or time of change than it
    says is read. Raises DataError and SurroundingsError as read_note does.
    """
    peers, folder = peers or Alone(), Path(folder)
    say = sayer(peers)
    place = Place(NOTES, [str(folder.absolute() / NOTES), cached([str(folder.absolute()), NOTES])])
    stored = peers.first(lambda: load_catalog(place, Notes.from_bytes, Storage(), say))
    numbers, names = peers.first(lambda: _noted(folder, shards))
    parts = peers.each(lambda: _read_mine(folder, names, stored, peers))
    fresh = [part for part in parts if len(part.rows)]
    whole = Notes.joined([stored or Notes.of([], [], []), *fresh])
    found, last = np.unique(whole.rows["name"][::-1], return_index=True)
    by_name = Notes(NO_SHARDS, whole.rows[::-1][last], whole.made_by)
    if fresh:
        peers.first(lambda: store_catalog(place, by_name.of_files(_listed(folder)).to_bytes(), Storage(), say))
    return Notes(numbers, by_name.rows[np.searchsorted(found, names)], whole.made_by)


def _listed(folder: Path) -> list[str]:
    """The notes in a store, by name, without their ending; a store that is not there holds none."""
    with reading(str(folder)):
        try:
            return sorted(name.removesuffix(".json") for name in os.listdir(folder) if name.endswith(".json"))
        except FileNotFoundError:
            return []


def _noted(folder: Path, shards: ShardSet) -> tuple[NDArray[np.int64], NDArray[np.bytes_]]:
    """(number of a shard, name of a note of it as it is), sorted by both."""
    wanted = defaultdict[str, list[int]](list)
    for number, (url, fingerprint) in enumerate(zip(shards.urls, shards.fingerprints, strict=True)):
        wanted[f"{stem(url)}.{fingerprint[:12]}"].append(number)
    pairs = [
        (number, name.encode())
        for name in _listed(folder)
        for number in wanted.get(name.rpartition(".")[0], ())
    ]
    pairs.sort()
    return np.array([number for number, _ in pairs], np.int64), np.array([name for _, name in pairs], np.bytes_)


def _read_mine(folder: Path, names: NDArray[np.bytes_], stored: Notes | None, peers: Peers) -> Notes:
    """Those of the notes whose files are not as they were when the store's catalog was made; this process's part."""
    mine = np.unique(names[peers.mine(len(names))])

    def file(name: bytes) -> tuple[int, int]:
        path = folder / f"{name.decode()}.json"
        with reading(str(path)):
            status = path.stat()
        return status.st_size, status.st_mtime_ns

    files = np.array(list(by_threads(file, mine.tolist(), TURNS)), np.int64).reshape(-1, 2)
    todo = np.ones(len(mine), np.bool_)
    if stored is not None and len(stored.rows):
        rows = stored.rows[np.searchsorted(stored.rows["name"], mine).clip(max=len(stored.rows) - 1)]
        todo = (rows["name"] != mine) | (rows["bytes"] != files[:, 0]) | (rows["changed"] != files[:, 1])
    texts = [name.decode() for name in mine[todo].tolist()]
    with Progress("reading notes", len(texts), "shards", shown=peers.shown and len(texts) > 0) as progress:
        notes = list(progress.over(by_threads(lambda name: read_note(folder / f"{name}.json"), texts)))
    return Notes.of(texts, files[todo].tolist(), notes)
