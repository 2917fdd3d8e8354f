"""Pictures drawn while training: the same prompts and noise each time, so that grids can be compared.

N prompts, S image side, C side of the pictures that CLIP reads, D CLIP width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from glide_ds.config import Config
from glide_ds.data.pictures.decode import Cropping
from glide_ds.data.samples import SampleSet
from glide_ds.data.streams.source import build_source
from glide_ds.diffusion.pixels import to_signed
from glide_ds.inference.draw import Row, draw
from glide_ds.inference.enlarge import DRAWN
from glide_ds.inference.inpaint import fill, masked
from glide_ds.inference.prompts import read_picture
from glide_ds.model.clip import FrozenClip
from glide_ds.model.glide import Glide
from glide_ds.training.faults.watchdog import Watch
from glide_ds.training.logging import RunLog
from glide_ds.training.zero.ema import Ema, averaged


class Examples(NamedTuple):
    """What the grids are drawn from."""

    captions: list[str]
    images: Tensor | None = None  # uint8 [N, S, S, 3], of the captions, or what a model is given something of
    low_res: Tensor | None = None  # uint8 [N, S/4, S/4, 3], for an upsampler
    known: Tensor | None = None  # uint8 [N, S, S], 1 where an inpainting model is shown the picture
    pictures: Tensor | None = None  # uint8 [N, C, C, 3], where CLIP reads pictures

    def given(self) -> Iterator[tuple[str, Tensor]]:
        """What the model is given of the pictures, uint8 [N, S, S, 3], by what people call it."""
        if self.images is None:
            return
        if self.low_res is not None:
            yield "input", F.interpolate(self.low_res.movedim(3, 1), self.images.shape[1:3]).movedim(1, 3)
        if self.known is not None:
            yield "masked", masked(self.images, self.known)


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
        opened: SampleSet | None = None,
    ) -> None:
        self.config, self.clip, self.model, self.ema = config, clip, model, ema
        self.log, self.watch = log, watch
        self.active = dist.get_rank() == 0 and config.log.samples_every > 0
        side = clip.image_side if clip and config.clip.pictured else None
        self.examples = find_examples(config, side, opened) if self.active else Examples([])

    def draw(self, done: int) -> None:
        """Write the grid after update `done`. Collective."""
        self.watch.at("sample", done)
        with averaged(self.ema):
            if self.active:
                self.log.line(f"drew {self.log.pictures(done, list(self._rows()))}")
                adapter = (p for name, p in self.model.named_parameters() if "clip" in name)
                self.log.adapter(done, [float(p.detach().norm()) for p in adapter])

    def _rows(self) -> Iterator[Row]:
        """Captions by caption and CLIP; and the pictures that CLIP reads over what it draws of them alone.

        What a model is given of pictures stands above, and the pictures themselves below.
        """
        captions, pictures = self.examples.captions, self.examples.pictures
        for name, images in self.examples.given():
            yield Row(images, [name] * len(images))
        if pictures is None or self.config.clip.pictured < 1 or self.config.log.sample_prompts:
            embedding = None if self.clip is None else self.clip.encode_text(captions)
            yield Row(self._drawn(captions, embedding), captions)
        if pictures is not None and self.clip is not None:
            side = self.config.model.architecture.image_size
            shown = F.interpolate(pictures.movedim(3, 1).float(), (side, side), mode="area")
            yield Row(shown.round().byte().movedim(1, 3), ["prompt"] * len(pictures))
            yield Row(self._drawn([""] * len(pictures), self.clip.encode_image(pictures)), [""] * len(pictures))
        if self.examples.images is not None:
            yield Row(self.examples.images, ["original"] * len(self.examples.images))

    def _drawn(self, captions: list[str], embedding: Tensor | None) -> Tensor:
        options, (_, images, low_res, known, _) = self.config.log, self.examples
        device = next(self.model.parameters()).device
        drawing: dict[str, Any] = {
            "schedule": self.config.model.noise_schedule,
            "clip_embedding": embedding,
            "guidance": options.guidance,
            "steps": options.sample_steps,
            "seed": self.config.train.seed,
            "low_res": None if low_res is None else to_signed(low_res).to(device),
            "progress": self.watch.over,
            **(DRAWN if low_res is not None else {}),
        }
        if images is not None and known is not None:
            return fill(self.model, images, known, captions, **drawing)
        return draw(self.model, captions, **drawing).cpu()


def find_examples(config: Config, clip_side: int | None, opened: SampleSet | None = None) -> Examples:
    """`log.sample_prompts` and `log.sample_images`, else captions and pictures of the run's own data.

    `clip_side` is C, where CLIP reads pictures. Raises GlideError for an image that can't be used.
    """
    cropping = Cropping(config.data.crop, config.data.trim)
    prompts, architecture = list(config.log.sample_prompts), config.model.architecture
    given = architecture.upsamples or architecture.inpaints
    own = (
        torch.stack([read_picture(path, clip_side, cropping) for path in config.log.sample_images])
        if (clip_side and config.log.sample_images)
        else None
    )
    if prompts and not given and (own is not None or not clip_side):
        return Examples(prompts, pictures=own)
    count = len(prompts) or config.log.samples
    if not prompts:  # a set may hold fewer samples than a grid has places
        count = min(count, config.deepspeed["train_batch_size"])
    source = build_source(
        config.data.changed("data", workers=0, clip_store=None),
        image_size=architecture.image_size,
        context_length=architecture.text_ctx,
        global_batch=count,
        micro_batch=count,
        rank=0,
        world_size=1,
        seed=config.train.seed,
        low_res=architecture.upsamples,
        masked=architecture.inpaints,
        clip=config.clip.changed("clip", source="image") if clip_side else None,
        clip_side=clip_side,
        opened=opened,
    )
    batch = next(source.batches(0))
    return Examples(
        prompts or list(batch.captions),
        batch.images if given or not (prompts or clip_side) else None,
        batch.low_res,
        batch.known,
        batch.clip_images if own is None else own,
    )
