"""Pictures drawn while training: the same captions and noise each time, so that grids can be compared."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from glide_ds.config import Config
from glide_ds.data.loader import build_source
from glide_ds.diffusion.pixels import to_signed
from glide_ds.inference.draw import draw

if TYPE_CHECKING:
    from glide_ds.training.setup import PhaseRun


class Sampler:
    """Draws the run's sample grids, on rank 0, by the averaged weights where there are any; the others wait."""

    def __init__(self, run: PhaseRun) -> None:
        self.run = run
        self.active = dist.get_rank() == 0 and run.config.log.samples_every > 0
        self.captions, self.low_res = example_inputs(run.config) if self.active else ([], None)

    def draw(self, done: int) -> None:
        """Write the grid after update `done`. Collective."""
        self.run.watch.at("sample", done)
        with self.run.ema.applied() if self.run.ema else nullcontext():
            if self.active:
                self._draw(done)

    def _draw(self, done: int) -> None:
        run, log = self.run, self.run.config.log
        embedding = None if run.clip is None else run.clip.encode_text(self.captions)
        images = draw(
            run.model,
            self.captions,
            schedule=run.config.model.noise_schedule,
            clip_embedding=embedding,
            guidance=log.guidance,
            steps=log.sample_steps,
            seed=run.config.train.seed,
            low_res=None if self.low_res is None else self.low_res.to(run.device),
            progress=run.watch.over,
        )
        run.log.line(f"drew {run.log.pictures(done, images, self.captions)}")


def example_inputs(config: Config) -> tuple[list[str], Tensor | None]:
    """The captions to draw, and for an upsampler the pictures to enlarge, [B, 3, S/4, S/4] in [-1, 1].

    `log.sample_prompts`, else captions of the run's own data.
    """
    prompts, architecture = list(config.log.sample_prompts), config.model.architecture
    if prompts and not architecture.upsamples:
        return prompts, None
    count = len(prompts) or config.log.samples
    if not prompts:  # a set may hold fewer samples than a grid has places
        count = min(count, config.deepspeed["train_batch_size"])
    source = build_source(
        replace(config.data, workers=0),
        image_size=architecture.image_size,
        context_length=architecture.text_ctx,
        global_batch=count,
        micro_batch=count,
        rank=0,
        world_size=1,
        seed=config.train.seed,
        low_res=architecture.upsamples,
    )
    batch = next(source.batches(0))
    return prompts or list(batch.captions), None if batch.low_res is None else to_signed(batch.low_res)
