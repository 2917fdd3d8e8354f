"""`glide-ds prepare index`: make the indexes of many shards at once, in parallel, resumable at any point."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

from glide_ds.data.tars.catalog import Catalog, Entry, Place, store_catalog
from glide_ds.data.tars.index import SCANNER, IndexHead, load_index, scan_shard, store_index
from glide_ds.data.tars.patterns import expand
from glide_ds.data.tars.storage import Storage
from glide_ds.data.workers import end_with
from glide_ds.errors import GlideError
from glide_ds.files import user_path
from glide_ds.masking import masked
from glide_ds.progress import Progress


class Indexed(NamedTuple):
    url: str
    samples: int
    made: bool  # False where a fitting index was there
    duplicates: int = 0  # samples with a key that an earlier one of the shard has
    damage: tuple[str, ...] = ()
    error: str = ""
    entry: Entry | None = None  # what the catalog is to say of it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", help="brace patterns, globs, folders or URLs of tar files")
    parser.add_argument(
        "--index_dir", type=user_path, help="where to write; default: beside each shard, else the user's cache"
    )
    parser.add_argument("--force", action="store_true", help="make indexes again, accepting changed shards")
    parser.add_argument("--workers", type=int, default=4)


def run(args: argparse.Namespace) -> int:
    """Index every shard; the exit code is 1 where a shard is damaged or can't be read."""
    urls = expand(args.shards)
    results = list(_with_progress(urls, args))
    made = sum(result.made for result in results)
    samples = sum(result.samples for result in results)
    print(f"{len(results)} shards, {samples} samples; {made} indexes made, {len(results) - made} were there")
    if doubled := [result for result in results if result.duplicates]:
        count = sum(result.duplicates for result in doubled)
        print(
            masked(
                f"{count} samples have a key that was there before in their shard, the first in {doubled[0].url}"
            )
        )
    faulty = [result for result in results if result.damage or result.error]
    for result in faulty:
        print(masked(f"{result.url}: {result.error or '; '.join(result.damage)}"), file=sys.stderr)
    entries = [result.entry for result in results if result.entry is not None]
    if len(entries) == len(urls):
        place = Place.for_shards(urls, args.index_dir)
        stored = store_catalog(place, Catalog.of(entries).to_bytes(place.of), Storage(), beside=True)
        print(masked(f"the catalog of these {len(urls):,} shards: {stored or 'not written'}"))
    else:
        print("no catalog of these shards, for not all of them can be read")
    if not faulty:
        print("Next: glide-ds preflight --ds_config ds_configs/base.json --set data.shards=… with these shards")
    return 1 if faulty else 0


def _with_progress(urls: Sequence[str], args: argparse.Namespace) -> Iterator[Indexed]:
    print(f"indexing {len(urls):,} shards", flush=True)
    with Progress("indexing", len(urls), "shards") as progress:
        yield from progress.over(index_shards(urls, args.index_dir, args.force, args.workers))


def index_shards(
    urls: Sequence[str], index_dir: str | None = None, force: bool = False, workers: int = 1
) -> Iterator[Indexed]:
    """Index shards in order. An index that fits its shard is left as it is, so a second run resumes the first."""
    task = partial(index_one, index_dir=index_dir, force=force)
    if workers <= 1:
        yield from map(task, urls)
        return
    with ProcessPoolExecutor(min(workers, len(urls)), initializer=end_with, initargs=(os.getpid(),)) as pool:
        yield from pool.map(task, urls)


def index_one(url: str, index_dir: str | None = None, force: bool = False) -> Indexed:
    """Make one shard's index where it is missing or `force` asks for it; every failure is in the result."""
    storage = Storage()
    try:
        stat = storage.stat(url)
        old = None if force else load_index(url, storage, index_dir)
        if old is not None and old.head.scanner < SCANNER:
            old = None
        if old is not None and (old.head.tar_size, old.head.version) == stat:
            return _indexed(url, old.head, made=False)
        fresh = scan_shard(url, storage, stat)
        if old is not None and old.head.fingerprint != fresh.head.fingerprint:
            return Indexed(url, 0, made=False, error="changed since its index was made; --force accepts it")
        store_index(url, fresh, storage, index_dir, beside=True)
    except (GlideError, OSError, EOFError) as error:
        return Indexed(url, 0, made=False, error=str(error))
    return _indexed(url, fresh.head, made=True)


def _indexed(url: str, head: IndexHead, *, made: bool) -> Indexed:
    return Indexed(url, head.samples, made, head.duplicates, head.damage, entry=Entry.of(head))
