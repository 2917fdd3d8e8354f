"""The index of a tar shard: where every sample's members lie, without unpacking.

A sample is a run of tar members that share a key, as in WebDataset: `dir/000123.jpg` and `dir/000123.txt`
are the members `jpg` and `txt` of the sample `dir/000123`. The index of `x.tar` is `x.tar.index`, beside it
or, where that place is read-only, in a cache folder. It is written once and read in one piece.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from glide_ds.config import cache_dir
from glide_ds.data.tars.scan import BLOCK, Scan, scan_tar, split_name
from glide_ds.data.tars.signatures import check_is_tar
from glide_ds.data.tars.storage import LocalFile, RemoteFile, Stat, Storage, is_remote, local_path, reading
from glide_ds.errors import DataError, SurroundingsError
from glide_ds.files import write_file
from glide_ds.masking import bare, masked

MAGIC = b"glide_ds index 1\n"
SCANNER = 2  # grows when a scan finds more than before: 1 stopped at the first block of zeros


# ---- the index


@dataclass(frozen=True)
class IndexHead:
    """What is known of a shard without reading its index's tables."""

    samples: int
    members: int
    tar_size: int
    version: str  # of the tar's content when it was scanned
    key_hash: str  # of all sample keys in order
    fingerprint: str  # of the keys and where every member lies
    extensions: tuple[str, ...]
    duplicates: int  # samples whose key an earlier sample of the shard has
    damage: tuple[str, ...] = ()
    scanner: int = 1  # which SCANNER looked for them


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """One shard's samples: members of sample i are rows first[i] to first[i + 1] of the other tables.

    The tables are memoryviews, which give plain integers in a third of the time that arrays take.
    """

    head: IndexHead
    first: memoryview  # uint32 [samples + 1]
    blocks: memoryview  # uint32 [members], offset of the data in blocks of 512 bytes
    sizes: memoryview  # uint32 [members], in bytes
    kinds: (
        memoryview  # uint8, or uint32 for more than 256, [members]: number of the extension in head.extensions
    )

    def members(self, sample: int) -> list[tuple[str, int, int]]:
        """(extension, offset, size) of each member of a sample."""
        extensions, kinds, blocks, sizes = self.head.extensions, self.kinds, self.blocks, self.sizes
        rows = range(self.first[sample], self.first[sample + 1])
        return [(extensions[kinds[row]], blocks[row] * BLOCK, sizes[row]) for row in rows]

    def read(
        self, sample: int, file: LocalFile | RemoteFile, unread: frozenset[str] = frozenset()
    ) -> dict[str, bytes]:
        """A sample's members by extension, but for those of the extensions `unread`.

        Raises OSError or EOFError where the shard cannot give them.
        """
        if isinstance(file, RemoteFile):
            members = (member for member in self.members(sample) if member[0] not in unread)
            return {name: file.read(offset, size) for name, offset, size in members}
        extensions, kinds, blocks, sizes = self.head.extensions, self.kinds, self.blocks, self.sizes
        pread, descriptor, found = os.pread, file.descriptor, {}
        # No call and no tuple per member: a small one's bytes take less time than either.
        for row in range(self.first[sample], self.first[sample + 1]):
            name = extensions[kinds[row]]
            if name not in unread:
                offset, size = blocks[row] * BLOCK, sizes[row]
                data = pread(descriptor, size, offset)
                found[name] = data if len(data) == size else file.read(offset, size)
        return found

    def name(self, sample: int, file: LocalFile | RemoteFile) -> str:
        """The name of a sample's first member, from the headers before its data: one is not enough for a long name.

        Raises OSError or EOFError where the shard cannot give them.
        """
        row = self.first[sample]
        start, data = self._end(row - 1) if row else 0, self.blocks[row] * BLOCK

        def header(offset: int, size: int) -> bytes:
            return file.read(start + offset, size) if start + offset < data else b"\1" * size

        if start < data and len(names := _named(scan_tar(header, self._end(row) - start))) == 1:
            return names[0]
        return _named(scan_tar(file.read, self.head.tar_size))[row]  # among links, whose data lies elsewhere

    def _end(self, row: int) -> int:
        return (self.blocks[row] + -(-self.sizes[row] // BLOCK)) * BLOCK

    def to_bytes(self) -> bytes:
        head = json.dumps(asdict(self.head), sort_keys=True).encode() + b"\n"
        tables = (self.first, self.blocks, self.sizes, self.kinds)
        body = head + b"".join(table.tobytes() for table in tables)
        return MAGIC + hashlib.blake2b(body, digest_size=16).digest() + body

    @classmethod
    def from_bytes(cls, data: bytes) -> ShardIndex:
        """Raises ValueError, KeyError or TypeError where the bytes are no whole, undamaged index."""
        start = len(MAGIC) + 16
        if data[: len(MAGIC)] != MAGIC:
            raise ValueError("no index")
        if data[len(MAGIC) : start] != hashlib.blake2b(data[start:], digest_size=16).digest():
            raise ValueError("a damaged index")
        end = data.find(b"\n", start)
        stored = json.loads(data[start:end])
        stored |= {name: tuple(stored[name]) for name in ("extensions", "damage")}
        head = IndexHead(**stored)
        tables: list[memoryview] = []
        offset, whole = end + 1, memoryview(data)
        lengths = (head.samples + 1, head.members, head.members, head.members)
        for length, kind in zip(lengths, ("I", "I", "I", _kind(head.extensions)), strict=True):
            size = length * (4 if kind == "I" else 1)
            tables.append(whole[offset : offset + size].cast(kind))
            offset += size
        if offset != len(data):
            raise ValueError("a cut index")
        return cls(head, *tables)


def _named(scan: Scan) -> list[str]:
    """The names of the members that are of samples, in their order: as an index counts them."""
    return [member.name for member in scan.members if split_name(member.name)]


def build_index(scan: Scan, version: str = "") -> ShardIndex:
    """Group a scan's members into samples. An extension that repeats under one key starts a new sample."""
    keys: list[str] = []
    first: list[int] = []
    blocks: list[int] = []
    sizes: list[int] = []
    kinds: list[int] = []
    extensions: dict[str, int] = {}
    seen: set[str] = set()
    for name, offset, size in scan.members:
        if (parts := split_name(name)) is None:
            continue
        key, extension = parts
        if not keys or key != keys[-1] or extension in seen:
            keys.append(key)
            first.append(len(blocks))
            seen = set()
        seen.add(extension)
        blocks.append(offset // BLOCK)
        sizes.append(size)
        kinds.append(extensions.setdefault(extension, len(extensions)))
    first.append(len(blocks))
    tables = (
        np.array(first, np.uint32).data,
        np.array(blocks, np.uint32).data,
        np.array(sizes, np.uint32).data,
        np.array(kinds, np.uint8 if _kind(extensions) == "B" else np.uint32).data,
    )
    key_hash = hashlib.blake2b("\n".join(keys).encode(), digest_size=16).hexdigest()
    names = tuple(extensions)
    digest = hashlib.blake2b(f"{key_hash} {names}".encode(), digest_size=16)
    for table in tables:
        digest.update(table.tobytes())
    head = IndexHead(
        samples=len(keys),
        members=len(blocks),
        tar_size=scan.size,
        version=version,
        key_hash=key_hash,
        fingerprint=digest.hexdigest(),
        extensions=names,
        duplicates=len(keys) - len(set(keys)),
        damage=(
            *scan.damage,
            *_run_together(keys, names, len(blocks)),
            *_scattered(keys, first, [names[kind] for kind in kinds]),
        ),
        scanner=SCANNER,
    )
    return ShardIndex(head, *tables)


def _kind(extensions: Collection[str]) -> Literal["B", "I"]:
    return "B" if len(extensions) <= 256 else "I"


def _run_together(keys: Sequence[str], extensions: Sequence[str], members: int) -> Iterator[str]:
    """What to say where dots in the names make one sample of many."""
    dotted = [extension for extension in extensions if "." in extension]
    if len(dotted) < 4 or len(dotted) < 0.8 * len(extensions) or len(extensions) < 2 * len(keys):
        return  # else a few kinds of many samples, such as mask.png and depth.png
    stem = os.path.basename(keys[0])
    yield (
        f"its {members} files make {len(keys)} sample(s), for WebDataset's rule ends a key at a name's first dot: "
        f"{stem}.{dotted[0]} and {stem}.{dotted[-1]} are of one; rename them so that the first dot is the one before "
        f"the kind, as in {stem}-{dotted[0].replace('.', '-', dotted[0].count('.') - 1)}"
    )


def _scattered(keys: Sequence[str], first: Sequence[int], names: Sequence[str]) -> Iterator[str]:
    """What to say where the members of a sample don't lie together: each part would be a sample, without the rest."""
    if len(set(keys)) == len(keys):
        return
    seen: dict[str, set[str]] = {}
    torn: dict[str, str] = {}
    for number, key in enumerate(keys):
        kinds = set(names[first[number] : first[number + 1]])
        if not seen.setdefault(key, set()).isdisjoint(kinds):
            continue  # another sample of that key, as whole as the one before
        if seen[key]:
            torn.setdefault(key, f"{key}.{min(seen[key])} and {key}.{min(kinds)} lie apart")
        seen[key] |= kinds
    if torn:
        yield (
            f"it is not sorted by key: the members of {len(torn)} samples lie apart, such as "
            f"{next(iter(torn.values()))}; write it anew with `tar --sort=name`, or by `glide-ds prepare pack`"
        )


def index_urls(url: str, index_dir: str | None) -> list[str]:
    """Where a shard's index may lie, the preferred place first. Another signature in the URL is the same shard."""
    absolute = bare(url) if is_remote(url) else os.path.abspath(local_path(url))
    name = f"{hashlib.blake2b(absolute.encode(), digest_size=8).hexdigest()}-{os.path.basename(masked(absolute))}.index"
    if index_dir:
        return [os.path.join(index_dir, name)]
    cached = str(cache_dir() / "index" / name)
    if is_remote(url) and "?" in url:  # it asks for the shard, with a signature for that alone
        return [cached]
    return [f"{url if is_remote(url) else absolute}.index", cached]


def read_only(folder: Path) -> bool:
    # root may write anywhere, yet a folder without any write permission says it is not to be written.
    return folder.is_dir() and (not folder.stat().st_mode & 0o222 or not os.access(folder, os.W_OK))


def load_index(url: str, storage: Storage, index_dir: str | None = None) -> ShardIndex | None:
    """A shard's stored index, or None where there is none or it is damaged and must be made again."""
    places = index_urls(url, index_dir)
    for place in sorted(places, key=is_remote):  # a local copy of a remote index costs no request
        try:
            return ShardIndex.from_bytes(storage.read_all(place))
        except FileNotFoundError:
            continue
        except PermissionError:
            if not is_remote(place):  # a store that may not be listed says so of what is not there
                raise
        except (ValueError, KeyError, TypeError):
            return None
    return None


def store_index(
    url: str, index: ShardIndex, storage: Storage, index_dir: str | None = None, *, beside: bool = False
) -> str:
    """Write a shard's index to the first of its places that can be written, and return that place.

    Beside a remote shard only where `beside` asks for it: a training run leaves its store as it is.
    Raises SurroundingsError where it can't be written, DataError where there is no place for it.
    """
    for place in index_urls(url, index_dir):
        if is_remote(place):
            if not beside:
                continue
            try:
                storage.write_all(place, index.to_bytes())
            except OSError:  # a store that is only read, such as a web server: the next place
                continue
            return place
        if read_only(Path(place).parent):
            continue
        try:
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            write_file(place, index.to_bytes())
        except OSError as error:
            raise SurroundingsError(
                f"the index of {url} can't be written to {place}: {error.strerror}",
                "its samples would have to be looked for at every start",
                "make room there or set data.index_dir to another folder, then start the same command again",
            ) from error
        return place
    raise DataError(
        f"no place to write the index of {url}", remedy="set data.index_dir to a folder that can be written"
    )


def scan_shard(url: str, storage: Storage | None = None, stat: Stat | None = None) -> ShardIndex:
    """Read a shard's headers and make its index. A known `stat` saves asking for it."""
    storage = storage or Storage()
    stat = stat or storage.stat(url)
    file = storage.open(url, stat)
    check_is_tar(url, file.read(0, min(BLOCK, stat.size)))
    return build_index(scan_tar(file.read, stat.size), stat.version)


def shard_stat(url: str, storage: Storage) -> Stat:
    """Raises DataError where the shard is not there, SurroundingsError where it can't be asked for."""
    with reading(url):
        try:
            return storage.stat(url)
        except (FileNotFoundError, PermissionError) as error:
            raise DataError(
                f"shard {url} can't be opened: {error}", remedy="check the URL and the access to it"
            ) from error


def open_index(
    url: str, storage: Storage, index_dir: str | None = None, stat: Stat | None = None
) -> ShardIndex:
    """A shard's index, made and stored where missing. A known `stat` saves asking for it.

    Raises DataError where the shard is not there or no longer fits its index, SurroundingsError where one of them
    can't be read or the index can't be written.
    """
    with reading(url):
        return _fitting_index(url, stat or shard_stat(url, storage), storage, index_dir)


def _fitting_index(url: str, stat: Stat, storage: Storage, index_dir: str | None) -> ShardIndex:
    index = load_index(url, storage, index_dir)
    if index is not None and index.head.tar_size != stat.size:
        raise DataError(
            f"shard {url} has {stat.size} bytes, its index was made for {index.head.tar_size}: the tar "
            "was truncated or replaced",
            remedy="restore it, or run `glide-ds prepare index --force` to accept it",
        )
    if index is not None and index.head.scanner < SCANNER:
        index = None
    if index is not None and index.head.version == stat.version:
        return index
    fresh = scan_shard(url, storage, stat)
    if index is not None and index.head.fingerprint != fresh.head.fingerprint:
        raise DataError(
            f"shard {url} changed since its index was made (same size, other members)",
            remedy="restore it, or run `glide-ds prepare index --force` to accept it as it is",
        )
    store_index(url, fresh, storage, index_dir)
    return fresh


def index_of(
    url: str, fingerprint: str, stat: Stat, storage: Storage, index_dir: str | None = None
) -> ShardIndex:
    """The index of a shard that was `stat` and had this fingerprint when the data set was opened.

    One that is lost, damaged or another's is made again. It is not mapped: a file that is cut off or lost under its map
    ends the process, or gives zeros. Raises OSError where index or shard can't be read, DataError where the shard is
    not what it was.
    """
    index = load_index(url, storage, index_dir)
    if index is not None and index.head.fingerprint == fingerprint:
        if is_remote(url) and not os.path.exists(index_urls(url, index_dir)[-1]):
            store_index(url, index, storage, index_dir)  # other processes read this local copy
        return index
    here = [place for place in index_urls(url, index_dir) if not is_remote(place)]
    # A remote shard has none on a host that did not look at it.
    lost = "damaged" if any(map(os.path.exists, here)) else "" if is_remote(url) else "missing"
    fresh = scan_shard(url, storage, stat)
    if fresh.head.fingerprint != fingerprint:
        raise DataError(
            f"shard {url} changed since this run opened it (other members)",
            "its samples are not those that the run's order is made of",
            "put the shard back, or start this run with the new one in another run.dir",
        )
    place = store_index(url, fresh, storage, index_dir)
    if index is not None:
        print(masked(f"the index of {url} is of other members: it was made again in {place}"), flush=True)
    elif lost:
        print(masked(f"the index of {url} is {lost}: it was made again in {place}"), flush=True)
    return fresh
