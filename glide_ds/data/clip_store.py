"""CLIP embeddings computed beforehand, each with a hash of what was embedded, and a note of what made them.

A store is a folder. Each shard has NAME.SHARD.MADE.npy, float16 [samples, D] in tar order, and a note with the suffix
.json. SHARD begins the shard's fingerprint, MADE a hash of the encoder and of every caption or picture it was given: so
data sets whose shards have the same names may share a store, and what was made of a shard before it changed stays
apart. Behind the array, in the same file, lie the rows' hashes (uint64): an embedding is joined only to what it was
made of, wherever shard and store lie. A sample that gave no embedding has a row of zeros and the hash 0. Where
every caption of a sample has a row, each sample's first row (uint32 [samples + 1]) lies behind those.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from glide_ds.data.clip_notes import (
    Encoder,
    Notes,
    Places,
    StoreNote,
    no_embeddings,
    read_note,
    read_notes,
    stem,
)
from glide_ds.data.tars.peers import Peers
from glide_ds.data.tars.shards import ShardSet
from glide_ds.data.tars.storage import LocalFile, fault, open_at_once
from glide_ds.errors import DataError
from glide_ds.files import write_file

OPEN_ARRAYS = 256  # per process, at least
LOOKED_AT = 256  # bytes of a picture
Rows = NDArray[np.float16]
Hashes = NDArray[np.uint64]


# ---- what was embedded


def text_hash(caption: str) -> int:
    """Of a caption as it is embedded: 64 bits, never 0."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "little") or 1


def picture_hash(data: bytes) -> int:
    """Of a picture's file: 64 bits, never 0.

    Of its length, its end, and every so many-th byte: a whole file of 48 KB takes 83 us, this 1.2 us, and another
    picture, or the same coded anew, has other bytes everywhere. A change that leaves the length and all but a 256th
    part of the file as they were, such as one of a pixel that is not compressed, may go unseen.
    """
    few = data[:: len(data) // LOOKED_AT or 1] + data[-8:] + len(data).to_bytes(8, "little")
    return int.from_bytes(hashlib.sha256(few).digest()[:8], "little") or 1


# ---- writing


def write_store(
    folder: str | Path,
    url: str,
    rows: Rows,
    hashes: Hashes,
    note: StoreNote,
    first: Sequence[int] | None = None,
) -> Path:
    """Write array, then note, whose presence says that the array is whole; returns the array's place.

    Rows first[i] to first[i + 1] are of sample i; without `first`, each sample has one.
    """
    starts = b"" if first is None else np.array(first, np.uint32).tobytes()
    made = hashlib.sha256(json.dumps([asdict(note.encoder), note.weights_hash]).encode())
    made.update(hashes.tobytes() + starts)
    path = Path(folder) / f"{stem(url)}.{note.fingerprint[:12]}.{made.hexdigest()[:12]}.npy"
    data = io.BytesIO()
    np.save(data, rows, allow_pickle=False)
    data.write(hashes.tobytes() + starts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data.getvalue())
    write_file(path.with_suffix(".json"), note.to_json())
    return path


# ---- reading


class Embeddings:
    """What conditions a set of shards, by sample number: embeddings of captions, of pictures, or of each its share."""

    def __init__(
        self, folder: str | Path, shards: ShardSet, made_by: Sequence[Encoder], peers: Peers | None = None
    ) -> None:
        """Raises DataError where something is missing (see ClipStore)."""
        notes = read_notes(folder, shards, peers)
        self.stores = {encoder.source: ClipStore(folder, shards, encoder, notes) for encoder in made_by}
        self.dim = next(iter(self.stores.values())).dim
        # Whether any of a sample's captions may be drawn: each has an embedding, or none needs one.
        self.every = "text" not in self.stores or self.stores["text"].every

    def check_captions(self, captions: Mapping[str, float]) -> None:
        """Raises DataError where `data.captions` may draw captions that have no embedding."""
        if captions and not self.every:
            raise DataError(
                f"the store has one embedding a sample, data.captions={dict(captions)} draws of several captions",
                "CLIP would see another caption than the text does",
                f"run `glide-ds prepare clip --captions '{json.dumps(dict(captions))}'` into it, which keeps what is "
                "there",
            )

    def of_weights(self, weights_hash: str) -> None:
        """Keep to what the encoder with these weights made. Raises DataError where a shard has none of it."""
        for store in self.stores.values():
            store.of_weights(weights_hash)

    def keep_open(self, arrays: int) -> None:
        """Have room for that many open arrays in each process, beside their shards."""
        for store in self.stores.values():
            store.keep_open(arrays)

    def rows(self, samples: NDArray[np.int64], hashes: Sequence[int], pictured: NDArray[np.bool_]) -> Rows:
        """float16 [B, D]: of the picture in rows that are `pictured`, else of the caption. Raises as ClipStore's."""
        if len(self.stores) == 1:
            return next(iter(self.stores.values())).rows(samples, hashes)
        out = np.empty((len(samples), self.dim), np.float16)
        for source, here in (("text", ~pictured), ("image", pictured)):
            wanted = [value for value, is_here in zip(hashes, here.tolist(), strict=True) if is_here]
            out[here] = self.stores[source].rows(samples[here], wanted)
        return out


class ClipStore:
    """The embeddings of a set of shards, by sample number.

    Opening raises DataError, by name, where a shard has no note, or one of another encoder or of the shard before it
    changed.
    """

    def __init__(
        self, folder: str | Path, shards: ShardSet, encoder: Encoder, notes: Notes | None = None
    ) -> None:
        self._urls, self._ends, self._sizes = shards.urls, shards.ends, shards.sizes
        self._folder = Path(folder)
        notes = notes or read_notes(folder, shards)
        # A folder may hold embeddings of captions and of pictures; where these are none of ours, the check says so.
        ours = notes.those(lambda made: made.encoder.source == encoder.source)
        has_ours = np.bincount(notes.shards[ours], minlength=len(self._urls)) > 0
        self._notes = notes.take(ours | ~has_ours[notes.shards])
        _check(self._notes, encoder, shards, self._folder)
        dims = np.unique(self._notes.rows["dim"]).tolist()
        if len(dims) != 1:
            raise DataError(f"the embeddings in {folder} have the widths {dims}", remedy="prepare them anew")
        self.dim = dims[0]
        self.every = bool(
            self._notes.those(lambda made: made.every).all()
        )  # each of a sample's captions has a row
        self._moved: dict[int, list[tuple[Path, str]]] = {}  # of shards, where another array fitted better
        self.keep_open(OPEN_ARRAYS)

    def of_weights(self, weights_hash: str) -> None:
        """Keep to what the encoder with these weights made. Raises DataError where a shard has none of it."""
        kept = self._notes.take(self._notes.those(lambda made: made.weights_hash == weights_hash))
        without = np.flatnonzero(np.bincount(kept.shards, minlength=len(self._urls)) == 0)
        if len(without):
            shard = int(without[0])
            raise DataError(
                f"the embeddings of {self._urls[shard]} were made by weights with the hash "
                f"{self._made(shard)[0][1][:12]}, this run's clip.weights have {weights_hash[:12]}",
                "they would mean something else",
                "run `glide-ds prepare clip` again with these weights, or set clip.weights to those",
            )
        self._notes, self._moved = kept, {}

    def _made(self, shard: int) -> list[tuple[Path, str]]:
        """(array, hash of the weights) of what a shard has."""
        if shard in self._moved:
            return self._moved[shard]
        first, end = np.searchsorted(self._notes.shards, [shard, shard + 1])
        return [
            (self._folder / f"{row['name'].decode()}.npy", self._notes.made_by[row["made_by"]].weights_hash)
            for row in self._notes.rows[first:end]
        ]

    def keep_open(self, arrays: int) -> None:
        """Have room for that many open arrays in each process, beside their shards."""
        self._open_at_once = open_at_once(max(OPEN_ARRAYS, arrays))
        # A plain dict, whose oldest goes first: what is read in turn fits, and cachetools takes 1.3 us for each look.
        self._open: dict[int, _Array] = {}

    def rows(self, samples: NDArray[np.int64], hashes: Sequence[int]) -> Rows:
        """float16 [B, D] of the given sample numbers, whose captions or pictures have these hashes.

        Raises SurroundingsError where they can't be read, DataError where a sample has none, or that of something else.
        """
        shards = np.searchsorted(self._ends, samples, side="right")
        numbers = samples - (self._ends - self._sizes)[shards]
        out = np.empty((len(samples), self.dim), np.float16)
        places = zip(shards.tolist(), numbers.tolist(), hashes, out.view(np.uint8), strict=True)
        for shard, row, wanted, into in places:
            try:
                if not (self._open.get(shard) or self._array(shard)).read(row, wanted, into):
                    self._look_further(shard, row, wanted, into)
            except OSError as error:
                raise fault(str(self._made(shard)[0][0]), error) from error
            except EOFError as error:
                raise DataError(str(error), "it was cut off during the run", "prepare them anew") from error
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def _look_further(self, shard: int, row: int, wanted: int, into: NDArray[np.uint8]) -> None:
        """Read it from another array: made of the shard before, or of another set's, alike in names and sizes."""
        missing = (self._open.get(shard) or self._array(shard)).is_missing(row)
        made = self._made(shard)
        for number in range(1, len(made)):
            other = self._checked(made[number][0], shard)
            if other.read(row, wanted, into):
                made.insert(0, made.pop(number))
                self._moved[shard] = made
                self._keep(shard, other)
                return
        kept = f"sample {row} of {self._urls[shard]}"
        if missing:
            raise DataError(
                f"{kept} has no embedding in {made[0][0]}: it could not be read when the store was made",
                remedy="run `glide-ds prepare clip --force`",
            )
        raise DataError(
            f"{kept} is not what was embedded in {made[0][0]}: its caption or picture has changed, or the store is "
            "another data set's",
            "it would be trained with another sample's embedding",
            "run `glide-ds prepare clip` again, which computes what has changed",
        )

    def _array(self, shard: int) -> _Array:
        made = self._made(shard)
        if len({weights for _, weights in made}) > 1:
            raise DataError(
                f"{made[0][0].parent} has embeddings of {self._urls[shard]} by different weights",
                "it isn't known which ones this run wants",
                "prepare each into a folder of its own",
            )
        return self._keep(shard, self._checked(made[0][0], shard))

    def _keep(self, shard: int, array: _Array) -> _Array:
        self._open.pop(shard, None)
        while len(self._open) >= self._open_at_once:
            self._open.pop(next(iter(self._open)))
        self._open[shard] = array
        return array

    def _checked(self, path: Path, shard: int) -> _Array:
        samples = int(self._sizes[shard])
        try:
            array = _Array(path)
        except ValueError as error:
            raise DataError(
                f"the embeddings {path} can't be read: {error}", remedy="prepare them anew"
            ) from error
        if array.shape[1] != self.dim or array.dtype != np.float16 or array.samples != samples:
            raise DataError(
                f"the embeddings {path} are {array.dtype} {array.shape} of {array.samples} samples, not "
                f"float16 of {samples} with {self.dim} numbers",
                remedy="prepare them anew",
            )
        return array


class _Array:
    """Rows, read one by one, and all hashes. A file cut off or lost under its map would end the process without a word.

    The hashes stay in memory, 8 bytes a sample beside the shard's index of some 30: a look there takes 0.1 us, another
    read 0.9.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError where it can't be opened, ValueError where it is no whole array of rows."""
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            try:
                self.shape, _, self.dtype = read(file)
            except (SyntaxError, TokenError, TypeError) as error:  # what numpy lets through of a damaged header
                raise ValueError(f"its header is damaged ({error})") from error
            self.start, size = file.tell(), os.fstat(file.fileno()).st_size
        if len(self.shape) != 2:
            raise ValueError(f"it has the shape {self.shape}, not one row per sample")
        self.stride = self.shape[1] * self.dtype.itemsize
        end = self.start + self.shape[0] * self.stride  # where the hashes begin
        starts = end + 8 * self.shape[0]
        if size < starts or (size - starts) % 4:
            raise ValueError(
                f"it has {size} bytes, fewer than {self.dtype} {self.shape} and as many hashes take"
            )
        self.file = LocalFile(str(path))
        self.hashes = memoryview(self.file.read(end, 8 * self.shape[0])).cast("Q")
        # Each sample's first row; None where each has one.
        self.first = memoryview(self.file.read(starts, size - starts)).cast("I") if size > starts else None
        self.samples = self.shape[0] if self.first is None else len(self.first) - 1
        if self.first is not None and not self._rises():
            raise ValueError(f"its {self.samples} samples have other rows than the {self.shape[0]} there are")

    def _rises(self) -> bool:
        """Whether the samples' rows follow each other from the first to the last."""
        first = np.asarray(self.first)
        return first[0] == 0 and first[-1] == self.shape[0] and bool((first[1:] > first[:-1]).all())

    def is_missing(self, sample: int) -> bool:
        """Whether a sample gave no embedding when the array was made."""
        return self.hashes[sample if self.first is None else self.first[sample]] == 0

    def read(self, sample: int, wanted: int, into: NDArray[np.uint8]) -> bool:
        """Read the sample's row whose hash is the wanted one; False where it has none. Raises OSError or EOFError."""
        first, hashes = self.first, self.hashes
        rows = (sample,) if first is None else range(first[sample], first[sample + 1])
        for row in rows:
            if hashes[row] == wanted:
                self.read_row(row, into)
                return True
        return False

    def read_row(self, row: int, into: NDArray[np.uint8]) -> None:
        """Raises OSError or EOFError."""
        offset = self.start + row * self.stride
        if os.preadv(self.file.descriptor, [into.data], offset) != self.stride:
            into[:] = np.frombuffer(self.file.read(offset, self.stride), np.uint8)


def _none_for(url: str, places: Places) -> DataError:
    for path in places.before(url):
        read_note(path)  # says so where it is of a version before
        return DataError(
            f"{places.folder} has embeddings of another {os.path.basename(url)} than {url}: its members lie elsewhere "
            "or have other names",
            "they may be those of other captions or pictures",
            "run `glide-ds prepare clip` again, which computes what has changed",
        )
    return no_embeddings(places.folder, f"none of {url}")


_KEYS = {"crop": "data.crop", "trim": "data.trim"} | {
    name: f"clip.{name}" for name in ("model", "weights", "source")
}


def _check(notes: Notes, encoder: Encoder, shards: ShardSet, folder: Path) -> None:
    """Raises DataError for the first shard whose notes are not the encoder's, or not of the shard as it is."""
    others = notes.those(lambda made: made.encoder != encoder)
    fingerprints = shards.heads.rows["fingerprint"][notes.shards]
    stale = (notes.rows["fingerprint"] != fingerprints) | (notes.rows["samples"] != shards.sizes[notes.shards])
    without = np.flatnonzero(np.bincount(notes.shards, minlength=len(shards.urls)) == 0)
    if len(without):
        raise _none_for(shards.urls[without[0]], Places(folder))
    for row in np.flatnonzero(others | stale)[:1].tolist():
        url = shards.urls[notes.shards[row]]
        made_by = asdict(notes.made_by[notes.rows["made_by"][row]].encoder)
        for name, wanted in asdict(encoder).items():
            if made_by[name] != wanted:
                raise DataError(
                    f"the embeddings of {url} were made with {_KEYS[name]}={made_by[name]}, this run has {wanted}",
                    remedy=f"run `glide-ds prepare clip` for {wanted}, or set {_KEYS[name]}={made_by[name]}",
                )
        raise DataError(
            f"the embeddings of {url} belong to {notes.rows['samples'][row]} other samples",
            remedy="run `glide-ds prepare clip` again",
        )


# ---- taking over


class Embedded:
    """What a store holds by what was embedded, whichever shard it was of: so nothing is computed twice."""

    def __init__(self, notes: Iterable[Path], encoder: Encoder, weights_hash: str) -> None:
        """Of those of the notes that the encoder made. Raises SurroundingsError where a file can't be read."""
        self._paths: list[Path] = []
        self._open = LRUCache[int, _Array](OPEN_ARRAYS)
        self._rows: dict[int, tuple[int, int]] = {}  # hash: (array, row)
        for path in notes:
            try:
                note = read_note(path)
                if (note.encoder, note.weights_hash) != (encoder, weights_hash):
                    continue
                array = _Array(path.with_suffix(".npy"))
            except OSError as error:
                raise fault(str(path), error) from error
            except (DataError, ValueError, EOFError):  # of a version before, or damaged: computed anew
                continue
            for row, value in enumerate(array.hashes):
                self._rows[value] = len(self._paths), row
            self._paths.append(path.with_suffix(".npy"))
        self._rows.pop(0, None)

    def __contains__(self, wanted: int) -> bool:
        return wanted in self._rows

    def take(self, wanted: int, into: NDArray[np.float16]) -> bool:
        """Put the embedding of what has that hash into a row [D]; False where there is none."""
        place = self._rows.get(wanted)
        if place is None:
            return False
        number, row = place
        if number not in self._open:
            self._open[number] = _Array(self._paths[number])
        array = self._open[number]
        if array.stride != into.nbytes or array.hashes[row] != wanted:
            return False
        array.read_row(row, into.view(np.uint8))
        return True
