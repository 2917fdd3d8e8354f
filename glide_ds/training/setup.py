"""One phase made ready to train: everything it works with, and nothing of it left afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from glide_ds.config import BatchArithmetic, Config
from glide_ds.data.loader import Source
from glide_ds.data.streams.source import StreamSource, build_source
from glide_ds.data.tars.peers import Peers
from glide_ds.diffusion import Diffusion, create_diffusion
from glide_ds.errors import ConfigError, DataError, GlideError
from glide_ds.files import probe
from glide_ds.model import create_model
from glide_ds.model.clip import FrozenClip, embedding_dim, image_side
from glide_ds.model.glide import RECOMPUTED, Glide
from glide_ds.model.reduced import can_reduce
from glide_ds.training import preview
from glide_ds.training.checkpoint.commit import AVERAGES, Committed, remove_after
from glide_ds.training.checkpoint.saver import PEERS_S, Saver
from glide_ds.training.checkpoint.start import Start, find_start, folder_of, load_start, owner, record
from glide_ds.training.faults.ranks import Ranks, agreed
from glide_ds.training.faults.stopping import Stopper
from glide_ds.training.faults.watchdog import SET_UP, Watch
from glide_ds.training.logging import RunLog
from glide_ds.training.metrics import Readings
from glide_ds.training.phases import parameter_groups, phase_seed
from glide_ds.training.samples import Sampler
from glide_ds.training.speed.compiling import set_compilation
from glide_ds.training.speed.cuda_graph import capture, forget
from glide_ds.training.speed.fitting import Fit, fitted, limit_here, resolved
from glide_ds.training.speed.flops import step_work
from glide_ds.training.speed.meta import weight_bytes
from glide_ds.training.speed.peak import matrix_peak
from glide_ds.training.speed.profiling import Tracer
from glide_ds.training.speed.recompute import set_recomputation
from glide_ds.training.speed.traffic import Traffic
from glide_ds.training.stability import Guard
from glide_ds.training.validation import Validation
from glide_ds.training.zero.elastic import load_engine
from glide_ds.training.zero.ema import Ema
from glide_ds.training.zero.engine import build_engine, release
from glide_ds.training.zero.power import PowerAverages
from glide_ds.types import GlideConfig


@dataclass
class PhaseRun:
    """One phase, set up: what the training loop works with."""

    config: Config
    arithmetic: BatchArithmetic
    device: torch.device
    model: Glide
    engine: Any
    diffusion: Diffusion
    clip: FrozenClip | None
    source: Source
    start: Start
    log: RunLog
    watch: Watch
    stopper: Stopper
    guard: Guard
    validation: Validation
    saver: Saver
    ema: Ema | None
    averages: tuple[Ema | PowerAverages, ...]  # all that are kept
    traffic: Traffic
    readings: Readings
    sampler: Sampler
    tracer: Tracer


class Ground(NamedTuple):
    """What a phase stands on, found and checked before its model is made."""

    config: Config  # with what follows from this machine: train.recompute=auto resolved
    start: Start
    glide: GlideConfig
    source: Source
    clip: FrozenClip | None


@contextmanager
def phase_run(
    config: Config, device: torch.device, model: Glide | None = None, watch: Watch | None = None
) -> Iterator[PhaseRun]:
    """One phase ready to train, resumed where it was left; on exit nothing of its engine remains.

    `model` is used again where its architecture is the same. Collective.
    """
    arithmetic, recorded = config.batch_arithmetic(dist.get_world_size()), config
    ground = find_ground(config, arithmetic, device)
    config = ground.config
    torch.manual_seed(config.train.seed)
    if model is None or model.config != ground.glide:
        model = create_model(ground.glide)
    model = model.float().to(device)
    told = agreed(lambda: load_start(model, config, ground.start))
    set_ways(model, config, arithmetic, device)
    engine = build_engine(model, parameter_groups(model, config), config, arithmetic)
    try:
        agreed(lambda: set_compilation(model, config, arithmetic.micro_batch, device))
        if resumed := ground.start.resumed:
            agreed(lambda: _check_data(resumed, ground.source))
            load_engine(engine, resumed)
            if begun := resumed.manifest.get("data_epoch"):
                ground.source.began = (begun[0], begun[1])
        agreed(lambda: capture(model, config, arithmetic, device))
        if dist.get_rank() == 0:
            record(recorded, ground.start)
        with closing(agreed(lambda: RunLog(config, dist.get_rank(), ground.start.step))) as log:
            for line in told:
                log.line(line)
            run = assemble(config, arithmetic, device, model, engine, ground, log, watch or Watch())
            run.traffic.open()
            try:
                yield run
            except GlideError:
                run.saver.wait()  # raised by all ranks: all will write their part
                raise
            finally:
                run.traffic.close()
                run.saver.wait(PEERS_S)  # whatever ends the phase, the state that was copied shall be committed
                run.guard.close()
                run.tracer.close()
            run.stopper.close(config.train.steps)
            run.watch.at(SET_UP, 0)
    finally:
        forget(model)
        release(engine)


def find_ground(config: Config, arithmetic: BatchArithmetic, device: torch.device) -> Ground:
    """Find what the phase stands on, and say what will happen. Collective; raises GlideError on all ranks alike."""
    rank = dist.get_rank()
    agreed(lambda: check_writable(folder_of(config, config.train.phase)))
    start = find_start(config, verify=True)
    glide = agreed(lambda: glide_config(config))
    source = agreed(lambda: open_source(config, arithmetic, rank, Ranks()))
    config, chosen = fit_together(config, arithmetic, glide, device)
    if rank == 0:
        print(preview.block(config, arithmetic, start, glide, source.facts(), chosen), flush=True)
    clip = agreed(lambda: _frozen_clip(config, device))
    agreed(lambda: _check_store(source, clip))
    return Ground(config, start, glide, source, clip)


def _check_store(source: Source, clip: FrozenClip | None) -> None:
    if clip and source.clip:
        source.clip.of_weights(clip.weights_hash)


def fit_together(
    config: Config, arithmetic: BatchArithmetic, glide: GlideConfig, device: torch.device
) -> tuple[Config, Fit | None]:
    """train.recompute=auto resolved: on all ranks what the one with the least memory needs. Collective."""
    config, own = agreed(
        lambda: fitted(config, arithmetic, glide, limit_here(device), cpu=device.type == "cpu")
    )
    if own is None:
        return config, None
    fits: list[Fit] = [own] * dist.get_world_size()
    dist.all_gather_object(fits, own)
    chosen = max(fits, key=lambda fit: list(RECOMPUTED).index(fit.dial))
    return resolved(config, chosen), chosen


def assemble(
    config: Config,
    arithmetic: BatchArithmetic,
    device: torch.device,
    model: Glide,
    engine: Any,
    ground: Ground,
    log: RunLog,
    watch: Watch,
) -> PhaseRun:
    """Everything around the engine, each part given what it uses. Collective."""
    start, glide, source, clip = ground.start, ground.glide, ground.source, ground.clip
    diffusion = create_diffusion(config.model.noise_schedule)
    folder, own = folder_of(config, config.train.phase), owner(config)
    ema, powers = opened_averages(config, engine, start, log)
    if gone := agreed(lambda: [] if dist.get_rank() else remove_after(folder / AVERAGES, start.step, own)):
        log.line(f"removed averages of {len(gone)} checkpoints after step {start.step}, from where it goes on")
    saver = Saver(engine.frozen, folder, config.checkpoint, own, config.run.timeout_s, log.line)
    guard = Guard(config, engine, start, log, device, saver)
    measured: dict[str, Any] = {"model": model, "ema": ema, "log": log, "watch": watch}
    validation = Validation(config, start, diffusion, clip, **measured)
    stopper = Stopper(config.run, config.train.phase)
    traffic = Traffic(device, watch)
    readings = Readings(
        phase=config.train.phase,
        arithmetic=arithmetic,
        device=device,
        model=model,
        groups=engine.optimizer.param_groups,
        clipping=engine.role_clipping,
        traffic=traffic,
        peak_images_per_s=peak_rate(glide, config, device) if dist.get_rank() == 0 else 0.0,
        others=(guard.metrics, validation.metrics, saver.metrics),
    )
    return PhaseRun(
        config=config,
        arithmetic=arithmetic,
        device=device,
        model=model,
        engine=engine,
        diffusion=diffusion,
        clip=clip,
        source=source,
        start=start,
        log=log,
        watch=watch,
        stopper=stopper,
        guard=guard,
        validation=validation,
        saver=saver,
        ema=ema,
        averages=tuple(average for average in (ema, powers) if average),
        traffic=traffic,
        readings=readings,
        sampler=Sampler(
            config, clip, **measured, opened=None if isinstance(source, StreamSource) else source.samples
        ),
        tracer=Tracer(config, device, log.line),
    )


def opened_averages(
    config: Config, engine: Any, start: Start, log: RunLog
) -> tuple[Ema | None, PowerAverages | None]:
    """The averages that are kept, as they were left. Collective."""
    every = config.ema.snapshot_every
    ema = Ema(engine, config.ema) if config.ema.decay else None
    if ema and start.resumed and not agreed(partial(ema.load, start.resumed)):
        log.line(f"ema.decay is set and {start.resumed.path} holds no average: it starts at these weights")
    powers = PowerAverages(engine, every, start.step) if every else None
    if powers and start.resumed and not agreed(partial(powers.load, start.resumed)):
        log.line(f"ema.snapshot_every is set and {start.resumed.path} holds none: they start at these weights")
    return ema, powers


def set_ways(model: Glide, config: Config, arithmetic: BatchArithmetic, device: torch.device) -> None:
    """How the same numbers are computed: what twice, and in which precision products are taken."""
    set_recomputation(model, config, arithmetic)
    precision = config.train.precision
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    model.reduce_products(precision == "tf32-fp16-kernels" and can_reduce(device))
    # Shapes never change: the fastest algorithm for each is worth a search.
    torch.backends.cudnn.benchmark = True


def peak_rate(glide: GlideConfig, config: Config, device: torch.device) -> float:
    """Images per second of a rank whose training steps ran at the rate of a matrix product in their precision."""
    dtype = torch.bfloat16 if weight_bytes(config) == 2 else torch.float32
    return matrix_peak(device, dtype) / step_work(glide, config)


def glide_config(config: Config) -> GlideConfig:
    """The architecture to build: the configured one, with the CLIP width of the configured encoder."""
    clip_dim = embedding_dim(config.clip.model, config.clip.weights) if config.uses_clip else None
    return replace(config.model.architecture, clip_dim=clip_dim)


def open_source(config: Config, arithmetic: BatchArithmetic, rank: int, peers: Peers | None = None) -> Source:
    """This rank's micro-batches. Each phase sees the data in its own order. Collective where `peers` are given."""
    architecture = config.model.architecture
    return build_source(
        config.data,
        image_size=architecture.image_size,
        context_length=architecture.text_ctx,
        global_batch=arithmetic.global_batch,
        micro_batch=arithmetic.micro_batch,
        rank=rank,
        world_size=arithmetic.world_size,
        seed=phase_seed(config),
        low_res=architecture.upsamples,
        masked=architecture.inpaints,
        clip=config.clip if config.uses_clip else None,
        clip_side=picture_side(config),
        peers=peers,
    )


def picture_side(config: Config) -> int | None:
    """Of the pictures that CLIP reads, in pixels, where it reads any."""
    return image_side(config.clip.model) if config.uses_clip and config.clip.pictured else None


def _frozen_clip(config: Config, device: torch.device) -> FrozenClip | None:
    if not config.uses_clip:
        return None
    # Sample grids may be drawn from captions, so the text tower is needed in any case.
    towers = "both" if config.clip.pictured or config.validation.drawn else "text"
    return FrozenClip(config.clip.model, config.clip.weights, device, source=towers)


def _check_data(resumed: Committed, source: Source) -> None:
    """Refuse to go on with other data than the checkpoint's: its order would not be the same."""
    before = resumed.manifest["data_fingerprint"]
    if source.fingerprint != before:
        raise DataError(
            f"data.shards hold other samples than when {resumed.path} was written (fingerprint "
            f"{source.fingerprint}, then {before})",
            "some would be repeated and others missed",
            "put the shards back, or choose another run.dir and start it from an export of this run",
        )


def check_writable(folder: Path) -> None:
    """Fail now rather than at the first checkpoint."""
    try:
        probe(folder)
    except OSError as error:
        raise ConfigError(
            f"run.dir: {folder} can't be written ({error.strerror})",
            "no checkpoint could be saved",
            "choose another run.dir or mend its permissions",
        ) from error
