"""The last check: the real model takes one step, saves, and loads what it saved."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from glide_ds.config import Config, with_changes
from glide_ds.errors import GlideError
from glide_ds.preflight.site import Finding, Site, failed
from glide_ds.training.checkpoint.start import find_start
from glide_ds.training.loop import train
from glide_ds.training.setup import phase_run
from glide_ds.training.speed.memory import gib


def real_step(site: Site) -> Finding:
    """One update of the first phase at its micro-batch, committed and loaded again, in a folder beside the run's.

    Every rank takes part. Accumulation is left out; everything else is the run's own.
    """
    if not site.take_step:
        return Finding("left out by --no_step", skipped=True)
    with _scratch(site) as folder:
        config = trial(site, folder)
        micro = config.batch_arithmetic(site.ranks).micro_batch
        site.progress(f"one step of {micro} pictures per rank ({site.device.type}); --no_step leaves it out")
        started = time.monotonic()
        with _quiet(), phase_run(config, site.device) as run:
            ready = time.monotonic()
            train(run)
            before = fingerprint(run.model)
        trained = time.monotonic()
        if not torch.isfinite(before):
            raise GlideError(
                "after one step the weights are not finite",
                "the run would train nothing",
                "lower optimizer.params.lr, or check model.weights",
            )
        with _quiet(), phase_run(config, site.device) as run:
            after, resumed = fingerprint(run.model), run.start.step
        loaded = time.monotonic()
        lines = (folder / "metrics.jsonl").read_text().splitlines() if site.rank == 0 else []
    if resumed != 1 or before != after:
        fact = f"the checkpoint of one step loads as step {resumed}, weights {float(before)} → {float(after)}"
        return failed(fact, "run the tests (launch/test.sh): this build loses what it trains")
    loss = f"loss {json.loads(lines[-1])['loss']:.3f}, " if lines else ""
    peak = f", peak {gib(torch.cuda.max_memory_allocated())}" if site.device.type == "cuda" else ""
    return Finding(
        f"{loss}set up in {ready - started:.1f} s, step and save {trained - ready:.1f} s, "
        f"loaded {loaded - trained:.1f} s{peak}"
    )


def trial(site: Site, folder: Path) -> Config:
    """The first phase for one step of one micro-batch per rank, in `folder`."""
    config = site.config
    micro = config.batch_arithmetic(site.world_size).micro_batch
    try:
        start = find_start(config, verify=False)
        weights = "random" if start.resumed or start.parent else start.weights
    except GlideError:
        weights = "random"  # `weights` and `resume` say what is wrong with the real ones
    config = with_changes(
        config,
        run={"dir": str(folder)},
        model={"weights": weights},
        train={"steps": 1, "gate_warmup": 0},
        checkpoint={"every": 1},
        log={"every": 1, "tensorboard": False, "samples_every": 0},
    )
    batch = {"train_batch_size": micro * site.ranks, "train_micro_batch_size_per_gpu": micro}
    return config.changed(deepspeed={**config.deepspeed, **batch})


def fingerprint(model: torch.nn.Module) -> torch.Tensor:
    """A number that changes where any weight does; not finite where a weight isn't."""
    return torch.stack([p.detach().double().abs().sum() for p in model.parameters()]).sum()


@contextlib.contextmanager
def _scratch(site: Site) -> Iterator[Path]:
    """A folder beside the run directory, one for all ranks, gone afterwards."""
    names = [uuid.uuid4().hex[:8]]
    dist.broadcast_object_list(names)
    folder = Path(site.config.run.dir).absolute()
    scratch = folder.with_name(f".preflight-{folder.name}-{names[0]}")
    try:
        yield scratch
    finally:
        if site.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The run's opening block and log lines are not this command's."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
