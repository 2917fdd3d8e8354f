"""Pictures drawn while training: the same captions and noise each time, so that grids can be compared."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from glide_ds.config import Config
from glide_ds.data.loader import build_source
from glide_ds.diffusion.pixels import to_signed
from glide_ds.inference.draw import draw
from glide_ds.model.clip import FrozenClip
from glide_ds.model.glide import Glide
from glide_ds.training.faults.watchdog import Watch
from glide_ds.training.logging import RunLog
from glide_ds.training.zero.ema import Ema, averaged


class Sampler:
    """Draws the run's sample grids, on rank 0, by the averaged weights where there are any; the others wait."""

    def __init__(
        self,
        config: Config,
        clip: FrozenClip | None,
        *,
        model: Glide,
        ema: Ema | None,
        log: RunLog,
        watch: Watch,
    ) -> None:
        self.config, self.clip, self.model, self.ema = config, clip, model, ema
        self.log, self.watch = log, watch
        self.active = dist.get_rank() == 0 and config.log.samples_every > 0
        self.captions, self.low_res = example_inputs(config) if self.active else ([], None)

    def draw(self, done: int) -> None:
        """Write the grid after update `done`. Collective."""
        self.watch.at("sample", done)
        with averaged(self.ema):
            if self.active:
                self._draw(done)

    def _draw(self, done: int) -> None:
        options, device = self.config.log, next(self.model.parameters()).device
        images = draw(
            self.model,
            self.captions,
            schedule=self.config.model.noise_schedule,
            clip_embedding=None if self.clip is None else self.clip.encode_text(self.captions),
            guidance=options.guidance,
            steps=options.sample_steps,
            seed=self.config.train.seed,
            low_res=None if self.low_res is None else self.low_res.to(device),
            progress=self.watch.over,
        )
        self.log.line(f"drew {self.log.pictures(done, images, self.captions)}")


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
        config.data.changed("data", workers=0),
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
