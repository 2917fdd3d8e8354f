"""What a person may not have meant, said before training with what to do about it: the `!!` lines of the block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from glide_ds.config import BatchArithmetic, Config, is_built_in
from glide_ds.config.phases import PHASES
from glide_ds.training.checkpoint.start import NAMED_WEIGHTS, Start

MOST_EPOCHS = 100  # beyond, the pictures are learned by heart
FULL_SIZE = 50e6  # parameters that a CPU does not train in a person's time


def cautions(
    config: Config, arithmetic: BatchArithmetic, start: Start, data: Mapping[str, Any], parameters: int
) -> Iterator[str]:
    """One sentence or two each. `data` are the source's facts, `parameters` the model's."""
    if not (start.resumed or start.parent or start.weights.endswith("'s")):
        yield from _of_the_start(config, start)
    yield from _of_the_data(config, arithmetic, data)
    if parameters > FULL_SIZE and not torch.cuda.is_available():
        yield (
            f"NO GPU: PyTorch sees none here, and a step of {parameters:,} parameters takes a CPU minutes. Where there "
            "is one, look at nvidia-smi and glide-ds doctor; to try things out take ds_configs/tiny"
        )


def _of_the_start(config: Config, start: Start) -> Iterator[str]:
    built_in = _is_built_in(config)
    if start.weights == "random":
        asked = (
            "as model.weights=random asks" if config.model.weights == "random" else "for no weights were given"
        )
        on = "on the built-in shapes" if built_in else "on your shards"
        use = "fine for trying the machinery, useless for pictures" if built_in else "GLIDE's own took months"
        yield (
            f"RANDOM START, {asked}: this trains from nothing {on}: {use}. Give model.weights=openai or a file."
        )
    elif built_in and config.model.preset != "tiny":
        yield (
            f"BUILT-IN DATA: no data.shards were given, so {start.weights} weights are trained on coloured shapes and "
            "forget the rest. Give data.shards='/data/{00000..00999}.tar'; glide-ds prepare pack makes them."
        )
    if (
        start.weights != "random"
        and PHASES[config.train.phase].needs_adapter
        and start.weights in NAMED_WEIGHTS
    ):
        yield (
            f"NO PARENT: phase {config.train.phase!r} starts with an untrained adapter, for {config.run.dir} holds no "
            "earlier phase. Fine for trying things out; otherwise run phases 1 and 2 first."
        )


def _of_the_data(config: Config, arithmetic: BatchArithmetic, data: Mapping[str, Any]) -> Iterator[str]:
    samples, batch = data["samples"], arithmetic.global_batch
    if samples is None or _is_built_in(config):
        return
    if samples < batch:
        yield (
            f"FEWER PICTURES THAN A BATCH: of {samples:,} some come twice in a batch of {batch:,}. Lower "
            f"train_batch_size to {samples:,} or less, or add pictures."
        )
    epochs = config.train.steps * batch / samples
    if epochs > MOST_EPOCHS:
        fewer = max(1, MOST_EPOCHS * samples // batch)
        yield (
            f"{epochs:,.0f} EPOCHS: each of {samples:,} pictures is shown so often that it is learned by heart. "
            f"train.steps={fewer:,} shows each {MOST_EPOCHS} times; more pictures, or a lower learning rate, help too."
        )


def _is_built_in(config: Config) -> bool:
    return all(is_built_in(part.shards) for part in config.data.mix_parts)
