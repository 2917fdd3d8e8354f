"""CLIP embeddings computed beforehand, each with a hash of what was embedded, and a note of what made them.

A store is a folder. Each shard has NAME.SHARD.MADE.npy, float16 [samples, D] in tar order, and a note with the suffix
.json. SHARD begins the shard's fingerprint, MADE a hash of the encoder and of every caption or picture it was given: so
data sets whose shards have the same names may share a store, and what was made of a shard before it changed stays
apart. Behind the array, in the same file, lie the samples' hashes (uint64): an embedding is joined only to what it was
made of, wherever shard and store lie. A sample that gave no embedding has a row of zeros and the hash 0.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from glide_ds.config import ClipConfig
from glide_ds.data.pictures.decode import Cropping
from glide_ds.data.tars.shards import ShardSet
from glide_ds.data.tars.storage import LocalFile, fault, local_path, open_at_once
from glide_ds.errors import DataError
from glide_ds.files import write_file
from glide_ds.masking import bare, masked

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
        raise _no_embeddings(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _no_embeddings(path, error) from error


def _no_embeddings(place: Path, why: object) -> DataError:
    return DataError(
        f"no CLIP embeddings at {place} ({why})",
        remedy="run `glide-ds prepare clip` for these shards, or unset data.clip_store to encode captions "
        "while training",
    )


# ---- files


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
        begin = f"{_name(url)}.{fingerprint[:12]}."
        return [path for path in self._notes.get(_name(url), []) if path.name.startswith(begin)]

    def before(self, url: str) -> list[Path]:
        """The notes of every shard of that name, and of a version before."""
        old = [path for path in self._notes.get(_name(url).rpartition(".")[0], []) if _name(url) in path.name]
        return self._notes.get(_name(url), []) + old

    def all(self) -> Iterable[Path]:
        return (path for paths in self._notes.values() for path in paths)


def _name(url: str) -> str:
    return os.path.basename(local_path(masked(bare(url)))).removesuffix(".tar")


def write_store(folder: str | Path, url: str, rows: Rows, hashes: Hashes, note: StoreNote) -> Path:
    """Write array, then note, whose presence says that the array is whole; returns the array's place."""
    made = hashlib.sha256(json.dumps([asdict(note.encoder), note.weights_hash]).encode())
    made.update(hashes.tobytes())
    path = Path(folder) / f"{_name(url)}.{note.fingerprint[:12]}.{made.hexdigest()[:12]}.npy"
    data = io.BytesIO()
    np.save(data, rows, allow_pickle=False)
    data.write(hashes.tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data.getvalue())
    write_file(path.with_suffix(".json"), note.to_json())
    return path


# ---- reading


class Embeddings:
    """What conditions a set of shards, by sample number: embeddings of captions, of pictures, or of each its share."""

    def __init__(self, folder: str | Path, shards: ShardSet, made_by: Sequence[Encoder]) -> None:
        """Raises DataError where something is missing (see ClipStore)."""
        self.stores = {encoder.source: ClipStore(folder, shards, encoder) for encoder in made_by}
        self.dim = next(iter(self.stores.values())).dim

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

    Opening reads every note and raises DataError, by name, where one is missing, or belongs to another encoder or to
    the shard before it changed.
    """

    def __init__(self, folder: str | Path, shards: ShardSet, encoder: Encoder) -> None:
        self._urls, self._ends, self._sizes = shards.urls, shards.ends, shards.sizes
        places, dims = Places(folder), set()
        self._made: list[list[tuple[Path, str]]] = []  # of each shard: (array, hash of the weights)
        for url, fingerprint, samples in zip(
            shards.urls, shards.fingerprints, shards.sizes.tolist(), strict=True
        ):
            found = places.of(url, fingerprint)
            if not found:
                raise _none_for(url, places)
            noted = [(path, read_note(path)) for path in found]
            # A folder may hold embeddings of captions and of pictures; where these are none of ours, the check says so.
            noted = [each for each in noted if each[1].encoder.source == encoder.source] or noted
            for _, note in noted:
                _check(note, encoder, url, fingerprint, samples)
                dims.add(note.dim)
            self._made.append([(path.with_suffix(".npy"), note.weights_hash) for path, note in noted])
        if len(dims) != 1:
            raise DataError(
                f"the embeddings in {folder} have the widths {sorted(dims)}", remedy="prepare them anew"
            )
        self.dim = dims.pop()
        self.keep_open(OPEN_ARRAYS)

    def of_weights(self, weights_hash: str) -> None:
        """Keep to what the encoder with these weights made. Raises DataError where a shard has none of it."""
        for number, made in enumerate(self._made):
            fitting = [(path, weights) for path, weights in made if weights == weights_hash]
            if not fitting:
                raise DataError(
                    f"the embeddings of {self._urls[number]} were made by weights with the hash {made[0][1][:12]}, "
                    f"this run's clip.weights have {weights_hash[:12]}",
                    "they would mean something else",
                    "run `glide-ds prepare clip` again with these weights, or set clip.weights to those",
                )
            self._made[number] = fitting

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
                if (self._open.get(shard) or self._array(shard)).read(row, into) != wanted:
                    self._look_further(shard, row, wanted, into)
            except OSError as error:
                raise fault(str(self._made[shard][0][0]), error) from error
            except EOFError as error:
                raise DataError(str(error), "it was cut off during the run", "prepare them anew") from error
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def _look_further(self, shard: int, row: int, wanted: int, into: NDArray[np.uint8]) -> None:
        """Read it from another array: made of the shard before, or of another set's, alike in names and sizes."""
        found = (self._open.get(shard) or self._array(shard)).read(row, into)
        made = self._made[shard]
        for number in range(1, len(made)):
            other = self._checked(made[number][0], shard)
            if other.read(row, into) == wanted:
                made.insert(0, made.pop(number))
                self._keep(shard, other)
                return
        kept = f"sample {row} of {self._urls[shard]}"
        if not found:
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
        made = self._made[shard]
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
        if array.shape != (samples, self.dim) or array.dtype != np.float16:
            raise DataError(
                f"the embeddings {path} are {array.dtype} {array.shape}, not float16 {(samples, self.dim)}",
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
            self.shape, _, self.dtype = read(file)
            self.start, size = file.tell(), os.fstat(file.fileno()).st_size
        if len(self.shape) != 2:
            raise ValueError(f"it has the shape {self.shape}, not one row per sample")
        self.stride = self.shape[1] * self.dtype.itemsize
        end = self.start + self.shape[0] * self.stride  # where the hashes begin
        if size < end + 8 * self.shape[0]:
            raise ValueError(
                f"it has {size} bytes, fewer than {self.dtype} {self.shape} and as many hashes take"
            )
        self.file = LocalFile(str(path))
        self.hashes = memoryview(self.file.read(end, 8 * self.shape[0])).cast("Q")

    def read(self, row: int, into: NDArray[np.uint8]) -> int:
        """Read row number `row`, and return the hash of what it is of. Raises OSError or EOFError."""
        offset = self.start + row * self.stride
        if os.preadv(self.file.descriptor, [into.data], offset) != self.stride:
            into[:] = np.frombuffer(self.file.read(offset, self.stride), np.uint8)
        return self.hashes[row]


def _none_for(url: str, places: Places) -> DataError:
    for path in places.before(url):
        read_note(path)  # says so where it is of a version before
        return DataError(
            f"{places.folder} has embeddings of another {os.path.basename(url)} than {url}: its members lie elsewhere "
            "or have other names",
            "they may be those of other captions or pictures",
            "run `glide-ds prepare clip` again, which computes what has changed",
        )
    return _no_embeddings(places.folder, f"none of {url}")


_KEYS = {"crop": "data.crop", "trim": "data.trim"} | {
    name: f"clip.{name}" for name in ("model", "weights", "source")
}


def _check(note: StoreNote, encoder: Encoder, url: str, fingerprint: str, samples: int) -> None:
    for name, wanted in asdict(encoder).items():
        found = getattr(note.encoder, name)
        if found != wanted:
            raise DataError(
                f"the embeddings of {url} were made with {_KEYS[name]}={found}, this run has {wanted}",
                remedy=f"run `glide-ds prepare clip` for {wanted}, or set {_KEYS[name]}={found}",
            )
    if (note.fingerprint, note.samples) != (fingerprint, samples):
        raise DataError(
            f"the embeddings of {url} belong to {note.samples} other samples",
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

    def take(self, wanted: int, into: NDArray[np.float16]) -> bool:
        """Put the embedding of what has that hash into a row [D]; False where there is none."""
        place = self._rows.get(wanted)
        if place is None:
            return False
        number, row = place
        if number not in self._open:
            self._open[number] = _Array(self._paths[number])
        array = self._open[number]
        return array.stride == into.nbytes and array.read(row, into.view(np.uint8)) == wanted
