"""A run: one or more phases, each set up, trained by its own engine, and taken down again."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from glide_ds.config import Config, load_configs
from glide_ds.config.phases import PHASES
from glide_ds.config.schema import is_built_in
from glide_ds.data.tars.patterns import pack_pictures
from glide_ds.environment import ranks_here, read_environment
from glide_ds.errors import ConfigError
from glide_ds.model.glide import Glide
from glide_ds.training import preview, trackers
from glide_ds.training.checkpoint.commit import committed
from glide_ds.training.checkpoint.start import find_start, folder_of
from glide_ds.training.faults.failures import explained
from glide_ds.training.faults.last_word import last_word
from glide_ds.training.faults.lease import leased
from glide_ds.training.faults.ranks import agreed
from glide_ds.training.faults.stopping import Stop, mark_stopped, start_again, told_stop
from glide_ds.training.faults.watchdog import Watch, guarded
from glide_ds.training.loop import train
from glide_ds.training.setup import check_writable, glide_config, open_source, phase_run
from glide_ds.training.speed.fitting import fitted, limit_here
from glide_ds.training.speed.profiling import check_ranks
from glide_ds.training.stability import RolledBack
from glide_ds.training.zero.group import start_process_group


def main(paths: Sequence[str], overlay: str | None, sets: Sequence[str], dry_run: bool = False) -> None:
    """Train the phases that the --ds_config files describe, one after the other, in one process group.

    Raises GlideError, the same on every rank, before any training starts where something is wrong.
    """
    configs = load_configs(paths, overlay, sets)
    check_pipeline(configs)
    rank, world_size = read_environment()
    for config in configs:
        config.batch_arithmetic(world_size)
        check_ranks(config, world_size)
        trackers.check_installed(config)
        pack_folders(config)
    if dry_run:
        if rank == 0:
            dry_run_report(configs, world_size)
        return
    if crowded := check_ranks_here(rank == 0):
        print(f"!! {crowded}", flush=True)
    device = start_process_group(configs[0].run.timeout_s)
    watch, finished = Watch(), rank == 0 and all(map(is_finished, configs))
    try:
        with guarded(watch, configs[0].run):
            stop = run_phases(configs, device, watch)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        last_word(told_stop(stop, configs[0].run.dir) if stop else told_end(configs, finished))


def check_ranks_here(told: bool = True) -> str | None:
    """What to say, if `told`, of more ranks here than cores. Raises ConfigError where they are more than the GPUs."""
    ranks, gpus, cores = ranks_here(), torch.cuda.device_count(), len(os.sched_getaffinity(0))
    if gpus and ranks > gpus:
        raise ConfigError(
            f"{ranks} ranks were started on {socket.gethostname()}, which has {gpus} GPU{'s' * (gpus > 1)}",
            "some would have none",
            f"start at most {gpus} here: deepspeed --num_gpus {gpus} …",
        )
    if gpus or ranks <= cores or not told:
        return None
    return (
        f"{ranks} ranks on {cores} core{'s' * (cores > 1)} take turns: the start and each step take "
        f"{ranks / cores:.0f} times as long; deepspeed --num_gpus {cores} … is as fast"
    )


def pack_folders(config: Config) -> None:
    """Pack what data.shards has of folders of pictures: while it lasts no rank waits for another with a limit."""
    if config.data.reader == "indexed":
        for part in config.data.mix_parts:
            if not is_built_in(part.shards):
                pack_pictures(part.shards)


def is_finished(config: Config) -> bool:
    """Whether the phase's last step is in a checkpoint."""
    return any(made.step >= config.train.steps for made in committed(folder_of(config, config.train.phase))[:1])


def told_end(configs: Sequence[Config], before: bool) -> str:
    """What a person is told last where a run has come to its end, now or `before` this start, and what comes next."""
    run, train = configs[0].run.dir, configs[-1].train
    draw = f'glide-ds sample {run} --prompt "…" --out picture.png'
    if before:
        return (
            f"glide_ds: finished before this start: all {train.steps:,} steps of phase {train.phase} are done in "
            f"{run}. For more, --set train.steps=N or another phase's --ds_config; to see pictures: {draw}"
        )
    return (
        f"glide_ds: finished: step {train.steps:,} of phase {train.phase} is in {run}. Next: {draw}, "
        f"glide-ds evaluate {run}, or glide-ds export {run} --out model.pt"
    )


def run_phases(configs: Sequence[Config], device: torch.device, watch: Watch) -> Stop | None:
    """Train one phase after the other, until the last is done or all ranks agree to stop: then the stop."""
    folder, model = Path(configs[0].run.dir), None
    agreed(lambda: check_writable(folder))
    with leased(folder, configs[0].run.timeout_s / 2):
        if dist.get_rank() == 0:
            start_again(folder)
        for config in configs:
            model, stop = run_phase(config, device, model, watch)
            if stop:
                finished = config is configs[-1] and stop.step == config.train.steps
                if dist.get_rank() == 0:
                    mark_stopped(folder, stop, finished=finished)
                return None if finished else stop
    return None


def dry_run_report(configs: Sequence[Config], world_size: int) -> None:
    """Print every phase's block: all checks that need neither a process group nor the weights."""
    planned: list[str] = []
    for config in configs:
        arithmetic = config.batch_arithmetic(world_size)
        start = find_start(config, planned, verify=False)
        data, glide = open_source(config, arithmetic, 0).facts(), glide_config(config)
        here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        shown, chosen = fitted(config, arithmetic, glide, limit_here(here), cpu=here.type == "cpu")
        print(preview.block(shown, arithmetic, start, glide, data, chosen), flush=True)
        planned.append(config.train.phase)


def check_pipeline(configs: Sequence[Config]) -> None:
    """Several phases in one command: one run directory, each phase once, parents before children."""
    seen: list[str] = []
    for config in configs:
        phase = PHASES[config.train.phase]
        if config.run.dir != configs[0].run.dir:
            raise ConfigError(
                f"phase {phase.name!r} has run.dir = {config.run.dir!r} and {configs[0].train.phase!r} "
                f"has {configs[0].run.dir!r}",
                "it would not find its parent",
                "give both the same, for example with --set run.dir=…",
            )
        late = [name for name in seen if phase.name in PHASES[name].parents]
        if phase.name in seen or late:
            raise ConfigError(
                f"phase {phase.name!r} comes after {', '.join(seen)}: the order is {' → '.join(PHASES)} "
                "and each phase once",
                remedy="reorder the --ds_config files",
            )
        seen.append(phase.name)


def run_phase(
    config: Config, device: torch.device, model: Glide | None, watch: Watch
) -> tuple[Glide, Stop | None]:
    """Set one phase up, train it to its last step or an agreed stop, take its engine down.

    `model` is the module of the phase before, used again where its architecture is the same. Returns the bare
    model, and the stop, which also says that no phase may follow.
    """
    while (trained := _attempt(config, device, model, watch)) is None:
        model = None  # a random start is made anew; everything else is loaded
    return trained


def _attempt(
    config: Config, device: torch.device, model: Glide | None, watch: Watch
) -> tuple[Glide, Stop | None] | None:
    """What run_phase returns, or None where the phase was rolled back and has to be opened again."""
    arithmetic = config.batch_arithmetic(dist.get_world_size())
    with explained(config, arithmetic), phase_run(config, device, model, watch) as run:
        try:
            train(run)
        except RolledBack:
            return None
    return run.model, run.stopper.stop
