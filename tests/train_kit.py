"""Runs of a few steps with a GLIDE so small that a step takes milliseconds."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glide_ds.config import Config, load_config
from glide_ds.training.loop import train
from glide_ds.training.setup import PhaseRun, phase_run
from glide_ds.types import Batch

ARCHITECTURE = {
    "image_size": 16,
    "text_ctx": 12,
    "xf_width": 32,
    "xf_layers": 1,
    "xf_heads": 2,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_ds": [2],
    "num_head_channels": 16,
    "dropout": 0.0,
    "clip_tokens": 2,
}
DOCUMENT: dict[str, Any] = {
    "train_batch_size": 4,
    "gradient_clipping": 2.0,
    "zero_optimization": {
        "stage": 2,
        "reduce_bucket_size": 1_000_000,
        "allgather_bucket_size": 1_000_000,
        "use_multi_rank_bucket_allreduce": False,
    },
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.98], "weight_decay": 0.01}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 2, "cos_min_ratio": 0.1}},
    "glide_ds": {
        "model": {"preset": "tiny", "weights": "random", "architecture": ARCHITECTURE},
        "clip": {"model": "builtin:tiny"},
        "data": {"shards": "builtin:shapes", "workers": 0, "trace": True, "shapes_samples": 64},
        "train": {"phase": "full", "steps": 4, "recompute": "none"},
        "checkpoint": {"every": 100},
        "log": {"every": 1, "tensorboard": False, "samples_every": 0},
    },
}
PHASES = ("base", "adapter_only", "adapter_gates", "full")
# Keys of metrics.jsonl that not only training decides.
UNSTEADY = (
    "images_per_s",
    "images_per_s_per_rank",
    "data_wait_s",
    "data_wait_share",
    "mfu",
    "communication_share",
    "memory_gib",
    "saves_failed",
)


def without_launcher() -> dict[str, str]:
    """This process's environment, without what a launcher sets: the tests' own process group has set it."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in names}


def document(folder: Path, phase: str = "full", **sections: Any) -> dict[str, Any]:
    """A --ds_config with our block, `sections` laid over the block or, by DeepSpeed's names, over the rest."""
    whole = copy.deepcopy(DOCUMENT)
    block = whole["glide_ds"]
    block["run"] = {"dir": str(folder / "run")}
    block["train"]["phase"] = phase
    for key, values in sections.items():
        home = whole if key in whole or key in ("bf16", "train_micro_batch_size_per_gpu") else block
        home[key] = {**home.get(key, {}), **values} if isinstance(values, Mapping) else values
    return whole


def write_config(folder: Path, phase: str = "full", **sections: Any) -> Path:
    path = folder / f"{phase}.json"
    folder.mkdir(parents=True, exist_ok=True)
    mine = path.with_suffix(f".{os.getpid()}")
    mine.write_text(json.dumps(document(folder, phase, **sections)))
    mine.replace(path)  # two ranks write it, and one may be reading already
    return path


def make_config(folder: Path, phase: str = "full", **sections: Any) -> Config:
    return load_config(write_config(folder, phase, **sections))[0]


def shake(model: torch.nn.Module, seed: int = 5) -> None:
    """Give what starts at zero a value, as after some training: output layers, biases, CLIP's values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            zero = parameter == 0
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.add_(torch.where(zero, noise, torch.zeros(())))


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@contextmanager
def opened(config: Config, prepare: Callable[[torch.nn.Module], None] | None = None) -> Iterator[PhaseRun]:
    """A phase ready to train in the test's process group; `prepare` changes its model before the engine does.

    Patches nothing: the model is handed over as the one of the phase before, as in a pipeline.
    """
    from glide_ds.model import create_model
    from glide_ds.training.setup import glide_config

    torch.manual_seed(0)
    model = create_model(glide_config(config))
    if prepare:
        prepare(model)
    with phase_run(config, torch.device("cpu"), model) as run:
        yield run


def train_phase(config: Config, prepare: Callable[[torch.nn.Module], None] | None = None) -> torch.nn.Module:
    with opened(config, prepare) as run:
        train(run)
    return run.model


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(folder: Path, *, steady: bool = False) -> list[dict[str, Any]]:
    """The run's metrics.jsonl; `steady` leaves out what depends on time."""
    lines = read_lines(folder / "run" / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not (steady and k in UNSTEADY)} for line in lines]


def trace(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return read_lines(folder / "run" / "trace" / f"rank{rank}.jsonl")


def write_shard(path: Path, samples: Iterable[Mapping[str, bytes]]) -> str:
    """A tar of these samples, member bytes by extension."""
    with tarfile.open(path, "w") as tar:
        for number, members in enumerate(samples):
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


# A run with everything that could depend on the number of ranks: KL terms, a gate ramp, both checkpoints kept.
# Adam's eps keeps rounding errors in gradients that are zero by symmetry from becoming steps.
PARITY: dict[str, Any] = {
    "train": {"steps": 20, "gate_warmup": 5, "kl_weight": 0.1, "kl_every": 4},
    "checkpoint": {"every": 10},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.98], "eps": 1e-4}},
}
# One update in bf16 that moves no weight by more than 1e-7.
IN_BF16: dict[str, Any] = {
    "bf16": {"enabled": True},
    "train": {"steps": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-7, "weight_decay": 0.0}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}},
}


def copy_run(run: Path, place: Path) -> Path:
    """A copy to be changed. Its tensor files, 70 MB a checkpoint, are the run's own: to be replaced, not written to."""

    def copied(source: str, target: str) -> None:
        (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)

    return Path(shutil.copytree(run, place, symlinks=True, copy_function=copied))


def rewound(folder: Path, other: Path, step: int) -> Path:
    """A copy of a run of phase full as a kill after update `step`'s checkpoint would have left it."""
    shutil.copytree(folder / "run", other / "run", symlinks=True)
    phase = other / "run" / "phase3"
    for path in phase.glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return other


def batch_ids(config: Config, number: int) -> list[int]:
    """The samples of that global batch."""
    from glide_ds.training.setup import open_source

    source = open_source(config, config.batch_arithmetic(1), 0)
    return list(next(source.batches(number)).sample_ids.tolist())


@contextmanager
def poisoned(config: Config, factors: Mapping[int, float]) -> Iterator[None]:
    """Multiply the loss of every sample of some global batches: by NaN, or a lot. The batches are those of one
    rank without accumulation, the samples theirs wherever they come."""
    from glide_ds.training import loop
    from glide_ds.training.objective import Losses, Objective

    by_sample = {sample: factor for n, factor in factors.items() for sample in batch_ids(config, n)}

    class Poisoned(Objective):
        def __call__(self, batch: Batch, step: int) -> Losses:
            losses = super().__call__(batch, step)
            factor = torch.tensor([by_sample.get(sample, 1.0) for sample in batch.sample_ids.tolist()])
            return losses._replace(total=losses.total * factor.mean(), mse=losses.mse * factor)

    loop.Objective = Poisoned  # type: ignore[misc]
    try:
        yield
    finally:
        loop.Objective = Objective  # type: ignore[misc]
