"""CLIP embeddings computed beforehand: one float16 array per shard, in tar order, and a note of what made it.

A store is a folder with SHARD.KEYS.npy, float16 [samples, D], and SHARD.KEYS.json for each shard. KEYS begins
the hash of the shard's sample keys, so an array is found by what it belongs to, wherever shard and store lie,
and never joined to other samples. A sample that gave no embedding has a row of zeros.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from glide_ds.data.tars.shards import ShardSet
from glide_ds.data.tars.storage import LocalFile, fault, local_path, open_at_once
from glide_ds.errors import DataError
from glide_ds.files import write_file

OPEN_ARRAYS = 256  # per process, at least
Rows = NDArray[np.float16]


@dataclass(frozen=True)
class Encoder:
    """What made the embeddings; all of it must agree with the run that uses them."""

    model: str
    weights: str
    source: str  # text | image


@dataclass(frozen=True)
class StoreNote:
    """The sidecar of one shard's embeddings."""

    encoder: Encoder
    weights_hash: str
    key_hash: str
    samples: int
    dim: int
    missing: int  # samples without an embedding

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()


def read_note(path: Path) -> StoreNote:
    """Raises DataError where the note is missing or damaged, SurroundingsError where it can't be read."""
    try:
        stored = json.loads(path.read_bytes())
        return StoreNote(**{**stored, "encoder": Encoder(**stored["encoder"])})
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise fault(str(path), error) from error
        raise _no_embeddings(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _no_embeddings(path, error) from error


def _no_embeddings(path: Path, error: Exception) -> DataError:
    return DataError(
        f"no CLIP embeddings at {path} ({error})",
        remedy="run `glide-ds prepare clip` for these shards, or unset data.clip_store to encode captions "
        "while training",
    )


def store_path(folder: str | Path, url: str, key_hash: str) -> Path:
    """A shard's array in a store; its note has the suffix .json."""
    name = os.path.basename(local_path(url)).removesuffix(".tar")
    return Path(folder) / f"{name}.{key_hash[:12]}.npy"


def write_store(path: Path, rows: Rows, note: StoreNote) -> None:
    """Write array, then note: the note's presence says the array is whole."""
    data = io.BytesIO()
    np.save(data, rows, allow_pickle=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data.getvalue())
    write_file(path.with_suffix(".json"), note.to_json())


class ClipStore:
    """The embeddings of a set of shards, by sample number.

    Opening reads every note and raises DataError, by name, where one is missing or belongs to another
    encoder or other samples.
    """

    def __init__(self, folder: str | Path, shards: ShardSet, encoder: Encoder) -> None:
        self._paths = [
            store_path(folder, url, key_hash)
            for url, key_hash in zip(shards.urls, shards.key_hashes, strict=True)
        ]
        self._ends, self._sizes = shards.ends, shards.sizes
        dims = set()
        for path, url, key_hash, samples in zip(
            self._paths, shards.urls, shards.key_hashes, shards.sizes.tolist(), strict=True
        ):
            note = read_note(path.with_suffix(".json"))
            _check(note, encoder, url, key_hash, samples)
            dims.add(note.dim)
        if len(dims) != 1:
            raise DataError(
                f"the embeddings in {folder} have the widths {sorted(dims)}", remedy="prepare them anew"
            )
        self.dim = dims.pop()
        self._open_at_once = OPEN_ARRAYS
        self._open = self._none_open()

    def keep_open(self, arrays: int) -> None:
        """Have room for that many open arrays in each process, beside their shards."""
        self._open_at_once = max(OPEN_ARRAYS, arrays)
        self._open = self._none_open()

    def _none_open(self) -> LRUCache[int, _Array]:
        return LRUCache(open_at_once(self._open_at_once))

    def rows(self, samples: NDArray[np.int64]) -> Rows:
        """float16 [B, D] of the given sample numbers.

        Raises SurroundingsError where they can't be read, DataError where a sample has none.
        """
        shards = np.searchsorted(self._ends, samples, side="right")
        rows = samples - (self._ends - self._sizes)[shards]
        out = np.empty((len(samples), self.dim), np.float16)
        for shard, row, into in zip(shards.tolist(), rows.tolist(), out.view(np.uint8), strict=True):
            try:
                (self._open.get(shard) or self._array(shard)).read(row, into)
            except OSError as error:
                raise fault(str(self._paths[shard]), error) from error
            except EOFError as error:
                raise DataError(str(error), "it was cut off during the run", "prepare them anew") from error
        missing = ~out.any(axis=1)
        if missing.any():
            raise DataError(
                f"sample {int(samples[missing][0])} has no embedding in "
                f"{self._paths[int(shards[missing][0])]}: it could not be read when the store was made",
                remedy="run `glide-ds prepare clip --force`",
            )
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": self._none_open()}

    def _array(self, shard: int) -> _Array:
        path, samples = self._paths[shard], int(self._sizes[shard])
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
        self._open[shard] = array
        return array


class _Array:
    """A .npy file read row by row. One cut off or lost under its map would end the process without a word."""

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
        if size < self.start + self.shape[0] * self.stride:
            raise ValueError(f"it has {size} bytes, fewer than {self.dtype} {self.shape} takes")
        self.file = LocalFile(str(path))

    def read(self, row: int, into: NDArray[np.uint8]) -> None:
        """The bytes of row number `row`. Raises OSError or EOFError."""
        offset = self.start + row * self.stride
        if os.preadv(self.file.descriptor, [into.data], offset) != self.stride:
            into[:] = np.frombuffer(self.file.read(offset, self.stride), np.uint8)


def _check(note: StoreNote, encoder: Encoder, url: str, key_hash: str, samples: int) -> None:
    for name, wanted in asdict(encoder).items():
        found = getattr(note.encoder, name)
        if found != wanted:
            raise DataError(
                f"the embeddings of {url} were made with clip.{name}={found}, this run has {wanted}",
                remedy=f"run `glide-ds prepare clip` for {wanted}, or set clip.{name}={found}",
            )
    if (note.key_hash, note.samples) != (key_hash, samples):
        raise DataError(
            f"the embeddings of {url} belong to {note.samples} other samples",
            remedy="run `glide-ds prepare clip` again",
        )
