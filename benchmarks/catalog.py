"""What a start costs by the number of shards: time, bytes read, memory, and requests to a store.

    python benchmarks/catalog.py --out benchmarks/results/catalog-cpu.json

`--shards` shards of `--per_shard` samples are sparse tars: they have their size and no content, and their indexes are
links to one, as the notes of their embeddings are. A start is a fresh process that opens the set, as a rank does, reads
the members of a first batch and opens the CLIP store; what a set of ten shards takes is taken off its memory. It looks
at all shards itself; ranks that start together look at their part each. Requests are those that reach moto's S3 from
`--ranks` processes that open `--s3_shards` shards together over gloo, with the catalog in place, where the store may be
listed and where not.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import environment

from glide_ds.data.clip_notes import Encoder, StoreNote
from glide_ds.data.clip_store import ClipStore
from glide_ds.data.order import Order, micro_slots
from glide_ds.data.tars.catalog import Catalog, Entry, Place, store_catalog
from glide_ds.data.tars.index import build_index, index_urls
from glide_ds.data.tars.scan import BLOCK, Member, Scan
from glide_ds.data.tars.shards import open_shards
from glide_ds.data.tars.storage import Storage

RANKS, MICRO = 8, 64
ENCODER = Encoder("ViT-B/32", "openai", "text")
FEW = 10  # shards of the set that others are compared with
DENIED = "<Error><Code>AccessDenied</Code><Message>it may not be listed</Message></Error>"
LINKS = 60_000  # of a file that a file system allows, at least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--per_shard", type=int, default=10_000)
    parser.add_argument("--s3_shards", type=int, default=2000)
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--start", help=argparse.SUPPRESS)  # the folder: this is the process that is measured
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(args.start)))
        return
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        few, many = Path(place) / "few", Path(place) / "many"
        write_set(few, FEW, args.per_shard)
        write_set(many, args.shards, args.per_shard)
        small, large = fresh_start(few), fresh_start(many)
        figures["catalog, MB"] = sum(path.stat().st_size for path in many.glob("*.catalog")) / 1e6
    for name, value in large.items():
        figures[f"{args.shards:,} shards: {name}"] = value
    figures["memory over a set of ten, MB"] = large["memory, MB"] - small["memory, MB"]
    figures |= requests(args.s3_shards, args.ranks)
    for name, value in figures.items():
        print(f"{name:64s} {value:12.4g}")
    if args.out:
        args.out.write_text(
            json.dumps({"environment": environment("cpu"), "figures": figures}, indent=1) + "\n"
        )


# ---- a start


def write_set(folder: Path, shards: int, per_shard: int) -> None:
    """Sparse tars, their indexes and their catalog, and the notes of a CLIP store."""
    folder.mkdir()
    kinds, blocks, members = (("jpg", 40_000), ("json", 400), ("txt", 60)), 0, []
    for number in range(per_shard):
        for kind, size in kinds:
            members.append(Member(f"{number:08d}.{kind}", (blocks + 1) * BLOCK, size))
            blocks += 1 + -(-size // BLOCK)
    index = build_index(Scan((blocks + 2) * BLOCK, members), "mtime 1000000000")
    urls = [str(folder / f"{number:06d}.tar") for number in range(shards)]
    note = StoreNote(ENCODER, "weights", index.head.fingerprint, index.head.version, per_shard, 768, missing=0)
    (folder / "clip").mkdir()
    for number, url in enumerate(urls):
        with open(url, "wb") as file:
            file.truncate(index.head.tar_size)
        os.utime(url, (1, 1))
        beside = index_urls(url, None)[0]
        noted = folder / "clip" / f"{number:06d}.{index.head.fingerprint[:12]}.{0:012d}.json"
        if number % LINKS == 0:
            Path(beside).write_bytes(index.to_bytes())
            noted.write_bytes(note.to_json())
            linked = beside, noted
        else:
            os.link(linked[0], beside)
            os.link(linked[1], noted)
    rows = Catalog.of([Entry.of(index.head)]).take(np.zeros(shards, np.int64))
    place = Place.for_shards(urls, None)
    store_catalog(place, rows.to_bytes(place.of), Storage())


def fresh_start(folder: Path) -> dict[str, float]:
    """In a process of its own, once the folder is in the system's cache."""
    command = [sys.executable, __file__, "--start", str(folder)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def start(folder: str) -> dict[str, float]:
    """What one rank of eight does, by itself."""
    before, begun, used = bytes_read(), time.perf_counter(), time.process_time()
    held = open_shards(folder)
    opened, cpu = time.perf_counter(), time.process_time()
    read = bytes_read()
    order = Order(held.sizes, RANKS * MICRO, seed=0, fingerprint=1)
    held.keep_open(order.shards_in_turn(RANKS))
    for sample in order.draw(0, micro_slots(0, MICRO, 0, RANKS)).ids.tolist():
        held.read(sample)
    batch, noted = time.perf_counter() - opened, time.perf_counter()
    ClipStore(f"{folder}/clip", held, ENCODER)
    return {
        "start, s": opened - begun,
        "start, s of CPU": cpu - used,
        "first batch, s": batch,
        "read at the start, MB": (read - before) / 1e6,
        "opening a CLIP store, s": time.perf_counter() - noted,
        "memory, MB": memory(),
    }


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def memory() -> float:
    """The most that this process held, in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1e3


# ---- requests


class Counted:
    """moto's S3, which counts what reaches it, and lists nothing where `closed`."""

    def __init__(self) -> None:
        import moto.server
        from werkzeug.serving import make_server
        from werkzeug.wrappers import Response

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.count, self.closed = 0, False
        emulator = moto.server.DomainDispatcherApplication(moto.server.create_backend_app)

        def application(environ: dict[str, Any], respond: Any) -> Any:
            self.count += 1
            if self.closed and "list-type" in environ["QUERY_STRING"]:
                return Response(DENIED, 403, content_type="application/xml")(environ, respond)
            return emulator(environ, respond)

        handler = moto.server.MotoRequestHandler
        self.server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def requests(shards: int, ranks: int) -> dict[str, float]:
    """Requests per shard until every rank has the set open, the first time and with the catalog in place."""
    import s3fs

    served = Counted()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{served.server.server_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    tar = one_sample()
    bucket = s3fs.S3FileSystem(skip_instance_cache=True)
    bucket.mkdir("laion")
    bucket.pipe({f"laion/set/{number:05d}.tar": tar for number in range(shards)})
    pattern, figures = f"s3://laion/set/{{00000..{shards - 1:05d}}}.tar", {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["GLIDE_DS_CACHE"] = cache
        for case, closed, count in (
            ("the first time, alone", False, 1),
            (f"by listings, {ranks} ranks", False, ranks),
            (f"without listings, {ranks} ranks", True, ranks),
        ):
            served.count, served.closed = 0, closed
            begun = time.perf_counter()
            together(count, pattern)
            figures[f"S3, {shards:,} shards, {case}: requests per shard"] = served.count / shards
            figures[f"S3, {shards:,} shards, {case}: s"] = time.perf_counter() - begun
    served.server.shutdown()
    return figures


def together(ranks: int, pattern: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=as_rank, args=(rank, ranks, port, pattern)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert not any(process.exitcode for process in processes)


def as_rank(rank: int, ranks: int, port: int, pattern: str) -> None:
    import torch.distributed as dist

    from glide_ds.training.faults.ranks import Ranks, agreed

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    agreed(lambda: open_shards(pattern, peers=Ranks()))
    dist.barrier()
    dist.destroy_process_group()


def one_sample() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in (("0.jpg", b"no picture"), ("0.txt", b"a caption")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


if __name__ == "__main__":
    main()
