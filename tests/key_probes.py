"""What a person would see of a configuration: one function per part of the package, each by the package's own code.

They run in a folder that `make_material` filled: names of files in a configuration are relative to it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import multiprocessing
import os
import re
import shutil
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from data.data_kit import encoded, json_bytes, photo
from train_kit import ARCHITECTURE, opened, poisoned, read_lines, shake, state_of, write_shard

from glide_ds.config import ClipConfig, Config
from glide_ds.data.clip_notes import Encoder, StoreNote
from glide_ds.data.clip_store import text_hash, write_store
from glide_ds.data.tars.shards import open_shards
from glide_ds.errors import ConfigError, DataError, UnstableError
from glide_ds.model import GlideConfig, create_model
from glide_ds.model.clip import BUILTIN_WEIGHTS, FrozenClip, weights_hash
from glide_ds.model.reduced import Reducible
from glide_ds.model.tensor_files import read_state_file, write_state
from glide_ds.training import run as run_module
from glide_ds.training import setup, trackers
from glide_ds.training.checkpoint.start import find_start, load_start
from glide_ds.training.faults.stopping import Stopper
from glide_ds.training.faults.watchdog import Watch, hang_limit
from glide_ds.training.loop import train
from glide_ds.training.objective import Objective
from glide_ds.training.phases import gate_offset, parameter_groups, role_of
from glide_ds.training.speed.cuda_graph import capture
from glide_ds.training.speed.meta import meta_model, one_image
from glide_ds.training.zero.engine import deepspeed_config, lr_ratio

CPU = torch.device("cpu")
HERE = Path()  # the folder of make_material
REMOTE = "memory://every-key"
SAMPLES = 13  # of a tar: no multiple of a batch


# ---- what the configurations name


def make_material(folder: Path) -> None:
    """Shards good and bad, embeddings, weights: all that a row names."""
    write_shard(folder / "plain.tar", [_sample(n) for n in range(SAMPLES)])
    (folder / "photo.png").write_bytes(encoded(photo(3)))
    write_shard(folder / "other.tar", [_sample(n) for n in range(100, 100 + SAMPLES)])
    half = {"png": _sample(0)["png"][:200], "txt": b"half a picture"}
    write_shard(folder / "bad.tar", [*(_sample(n) for n in range(SAMPLES)), half])
    write_shard(folder / "cut.tar", [_sample(n) for n in range(SAMPLES)])
    os.truncate(folder / "cut.tar", (folder / "cut.tar").stat().st_size // 2)
    for name in "ab":
        lines = (json_bytes(key=f"{n:06d}", caption=f"{name} {n}") for n in range(SAMPLES))
        (folder / f"side-{name}.jsonl").write_bytes(b"\n".join(lines))
    _store(folder / "embeddings", str(folder / "plain.tar"))
    torch.manual_seed(1)  # others than a random start has
    write_state(folder / "start.pt", create_model(GlideConfig(**ARCHITECTURE)).state_dict())  # type: ignore[arg-type]
    for name, factor in (("clip-a", 1.0), ("clip-b", -1.0)):
        state = {key: tensor * factor for key, tensor in read_state_file(BUILTIN_WEIGHTS).tensors.items()}
        write_state(folder / f"{name}.safetensors", state)
    shutil.copy(f"{BUILTIN_WEIGHTS}.json", folder / "clip.json")


def _sample(number: int) -> dict[str, bytes]:
    """A picture with a border, and a record by which every filter takes some samples and leaves some."""
    bordered = np.pad(photo(number, 20, 24), ((4, 4), (4, 4), (0, 0)), constant_values=255)
    odd = number % 2
    record = json_bytes(
        original_width=(64, 30)[odd],
        original_height=(60, 10)[odd],
        similarity=(0.4, 0.2)[odd],
        punsafe=(0.1, 0.9)[odd],
        NSFW=("UNLIKELY", "NSFW")[odd],
        LANGUAGE=("en", "de")[odd],
    )
    return {"png": encoded(bordered), "txt": f"noise number {number}".encode(), "json": record}


def _store(folder: Path, shards: str) -> None:
    opened_shards = open_shards(shards)
    rows = np.random.default_rng(0).normal(size=(SAMPLES, 64)).astype(np.float16)
    hashes = [text_hash(opened_shards.read(n)["txt"].decode()) for n in range(SAMPLES)]
    encoder, weights = Encoder("builtin:tiny", "openai", "text"), weights_hash("builtin:tiny", "openai")
    note = StoreNote(encoder, weights, opened_shards.fingerprints[0], "", SAMPLES, 64, missing=0)
    write_store(folder, opened_shards.urls[0], rows, np.array(hashes, np.uint64), note)


def digest(tensor: torch.Tensor | None) -> str:
    if tensor is None:
        return "none"
    return hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()[:16]


def fresh(name: str) -> Path:
    shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / name).mkdir()
    return HERE / name


def files(*folders: str) -> list[str]:
    """Every file and link below, but those whose names say when they were written."""
    found = (path for folder in folders for path in (HERE / folder).rglob("*"))
    return sorted(str(path) for path in found if path.is_symlink() or path.is_file())


# ---- data


def batches(config: Config, count: int = 4) -> Any:
    """What the first micro-batches hold and what became of the samples, or the error that they end in."""
    try:
        source = setup.open_source(config, config.batch_arithmetic(1), 0)
        read = list(islice(source.batches(0), count))
    except DataError as error:
        return str(error)
    tensors = ("images", "drop_clip", "clip", "pictured", "known", "low_res")
    held = [
        (b.sample_ids.tolist(), b.tokens.tolist(), *(digest(getattr(b, name)) for name in tensors))
        for b in read
    ]
    return held, source.report(), source.batches_per_epoch


def many_batches(config: Config) -> Any:
    return batches(config, 40)


def loader_processes(config: Config) -> int:
    source = setup.open_source(config, config.batch_arithmetic(1), 0)
    stream = source.batches(0)
    before = len(multiprocessing.active_children())
    next(stream)
    count = len(multiprocessing.active_children()) - before
    stream.close()  # type: ignore[attr-defined]
    return count


def index_files(config: Config) -> list[str]:
    """What lies beside shards that were just opened for the first time."""
    shutil.copy("plain.tar", fresh("there") / "copy.tar")
    setup.open_source(config, config.batch_arithmetic(1), 0)
    return files("there")


def cached_blocks(config: Config) -> list[str]:
    """What lies on the node's disk after some batches of two remote shards."""
    import fsspec

    remote = fsspec.filesystem("memory")
    for name in ("plain.tar", "other.tar"):
        remote.pipe_file(f"{REMOTE}/{name}", Path(name).read_bytes())
    fresh("there")
    batches(config)
    return files("there")


# ---- what is trained, and how


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    model = meta_model(setup.glide_config(config), config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def computed(config: Config) -> Any:
    """What the model makes of one picture in training, from the same random weights and numbers."""
    torch.manual_seed(0)
    model = create_model(setup.glide_config(config)).train()
    shake(model)
    inputs = {name: torch.ones_like(tensor) for name, tensor in one_image(model.config).items()}
    side = inputs["x"].shape
    inputs["x"] = torch.linspace(-1, 1, side.numel()).view(side)
    inputs["clip_drop"] = torch.zeros(1, dtype=torch.bool)
    torch.manual_seed(1)
    output = model(**inputs)
    return tuple(output.shape), digest(output)


def starting_weights(config: Config) -> str:
    torch.manual_seed(0)
    model = create_model(setup.glide_config(config))
    load_start(model, config, find_start(config, verify=False))
    return digest(torch.cat([tensor.flatten().float() for tensor in model.state_dict().values()]))


def groups(config: Config) -> list[Any]:
    """Every parameter group: its role, rate, decay and how much is in it."""
    model = meta_model(setup.glide_config(config), config)
    return [
        (group["role"], group["lr"], group["weight_decay"], sum(p.numel() for p in group["params"]))
        for group in parameter_groups(model, config)
    ]


def rates(config: Config) -> list[float]:
    return [lr_ratio(step, config) for step in range(12)]


def gate_offsets(config: Config) -> list[float]:
    return [gate_offset(config, 0.0, step) for step in range(6)]


@functools.lru_cache
def encoder(clip: ClipConfig) -> FrozenClip:
    found = setup._frozen_clip(Config(clip=clip), CPU)
    assert found is not None
    return found


def embeddings(config: Config) -> str:
    return digest(encoder(config.clip).encode_text(["a red circle", "a blue square"]))


class Bare:
    """A plain model where Objective expects an engine; keeps how what it is given lies in memory."""

    def __init__(self, module: Any) -> None:
        self.module, self.strides = module, []

    def __call__(self, x: torch.Tensor, *args: Any, **inputs: Any) -> torch.Tensor:
        self.strides.append(x.stride())
        return self.module(x, *args, **inputs)


def losses(config: Config) -> Any:
    """The losses of one batch in the first update and in the third."""
    torch.manual_seed(0)
    model = create_model(setup.glide_config(config)).eval()
    shake(model)
    source = setup.open_source(config, config.batch_arithmetic(1), 0)
    engine = Bare(model)
    diffusion = setup.create_diffusion(config.model.noise_schedule)
    objective = Objective(config, diffusion, engine, encoder(config.clip))
    batch = source.one(0)
    with torch.no_grad():
        told = [objective(batch, step) for step in (0, 2)]
    return [(float(one.total), one.mse.tolist(), one.vb.tolist(), one.kl) for one in told], engine.strides


def noise(config: Config) -> str:
    with opened(config) as run:
        return digest(run.diffusion.table("alphas_cumprod", torch.arange(run.diffusion.num_timesteps)))


def ways(config: Config) -> Any:
    """Which blocks are computed again, and how a GPU would take products."""
    model = create_model(setup.glide_config(config))
    with mock.patch.object(setup, "can_reduce", return_value=True):
        setup.set_ways(model, config, config.batch_arithmetic(1), CPU)
    again = [block.recompute for block in model.blocks().values()]
    reduced = {module.reduced for module in model.modules() if isinstance(module, Reducible)}
    return again, reduced, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def compiled(config: Config) -> list[bool]:
    with opened(config) as run:
        return [block.compiled is not None for block in run.model.blocks().values()]


def recording(config: Config) -> str:
    """What becomes of a recording where there is no GPU."""
    try:
        capture(create_model(setup.glide_config(config)), config, config.batch_arithmetic(1), CPU)
    except ConfigError as error:
        return str(error)
    return "none"


def handed_over(config: Config) -> Any:
    """What DeepSpeed reads of what it is handed."""
    from deepspeed.runtime.config import DeepSpeedConfig

    read = DeepSpeedConfig(deepspeed_config(config, config.batch_arithmetic(1)))
    return _values({name: value for name, value in vars(read).items() if name != "_param_dict"})


def _values(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _values(inner) for name, inner in value.items()}
    if isinstance(value, str | int | float | None) or not hasattr(value, "__dict__"):
        return str(value)
    return _values(value.model_dump() if hasattr(value, "model_dump") else vars(value))


# ---- runs of a few steps


def trained(config: Config) -> dict[str, str]:
    """The weights after the run, by role."""
    with opened(config, shake) as run:
        train(run)
    state = state_of(run.model)
    roles = {
        role: [t.flatten() for name, t in state.items() if role_of(name) == role]
        for role in map(role_of, state)
    }
    return {role: digest(torch.cat(tensors).float()) for role, tensors in roles.items()}


def said(config: Config) -> list[str]:
    """The beginnings, up to the first number, of what is printed while a run trains; each once."""
    return sorted({re.sub(r"[\d.:].*", "", line) for line in _printed(config)})


def profile(config: Config) -> Any:
    """Where DeepSpeed's profile of a step is, and its entries but for the times."""
    Path("profile.txt").unlink(missing_ok=True)
    printed, file = _printed(config), Path("profile.txt")
    lines = file.read_text().splitlines() if file.exists() else printed
    start = next((n for n, line in enumerate(lines) if "Flops Profiler" in line), len(lines))
    timed = ("% latency", "fwd latency -", "loss")
    entries = [line.split(":")[0] for line in lines[start:] if not any(words in line for words in timed)]
    return file.exists(), [line for line in entries if not line.startswith(("committed", "data"))]


def _printed(config: Config) -> list[str]:
    """What a person sees of a run: stdout, and what DeepSpeed's own logger lets through."""
    logger, out = logging.getLogger("DeepSpeed"), io.StringIO()
    shown = logging.StreamHandler(out)
    shown.setLevel(logger.handlers[0].level)
    logger.addHandler(shown)
    try:
        with contextlib.redirect_stdout(out):
            trained(config)
    finally:
        logger.removeHandler(shown)
    return out.getvalue().splitlines()


def average(config: Config) -> list[str]:
    """The averaged weights after an update that adds one to each."""
    with opened(config) as run:
        for master in run.engine.optimizer.single_partition_of_fp32_groups:
            master.data.add_(1.0)
        for kept in run.averages:
            kept.update()
        return sorted(
            digest(part) for kept in run.averages for state in kept.files().values() for part in state.values()
        )


def run_files(config: Config) -> Any:
    """The files of a run that was just trained, and the steps that its metrics tell of."""
    with opened(config, shake) as run:
        train(run)
    named = (name for name in files("run", "elsewhere") if "events.out" not in name)
    folders = sorted(str(path) for path in HERE.glob("*/tensorboard/*"))
    lines = read_lines(Path(config.run.dir) / "metrics.jsonl")
    return list(named), folders, [line["step"] for line in lines]


def tracked(config: Config) -> dict[str, Any]:
    """What Weights & Biases is told of the run, but for the configuration itself."""
    return {key: value for key, value in trackers.arguments(config, "id").items() if key != "config"}


def grid(config: Config) -> list[str]:
    """The picture that a run draws of itself."""
    with opened(config, shake) as run:
        run.sampler.draw(1)
    found = sorted((Path(config.run.dir) / "samples").glob("*.png"))
    return [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in found]


def saving(config: Config) -> bool:
    """Whether a save is still under way when training goes on."""
    with opened(config) as run:
        run.saver.save(1, {"phase": config.train.phase}, {})
        goes_on = run.saver.thread is not None
        run.saver.finish()
    return goes_on


def validated(config: Config) -> Any:
    """What is measured of which updates, and whether a model that was broken meanwhile counts as degraded."""
    with opened(config, shake) as run:
        run.validation.begin()
        measured = []
        for done in (1, 2):
            when = run.validation.after(done)
            latest = run.validation.latest or {}
            drawn = latest.get("score_off", {}).get("count")
            measured.append((when, latest.get("loss"), drawn, run.validation.exhausted))
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.mul_(3)
        run.validation.after(2)
        return measured, run.validation.baseline, run.validation.degraded


def waiting(config: Config) -> Any:
    """How long a rank waits for the others in a collective."""
    with opened(config):
        return torch.distributed.group.WORLD._get_backend(CPU).options._timeout


def patience(config: Config) -> Any:
    """How long a rank waits for the others' parts of a checkpoint."""
    with opened(config) as run:
        return run.saver.patience


def hanging(config: Config) -> float:
    return hang_limit(config.run)


def stopping(config: Config) -> str:
    """Why a run that was just started stops at once."""
    stopper = Stopper(config.run, config.train.phase)
    stopper.agreed(0)
    stop = stopper.close(0)
    return stop.reason if stop else "it goes on"


def stormy(config: Config) -> Any:
    """What becomes of a run whose fourth and fifth global batches are a thousand times as hard."""
    Path(config.run.dir).mkdir(exist_ok=True)
    with poisoned(config, {3: 1e3, 4: 1e3}):
        try:
            run_module.run_phase(config, CPU, None, Watch())
            end = "finished"
        except UnstableError as error:
            end = error.args[0] if error.args else str(error)
    folder = Path(config.run.dir)
    bad = folder / "skipped.jsonl"
    skipped = [(line["step"], line["cause"]) for line in (read_lines(bad) if bad.exists() else [])]
    return end, skipped, [(line["step"], line["lr"]) for line in read_lines(folder / "metrics.jsonl")]
