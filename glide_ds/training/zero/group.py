"""The process group: from a launched process to an initialised rank on its device."""

from __future__ import annotations

import datetime
import functools
import logging
import os
from typing import Any

import torch
import torch.distributed as dist

from glide_ds.environment import ranks_here
from glide_ds.errors import ConfigError, LostError


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
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // (ranks_here() or 1)))
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            timeout=datetime.timedelta(seconds=timeout_s),
            verbose=False,
        )
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise _port_taken() from error
        raise LostError(
            f"the {os.environ['WORLD_SIZE']} ranks did not all meet at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within run.timeout_s={timeout_s:g} "
            f"({str(error).splitlines()[0]})",
            remedy="look for a rank that ended before, then start the same command again",
        ) from error
    return torch.device("cuda", local) if on_gpu else torch.device("cpu")


def _port_taken() -> ConfigError:
    port = os.environ["MASTER_PORT"]
    return ConfigError(
        f"port {port} of {os.environ['MASTER_ADDR']} is in use by another program, maybe another run",
        "the ranks can't meet there",
        f"choose another: deepspeed --master_port {(int(port) + 1) % 2**16} …, torchrun --master-port, or MASTER_PORT",
    )


def limit_waiting(timeout_s: float) -> None:
    """Give every process group the run's timeout: those that DeepSpeed makes for itself wait for torch's 30 minutes.

    Measured over gloo with the link between two nodes cut: without it a run with run.timeout_s = 20 hung on.
    """
    c10d: Any = dist.distributed_c10d
    set_timeout = getattr(c10d, "set_timeout", None) or c10d._set_pg_timeout  # its name before torch 2.15
    for group in list(c10d._world.pg_map):
        set_timeout(datetime.timedelta(seconds=timeout_s), group)


def own_store() -> dist.Store:
    """A connection to the process group's store beside the group's, where waiting would block whatever else uses it."""
    c10d: Any = dist.distributed_c10d
    return _clone(c10d._get_default_store())


@functools.lru_cache(maxsize=1)
def _clone(store: Any) -> dist.Store:
    """One for all savers of a process: every 25th that is opened takes torch 5 s."""
    cloned: dist.Store = store.clone()
    return cloned
