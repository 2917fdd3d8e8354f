"""`glide_ds.load`: a model that draws, in Python and behind `glide-ds sample` and `glide-ds demo`.

B pictures, S image side, D CLIP width.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor

from glide_ds.commands.load import Loaded, load_model
from glide_ds.diffusion.pixels import to_signed
from glide_ds.diffusion.sampling import Options, Progress
from glide_ds.errors import ConfigError
from glide_ds.files import PathLike
from glide_ds.inference import enlarge
from glide_ds.inference.canvas import Files, read_canvas
from glide_ds.inference.draw import draw
from glide_ds.inference.prompts import clip_prompt, decode_picture
from glide_ds.inference.requests import Request
from glide_ds.model.clip import FrozenClip
from glide_ds.training.speed.compiling import compile_blocks, compiler_told

STEPS, SAMPLER = 20, "dpm++2m"  # what pictures are drawn by where nothing else is said
BATCH = 16  # pictures drawn at once


def load(
    source: str,
    upsampler: str | None = None,
    device: str | torch.device | None = None,
    *,
    ema: bool = False,
    clip_model: str | None = None,
    bf16: bool = False,
    compiled: bool = False,
    upsampler_steps: str = enlarge.STEPS,
) -> Drawer:
    """A model that draws: an export, a run directory or checkpoint folder, `openai`, or `builtin:tiny`.

    `upsampler` is a second model, of kind upsample, that enlarges its pictures four times. `device` is a GPU where
    there is one, if nothing is said. `ema` takes the average of a run's weights; `clip_model` is where the CLIP
    encoder's weights are now; `bf16` computes in bfloat16; `compiled` compiles the blocks at the first drawing;
    `upsampler_steps` are the upsampler's, as published if nothing is said.
    Raises GlideError for what can't be had or does not fit.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    base = load_model(source, device, ema=ema, clip_model=clip_model)
    enlarging = load_model(upsampler, device, kind="upsample") if upsampler else None
    if enlarging:
        check_upsampler(str(upsampler), enlarging, base)
    for loaded in (base, enlarging):
        if loaded and bf16:
            loaded.model.to(torch.bfloat16)
        if loaded and compiled:
            compile_blocks(loaded.model)
    return Drawer(base, enlarging, compiled=compiled, upsampler_steps=upsampler_steps)


def check_upsampler(source: str, upsampler: Loaded, base: Loaded) -> None:
    """Raises ConfigError where it is none, or reads pictures of another size than `base` draws."""
    config, side = upsampler.model.config, base.model.config.image_size
    if not config.upsamples or config.image_size // 4 != side:
        raise ConfigError(
            f"the upsampler {source} is of kind {config.kind!r} and reads {config.image_size // 4} px; the pictures "
            f"have {side} px",
            remedy="give an upsampler that fits",
        )


class Drawer:
    """A model, its CLIP encoder and perhaps an upsampler: `model("a corgi", n=4)` draws four corgis."""

    def __init__(
        self,
        base: Loaded,
        upsampler: Loaded | None = None,
        *,
        compiled: bool = False,
        upsampler_steps: str = enlarge.STEPS,
    ) -> None:
        self.base, self.upsampler, self.upsampler_steps = base, upsampler, upsampler_steps
        self.told = compiler_told if compiled else nullcontext  # torch's compiler takes 1 s to import
        self.device = next(base.model.parameters()).device
        self._encoder: FrozenClip | None = None

    def __call__(
        self,
        prompt: str = "",
        image: PathLike | Image.Image | None = None,
        n: int = 1,
        *,
        steps: int | str = STEPS,
        guidance: float = 3.0,
        clip_scale: float = 1.0,
        seed: int = 0,
        spacing: str = "uniform",
        batch: int = BATCH,
        **options: Any,
    ) -> list[Image.Image]:
        """Draw `n` pictures of a caption, of a picture that CLIP sees, or of both: by `seed`, seed + 1, …

        A model with a CLIP adapter reads the caption by CLIP too, where no picture is given; clip_scale says how
        strongly, 0 not at all. options: diffusion.sample's, such as sampler. At most `batch` are drawn at once.
        Raises GlideError for what can't be drawn.
        """
        if not prompt and image is None:
            raise ConfigError("there is nothing to draw", remedy="give a prompt or an image")
        if n < 1 or batch < 1:
            raise ConfigError(f"n is {n}, batch {batch}", remedy="give 1 or more")
        given: Options = {"sampler": SAMPLER, "guidance": guidance, "clip_scale": clip_scale, **options}  # type: ignore[typeddict-item]
        embedding = self.see([prompt], image) if self.base.clip else None
        if image is not None and embedding is None:
            raise ConfigError(
                "a picture prompt was given to a model without a CLIP adapter", remedy="leave it out"
            )
        pictures: list[Image.Image] = []
        for first in range(0, n, batch):
            seeds = [seed + place for place in range(first, min(first + batch, n))]
            given["clip_embedding"] = None if embedding is None else embedding.expand(len(seeds), -1)
            drawn = self.draw([prompt] * len(seeds), seeds, steps=steps, spacing=spacing, **given)
            pictures += [Image.fromarray(pixels) for pixels in drawn.numpy()]
        return pictures

    def draw(
        self,
        captions: list[str],
        seeds: Sequence[int],
        *,
        steps: int | str = STEPS,
        spacing: str = "uniform",
        **options: Unpack[Options],
    ) -> Tensor:
        """Captions drawn, and enlarged where there is an upsampler: uint8 [B, S, S, 3] on the host."""
        small = self.draw_small(captions, seeds, steps=steps, spacing=spacing, **options)
        return self.enlarge(small, captions, seeds)

    def draw_small(
        self,
        captions: list[str],
        seeds: Sequence[int],
        *,
        steps: int | str = STEPS,
        spacing: str = "uniform",
        files: Sequence[Files | None] = (),
        **options: Unpack[Options],
    ) -> Tensor:
        """The same at the base model's own side; files: what is to be filled in, by an inpainting model."""
        canvas = read_canvas(files, self.base.model.config.image_size)
        if canvas:
            options |= canvas.options(self.device)
        with self.told():
            small = draw(
                self.base.model,
                captions,
                schedule=self.base.schedule,
                steps=steps,
                spacing=spacing,
                seed=seeds,
                **options,
            ).cpu()
        return canvas.kept(small) if canvas else small

    def enlarge(
        self,
        images: Tensor,
        captions: list[str],
        seeds: Sequence[int],
        progress: Progress | None = None,
        files: Sequence[Files | None] = (),
    ) -> Tensor:
        """uint8 [B, S, S, 3] → uint8 [B, 4S, 4S, 3], as inference/enlarge.py says.

        files: the pictures that were filled in, whose known pixels stay as they are at this side too.
        """
        if self.upsampler is None:
            return images
        config = self.upsampler.model.config
        canvas = read_canvas(files, config.image_size)
        options: Options = {
            **enlarge.DRAWN,
            "guidance": enlarge.GUIDANCE,
            "low_res": to_signed(images).to(self.device),
            "progress": progress,
        }
        if canvas and config.inpaints:
            options |= canvas.options(self.device)
        with self.told():
            schedule = self.upsampler.schedule
            large = draw(
                self.upsampler.model,
                captions,
                schedule=schedule,
                steps=self.upsampler_steps,
                seed=seeds,
                **options,
            ).cpu()
        return canvas.kept(large) if canvas else large

    def encoder(self, source: str = "text") -> FrozenClip:
        """The CLIP encoder with the towers for `source`, loaded once. Raises ConfigError where the model has none."""
        if self._encoder is None or self._encoder.source not in (source, "both"):
            self._encoder = self.base.encoder(self.device, source if self._encoder is None else "both")
        if self._encoder is None:
            raise ConfigError("the model has no CLIP adapter", remedy="give an export of a phase with CLIP")
        return self._encoder

    def encoder_for(self, requests: Sequence[Request]) -> FrozenClip:
        """The CLIP encoder with the towers that requests take."""
        return self.encoder("both" if any(request.images for request in requests) else "text")

    def see(self, texts: Sequence[str], image: PathLike | Image.Image | None = None) -> Tensor:
        """What CLIP says of texts, or of one picture in their place: [B, D] on the device."""
        if image is None:
            return self.encoder().encode_text(texts)
        encoder = self.encoder("both")
        if not isinstance(image, Image.Image):
            return clip_prompt(encoder, [str(image)], [], self.base.pictures)
        data = io.BytesIO()
        image.save(data, "PNG" if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "TIFF")
        seen = decode_picture(data.getvalue(), encoder.image_side, self.base.pictures, "given")
        return encoder.encode_image(seen[None])
