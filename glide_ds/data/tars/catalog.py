"""The catalog of a data set: what a start needs of every shard, in one file, so that it need not read their indexes.

It is written by `glide-ds prepare index` and by the first start, beside the shards, or in a cache folder where that
place is read-only. A row holds as long as its shard has the size and version that it had; any other is made anew from
the shard's index. Processes that start together share the looking, each its part.

N shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from glide_ds.config import cache_dir
from glide_ds.data.tars.index import SCANNER, IndexHead, open_index, read_only, shard_stat
from glide_ds.data.tars.peers import Alone, Peers
from glide_ds.data.tars.storage import Stat, Storage, common_start, fault, is_remote, local_path
from glide_ds.files import write_file
from glide_ds.masking import bare, masked
from glide_ds.progress import Progress

MAGIC = b"glide_ds catalog 1\n"
CATALOGS = "glide_ds-*.catalog"  # beside shards
THREADS = 16  # that wait for disks and stores
TURNS = 8  # in which each of them asks for its shards: a turn costs more than what a local disk takes for one
MANY = 100  # shards to look at, from which on it is said beforehand

S = TypeVar("S")
R = TypeVar("R")
Names = NDArray[np.bytes_]
Ints = NDArray[np.int64]


# ---- rows


class UnfitError(ValueError):
    """What is wrong with a catalog's bytes."""


class Entry(NamedTuple):
    """What is known of a shard without its index."""

    samples: int
    tar_size: int
    version: str  # of the tar's content, as storage.Stat has it
    fingerprint: str  # of the keys and where every member lies
    duplicates: int  # samples whose key an earlier sample of the shard has
    extensions: tuple[str, ...]
    damage: tuple[str, ...]

    @classmethod
    def of(cls, head: IndexHead) -> Entry:
        return cls(*(getattr(head, name) for name in cls._fields))

    @property
    def stat(self) -> Stat:
        return Stat(self.tar_size, self.version)


@dataclass(frozen=True, eq=False)
class Catalog:
    """What is known of N shards. An array, for an object per shard would take more memory than all the rest."""

    rows: NDArray[np.void]  # [N], of row_type
    forms: tuple[tuple[str, ...], ...]  # extensions that shards have
    damage: dict[int, tuple[str, ...]]  # of those shards that have some

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Catalog:
        forms = {
            each: number for number, each in enumerate(dict.fromkeys(entry.extensions for entry in entries))
        }
        versions = names([entry.version for entry in entries])
        rows = np.zeros(len(entries), row_type(versions.itemsize))
        rows["version"] = versions
        rows["fingerprint"] = names([entry.fingerprint for entry in entries])
        for name in ("samples", "tar_size", "duplicates"):
            rows[name] = [getattr(entry, name) for entry in entries]
        rows["form"] = [forms[entry.extensions] for entry in entries]
        return cls(rows, tuple(forms), {n: entry.damage for n, entry in enumerate(entries) if entry.damage})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, shard: int) -> Entry:
        """Raises IndexError, so that a catalog can be gone over."""
        samples, size, version, fingerprint, duplicates, form = self.rows[shard].item()
        damage = self.damage.get(shard, ())
        return Entry(
            samples, size, version.decode(), fingerprint.decode(), duplicates, self.forms[form], damage
        )

    def __iter__(self) -> Iterator[Entry]:
        return map(self.__getitem__, range(len(self)))

    def __add__(self, other: Catalog) -> Catalog:
        """The rows of both, this one's first."""
        return Catalog.joined([self, other])

    @classmethod
    def joined(cls, parts: Sequence[Catalog]) -> Catalog:
        """The rows of all, in their order."""
        rows = np.concatenate([part.rows for part in parts])
        forms: dict[tuple[str, ...], int] = {}
        damage: dict[int, tuple[str, ...]] = {}
        first = 0
        for part in parts:
            numbers = np.array([forms.setdefault(form, len(forms)) for form in part.forms], np.int64)
            rows["form"][first : first + len(part)] = numbers[part.rows["form"]]
            damage |= {first + shard: notes for shard, notes in part.damage.items()}
            first += len(part)
        return cls(rows, tuple(forms), damage)

    def take(self, shards: Ints) -> Catalog:
        """Those rows, in that order."""
        rows = self.rows[shards]
        used, rows["form"] = np.unique(rows["form"], return_inverse=True)
        damaged = np.flatnonzero(np.isin(shards, list(self.damage))).tolist()
        damage = {place: self.damage[int(shards[place])] for place in damaged}
        return Catalog(rows, tuple(self.forms[form] for form in used.tolist()), damage)

    # ---- as a file

    def to_bytes(self, of: str) -> bytes:
        """`of`: the digest of the shards' names."""
        head = {
            "scanner": SCANNER,
            "version_bytes": self.rows["version"].itemsize,
            "forms": self.forms,
            "damage": sorted(self.damage.items()),
        }
        return packed(of, head, self.rows)

    @classmethod
    def from_bytes(cls, data: bytes, of: str) -> Catalog:
        """Raises ValueError, saying what is wrong, where the bytes are no whole catalog of these shards."""
        head, body = unpacked(of, data)
        if head["scanner"] < SCANNER:
            raise UnfitError("was made by a version that looked less closely")
        rows = np.frombuffer(body, row_type(head["version_bytes"]))
        damage = {shard: tuple(notes) for shard, notes in head["damage"]}
        return cls(rows, tuple(map(tuple, head["forms"])), damage)


def row_type(version_bytes: int) -> np.dtype[np.void]:
    """Of a shard's row: Entry's fields, but for damage, which few have; `form` is a number into Catalog.forms."""
    numbers = ("samples", "<i8"), ("tar_size", "<i8")
    texts = ("version", f"S{version_bytes}"), ("fingerprint", "S32")
    return np.dtype([*numbers, *texts, ("duplicates", "<i8"), ("form", "<i8")])


def names(texts: Sequence[str]) -> Names:
    """Texts as an array of UTF-8."""
    return np.array([text.encode() for text in texts] or [b""], np.bytes_)[: len(texts)]


def packed(of: str, head: dict[str, Any], rows: NDArray[np.void]) -> bytes:
    """A catalog's file: rows, and a `head` for JSON. `of` says what it is of."""
    data = zlib.compress(json.dumps(head | {"of": of}).encode() + b"\n" + rows.tobytes(), 1)
    return MAGIC + hashlib.blake2b(data, digest_size=16).digest() + data


def unpacked(of: str, data: bytes) -> tuple[dict[str, Any], bytes]:
    """(head, bytes of the rows). Raises UnfitError, and other ValueErrors, where the bytes are not whole."""
    start = len(MAGIC) + 16
    if data[: len(MAGIC)] != MAGIC:
        raise UnfitError("is no catalog of this version")
    if data[len(MAGIC) : start] != hashlib.blake2b(data[start:], digest_size=16).digest():
        raise UnfitError("is damaged")
    text, _, body = zlib.decompress(data[start:]).partition(b"\n")
    head = dict(json.loads(text))
    if head["of"] != of:
        raise UnfitError("is of another data set")
    return head, body


# ---- where it lies


class Place(NamedTuple):
    """Where a data set's catalog may lie, and what it must say that it is of."""

    of: str  # digest of the shards' names, below the folder that they share: it holds where that is moved
    urls: list[str]  # the preferred one first

    @classmethod
    def for_shards(cls, urls: Sequence[str], index_dir: str | None) -> Place:
        whole = [
            url if "://" in url or url.startswith("/") else os.path.abspath(local_path(url)) for url in urls
        ]
        named = [bare(url) for url in whole]
        folder, common = _folder(whole), _folder(named)
        if any(is_remote(url) and "?" in url for url in whole):  # signed, for the shards alone
            folder = ""
        of = _digest(url[len(common) :] for url in named)
        elsewhere = cached([common, of])
        if index_dir:
            return cls(of, [os.path.join(index_dir, os.path.basename(elsewhere))])
        beside = [f"{folder}/{CATALOGS.replace('*', of)}"] if folder else []
        return cls(of, [*beside, elsewhere])


def _folder(urls: Sequence[str]) -> str:
    """What they all lie in; empty where they have only a protocol in common, or nothing."""
    folder = common_start(urls).rpartition("/")[0]
    return "" if "://" in folder and not folder.partition("://")[2] else folder


def cached(of: Sequence[str]) -> str:
    """Where a catalog is kept that has no place beside what it is of."""
    return str(cache_dir() / "index" / f"{_digest(of)}.catalog")


def _digest(texts: Iterator[str] | Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=8).hexdigest()


def tell(text: str) -> None:
    print(masked(text), flush=True)


def sayer(peers: Peers) -> Callable[[str], None]:
    """What says a line, once for all processes."""
    return tell if peers.shown else lambda text: None


def load_catalog(
    place: Place,
    parse: Callable[[bytes, str], R],
    storage: Storage,
    say: Callable[[str], None] = tell,
) -> R | None:
    """What is stored there as `parse` (from_bytes) gives it, or None where nothing is whole; what is wrong is said.

    Raises SurroundingsError where a file can't be read.
    """
    here = [url for url in place.urls if not is_remote(url) and os.path.exists(url)]
    newest_first = sorted(here, key=os.path.getmtime, reverse=True)
    for url in (*newest_first, *filter(is_remote, place.urls)):
        try:
            return parse(storage.read_all(url), place.of)
        except FileNotFoundError:
            continue
        except OSError as error:
            if not (
                is_remote(url) and isinstance(error, PermissionError)
            ):  # what a store says that may not be listed
                raise fault(url, error) from error
        except (ValueError, KeyError, TypeError, IndexError, zlib.error) as error:
            why = error if isinstance(error, UnfitError) else "is damaged"
            say(f"the catalog {url} {why}: it is made anew")
    return None


def store_catalog(
    place: Place, data: bytes, storage: Storage, say: Callable[[str], None] = tell, *, beside: bool = False
) -> str | None:
    """Write a catalog to the first of its places that takes it, and return that one.

    Beside remote shards only where `beside` asks for it, as indexes are. Without it a start takes longer and nothing
    else changes, so a place that takes nothing is said and no error.
    """
    for url in place.urls:
        if is_remote(url) and not beside:
            continue
        try:
            _write(url, data, storage)
        except OSError as error:
            say(f"the catalog can't be written to {url}: {error.strerror or error}")
            continue
        if url != place.urls[0] and not is_remote(place.urls[0]):
            say(f"it is kept in {url}")
        return url
    say(
        "without a catalog every start looks at every shard: set data.index_dir to a folder that can be written"
    )
    return None


def _write(url: str, data: bytes, storage: Storage) -> None:
    if is_remote(url):
        storage.write_all(url, data)
        return
    folder = Path(url).parent
    if read_only(folder):
        raise PermissionError(f"{folder} is read-only")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(url, data)


# ---- looking at the shards


def look(
    urls: Sequence[str], storage: Storage, index_dir: str | None = None, peers: Peers | None = None
) -> Catalog:
    """What is known of each shard as it is now: by the stored catalog where it holds, else by the shard's index.

    Makes the indexes that are missing, and the catalog anew where anything was. Raises DataError and SurroundingsError
    as open_index does.
    """
    peers = peers or Alone()
    say = sayer(peers)
    place = Place.for_shards(urls, index_dir)
    listed = peers.first(lambda: storage.listed(urls)) if any(map(is_remote, urls)) else None
    stored = peers.first(lambda: load_catalog(place, Catalog.from_bytes, storage, say))
    found = peers.each(lambda: _look_at_mine(urls, storage, index_dir, peers, stored, listed))
    rows, fresh = np.concatenate([rows for rows, _ in found]), [part for rows, part in found if len(rows)]
    if not fresh:
        assert stored is not None
        return stored
    base = stored or fresh[0].take(np.zeros(len(urls), np.int64))  # each row of which is replaced
    catalog = _replaced(base, rows, fresh)
    peers.first(lambda: store_catalog(place, catalog.to_bytes(place.of), storage, say))
    return catalog


def _replaced(base: Catalog, rows: Ints, fresh: Sequence[Catalog]) -> Catalog:
    order = np.arange(len(base))
    order[rows] = len(base) + np.arange(len(rows))
    return Catalog.joined([base, *fresh]).take(order)


def stale(
    urls: Sequence[str],
    mine: Ints,
    storage: Storage,
    stored: Catalog | None,
    listed: tuple[Ints, Names] | None = None,
    shown: bool = False,
) -> tuple[Ints, list[Stat]]:
    """Which of the shards `mine` are not as the stored catalog says, and what they are now.

    `listed`: sizes and versions from a listing, a size of -1 where it had none.
    """
    sizes, versions = _stats(urls, mine, storage, listed, shown)
    if stored is None:
        fits = np.zeros(len(mine), np.bool_)
    else:
        fits = (stored.rows["tar_size"][mine] == sizes) & (stored.rows["version"][mine] == versions)
    others = np.flatnonzero(~fits)
    return mine[others], [Stat(int(sizes[n]), versions[n].decode()) for n in others]


def _stats(
    urls: Sequence[str], mine: Ints, storage: Storage, listed: tuple[Ints, Names] | None, shown: bool
) -> tuple[Ints, Names]:
    asked = mine if listed is None else mine[listed[0][mine] < 0]
    found = by_threads(lambda number: shard_stat(urls[number], storage), asked.tolist(), TURNS)
    with Progress("asking for sizes", len(asked), "shards", shown=shown and len(asked) > MANY) as progress:
        stats = list(progress.over(found))
    sizes, versions = np.array([stat.size for stat in stats], np.int64), names([stat.version for stat in stats])
    if listed is None:
        return sizes, versions
    width = max(versions.itemsize, listed[1].itemsize)
    all_sizes, all_versions = listed[0][mine], listed[1][mine].astype(f"S{width}")
    unlisted = all_sizes < 0
    all_sizes[unlisted], all_versions[unlisted] = sizes, versions
    return all_sizes, all_versions


def _look_at_mine(
    urls: Sequence[str],
    storage: Storage,
    index_dir: str | None,
    peers: Peers,
    stored: Catalog | None,
    listed: tuple[Ints, Names] | None,
) -> tuple[Ints, Catalog]:
    rows, stats = stale(urls, peers.mine(len(urls)), storage, stored, listed, peers.shown)
    with Progress("looking at", len(rows), "shards", shown=peers.shown and len(rows) > 0) as progress:
        if len(rows) > MANY:
            why = "there is no catalog yet" if stored is None else "they changed since the catalog was made"
            progress.line(f"looking at {len(rows):,} of {len(urls):,} shards: {why}")

        def entry(number: int) -> Entry:
            return Entry.of(open_index(urls[rows[number]], storage, index_dir, stats[number]).head)

        entries = list(progress.over(by_threads(entry, range(len(rows)))))
    return rows, Catalog.of(entries)


def by_threads(action: Callable[[S], R], items: Sequence[S], turns: int | None = None) -> Iterator[R]:
    """`map` by threads, each item by itself or all in so many turns. The first error in their order ends it."""
    chunk = -(-len(items) // (THREADS * turns)) if turns and items else 1
    chunks = [items[start : start + chunk] for start in range(0, len(items), chunk)]
    if len(chunks) <= 1:
        yield from map(action, items)
        return

    def each(part: Sequence[S]) -> list[R]:
        return [action(item) for item in part]

    pool = ThreadPoolExecutor(min(THREADS, len(chunks)))
    try:
        for done in pool.map(each, chunks):
            yield from done
    finally:
        pool.shutdown(cancel_futures=True)
