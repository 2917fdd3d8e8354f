"""Checks between ranks: the folder they share, their clocks, the network. All ranks run them alike."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from glide_ds.errors import Fault
from glide_ds.preflight.site import Finding, Site, failed

MAX_SKEW_S = 2.0  # more, and file times, logs and requeue deadlines contradict each other
MESSAGE_BYTES = {"cuda": 64 * 2**20, "cpu": 16 * 2**20}
MAX_PAIRED_NODES = 16  # of more nodes only neighbours are measured: the pairs grow with the square
SLOW = 0.5  # a pair below this share of the median is named

ALONE = Finding("one rank here: launch over all of them to check", skipped=True)


def shared_folder(site: Site) -> Finding:
    """What rank 0 writes into the run directory every rank must see: checkpoints are committed so."""
    if site.ranks == 1:
        return ALONE
    probe = [Path(site.config.run.dir) / f".preflight-shared-{time.time_ns()}"]
    dist.broadcast_object_list(probe)
    if site.rank == 0:
        probe[0].parent.mkdir(parents=True, exist_ok=True)
        probe[0].touch()
    dist.barrier()
    seen = _appears(probe[0])
    dist.barrier()
    if site.rank == 0:
        probe[0].unlink()
    if seen:
        return Finding(f"{site.config.run.dir} is one folder for all ranks")
    fact = f"{probe[0].parent.absolute()} is not the folder that rank 0 writes to, so no checkpoint could be committed"
    return failed(fact, "give run.dir an absolute path on a file system that all nodes share")


def _appears(path: Path, patience_s: float = 3.0) -> bool:
    deadline = time.monotonic() + patience_s  # a network file system may show a new file late
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def clocks(site: Site) -> Finding:
    """Every rank's clock against rank 0's, read after a barrier, so to within the barrier's spread."""
    if site.ranks == 1:
        return ALONE
    dist.barrier()
    now: list[Any] = [None] * site.ranks
    dist.all_gather_object(now, (site.host, time.time()))
    return judge_clocks(now)


def judge_clocks(now: Sequence[tuple[str, float]]) -> Finding:
    """`now`: host and clock of every rank at one moment."""
    skews = {host: seconds - now[0][1] for host, seconds in now}
    worst = max(abs(skew) for skew in skews.values())
    faults = tuple(
        Fault(
            f"the clock of {host} is {skew:+.1f} s from that of {now[0][0]}",
            remedy="start NTP or chrony on that node",
        )
        for host, skew in skews.items()
        if abs(skew) > MAX_SKEW_S
    )
    return Finding(f"within {worst:.3f} s of each other", faults)


def network(site: Site) -> Finding:
    """An all-reduce whose sum is known, its speed, and the speed between every two nodes."""
    if site.ranks == 1:
        return ALONE
    site.progress(f"all-reduce over {site.ranks} ranks")
    numbers = MESSAGE_BYTES[site.device.type] // 4
    values = torch.arange(numbers, device=site.device, dtype=torch.float32).remainder_(1024) + site.rank
    dist.all_reduce(values.clone())  # opens the connections
    started = _now(site)
    dist.all_reduce(values)
    seconds = _now(site) - started
    wanted = torch.arange(numbers, device=site.device, dtype=torch.float32).remainder_(1024) * site.ranks
    wrong = int((values != wanted + sum(range(site.ranks))).sum())
    # A ring moves 2 (n - 1) / n of the bytes over each link (Patarasuk & Yuan 2009).
    moved = 4 * numbers * 2 * (site.ranks - 1) / site.ranks
    text = f"all-reduce right on {site.ranks} ranks, {moved / seconds / 1e9:.2f} GB/s"
    faults = []
    if wrong:
        faults.append(
            Fault(
                f"the all-reduce gave rank {site.rank} on {site.host} {wrong} of {numbers} wrong sums",
                remedy="take that node out of the job and have its network card and cables tested",
            )
        )
    speeds = _pairs(site)
    names, slow = judge_pairs(speeds)
    return Finding(f"{text}; {names}", (*faults, *slow))


def _pairs(site: Site) -> dict[tuple[str, str], float]:
    """Bytes per second between every two nodes, or between neighbours where there are many."""
    hosts: list[Any] = [None] * site.ranks
    dist.all_gather_object(hosts, site.host)
    firsts = [hosts.index(host) for host in dict.fromkeys(hosts)]
    if len(firsts) == 1:
        firsts = list(range(site.ranks))  # one node: between its ranks
    pairs = list(itertools.combinations(firsts, 2))
    if len(firsts) > MAX_PAIRED_NODES:
        pairs = list(itertools.pairwise(firsts))
    buffer = torch.empty(MESSAGE_BYTES[site.device.type] // 4, device=site.device)
    speeds = {}
    for number, (a, b) in enumerate(pairs):
        site.progress(f"pair {number + 1} of {len(pairs)}")
        speed = torch.zeros(1, device=site.device)
        if site.rank in (a, b):
            _ping(site.rank == a, a, b, buffer[:1])
            started = _now(site)
            _ping(site.rank == a, a, b, buffer)
            speed += 2 * buffer.nbytes / (_now(site) - started) * (site.rank == a)
        dist.all_reduce(speed)
        speeds[f"{hosts[a]} rank {a}", f"{hosts[b]} rank {b}"] = float(speed)
    return speeds


def _ping(first: bool, a: int, b: int, buffer: torch.Tensor) -> None:
    if first:
        dist.send(buffer, b)
        dist.recv(buffer, b)
    else:
        dist.recv(buffer, a)
        dist.send(buffer, a)


def judge_pairs(speeds: dict[tuple[str, str], float]) -> tuple[str, tuple[Fault, ...]]:
    """Bytes per second by pair, in words, and the pairs that are slow beside the others."""
    ordered = sorted(speeds.values())
    median = ordered[len(ordered) // 2]
    faults = tuple(
        Fault(
            f"between {a} and {b} only {speed / 1e9:.2f} GB/s pass, the median pair has {median / 1e9:.2f}",
            remedy="leave one of the two nodes out, or set GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME to the fast network",
        )
        for (a, b), speed in speeds.items()
        if speed < SLOW * median
    )
    return f"{len(speeds)} pairs at {ordered[0] / 1e9:.2f} to {ordered[-1] / 1e9:.2f} GB/s", faults


def _now(site: Site) -> float:
    if site.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
