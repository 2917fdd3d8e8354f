"""The process group: from any launcher's environment to an initialised rank on its device."""

from __future__ import annotations

import datetime
import logging
import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from glide_ds.errors import ConfigError, GlideError, LostError

T = TypeVar("T")

SLURM_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def read_environment() -> tuple[int, int]:
    """(rank, world size) from the launcher's variables; a plain `python` start is one rank of one.

    Fills in what torch.distributed reads: RANK, WORLD_SIZE, LOCAL_RANK (from Slurm's names under
    `srun`), MASTER_ADDR and MASTER_PORT for a single process.
    """
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ:
        os.environ.update({name: os.environ[slurm] for name, slurm in SLURM_NAMES.items()})
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    if os.environ["WORLD_SIZE"] == "1" and "MASTER_ADDR" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    missing = [n for n in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise ConfigError(
            f"RANK={os.environ['RANK']} is set but {', '.join(missing)} is not, so the ranks can't find each "
            "other; start with deepspeed, torchrun or srun, or set all of them"
        )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _import_muon() -> None:
    """Import what DeepSpeed looks up to tell whether an optimizer is Muon, without compiling Muon: 4 s."""
    from deepspeed.runtime import compiler

    compiled, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compiled


def start_process_group(timeout_s: float) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and return this rank's device."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns of what the opening block says
    import deepspeed

    # Saves DeepSpeed's JIT build of a shared-memory extension: 22-49 s, and a failure without g++.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon()
    local = int(os.environ["LOCAL_RANK"])
    if on_gpu:
        torch.cuda.set_device(local)
    if "OMP_NUM_THREADS" not in os.environ:
        # The deepspeed launcher leaves it unset, and every rank would then use every core.
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            timeout=datetime.timedelta(seconds=timeout_s),
            verbose=False,
        )
    except dist.DistError as error:
        raise LostError(
            f"the {os.environ['WORLD_SIZE']} ranks did not all meet at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within run.timeout_s={timeout_s:g} ({str(error).splitlines()[0]}); look for "
            "a rank that ended before, then start the same command again"
        ) from error
    return torch.device("cuda", local) if on_gpu else torch.device("cpu")


def limit_waiting(timeout_s: float) -> None:
    """Give every process group the run's timeout: those that DeepSpeed makes for itself wait for torch's 30 minutes.

    Measured over gloo with the link between two nodes cut: without it a run with run.timeout_s = 20 hung on.
    """
    c10d: Any = dist.distributed_c10d
    set_timeout = getattr(c10d, "set_timeout", None) or c10d._set_pg_timeout  # its name before torch 2.15
    for group in list(c10d._world.pg_map):
        set_timeout(datetime.timedelta(seconds=timeout_s), group)


def agreed(action: Callable[[], T]) -> T:
    """`action()`'s value; where it fails on some ranks, all ranks raise the lowest one's error.

    Called by all ranks alike. Without this, one rank's mistake leaves the others waiting for it.
    """
    failure: GlideError | None = None
    value: T | None = None
    try:
        value = action()
    except GlideError as error:
        failure = error
    except OSError as error:
        failure = GlideError(f"{error}; check the path, its permissions and the free space")
    failures: list[GlideError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for first in failures:
        if first is not None:
            first.on_all_ranks = True
            raise first
    return value  # type: ignore[return-value]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
