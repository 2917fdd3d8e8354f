"""From noise to images: the loop over a sampler's steps.

B samples, S image side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from glide_ds.diffusion.guidance import (
    ClipPrompt,
    Denoiser,
    Guidance,
    check_clip_strength,
    check_guidance,
    make_denoiser,
)
from glide_ds.diffusion.process import Diffusion
from glide_ds.diffusion.samplers import Step, make_step
from glide_ds.model.glide import Glide

Progress = Callable[[Sequence[int]], Iterable[int]]  # wraps the steps: tqdm, for one
PURE_NOISE = 0.01  # an alpha-bar below it: nothing of a picture is seen


def run_steps(
    diffusion: Diffusion,
    denoise: Denoiser,
    x: Tensor,
    step: Step,
    noise_at: Callable[[int], Tensor],
    progress: Progress | None = None,
) -> Tensor:
    """Take x from pure noise to an image. `noise_at(t)` gives the noise that the step at index t adds."""
    steps = range(diffusion.num_timesteps - 1, -1, -1)
    for index in progress(steps) if progress is not None else steps:
        t = torch.full((len(x),), index, dtype=torch.int64, device=x.device)
        x = step(diffusion, denoise(x, t), x, t, noise_at(index))
    return x


class Options(TypedDict, total=False):
    """How pictures are drawn; `sample` says what each means and what it is by default."""

    sampler: str
    eta: float
    guidance: float
    guidance_rescale: float
    guidance_interval: tuple[float, float] | None
    clip_embedding: Tensor | None
    clip_scale: float
    clip_guidance: float | None
    clip_weights: Sequence[float]
    noise_scale: float
    low_res: Tensor | None
    inpaint_image: Tensor | None
    inpaint_mask: Tensor | None
    progress: Progress | None


@torch.no_grad()
def sample(
    model: Glide,
    diffusion: Diffusion,
    *,
    tokens: Tensor,
    mask: Tensor,
    clip_embedding: Tensor | None = None,
    clip_scale: float = 1.0,
    guidance: float = 3.0,
    clip_guidance: float | None = None,
    clip_weights: Sequence[float] = (),
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    sampler: str = "ddpm",
    eta: float = 0.0,
    noise: Tensor | None = None,
    noise_scale: float = 1.0,
    low_res: Tensor | None = None,
    inpaint_image: Tensor | None = None,
    inpaint_mask: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Draw images [B, 3, S, S] in [-1, 1] for captions (tokens and mask [B, T]) with a bare Glide model.

    clip_embedding [B, D] conditions on CLIP as well, clip_scale times as strongly as trained (0: not at all); the
    unconditional rows of guidance then drop caption and CLIP together. guidance 1 means none and halves the work.
    clip_guidance gives CLIP a scale of its own beside the caption's, for half as much work again. With N clip_weights
    the embedding is [B, N, D] and each of the N pulls for itself, in N + 1 passes (guidance.compose). guidance_rescale
    and guidance_interval: see guidance.Guidance.

    noise is x_T [B, 3, S, S], drawn if not given and multiplied by noise_scale (GLIDE's upsampler: 0.997). A
    generator makes all draws reproducible; one on the CPU makes them equal on every device, and one for each picture
    makes a picture's independent of the others. low_res [B, 3, S/4, S/4] is rounded to 8-bit levels; a process that
    leaves out the noisiest steps begins at it, enlarged and noised (Chung et al. 2022, arXiv 2112.05146). Known pixels
    of inpaint_image (mask 1) stay as they are. eta is DDIM's. progress wraps the sequence of steps, as tqdm does.
    The model is put in eval mode meanwhile. Raises GlideError for a sampler or option that does not exist, and for a
    clip_scale below 0 or a clip_guidance without an embedding.
    """
    check_clip_strength(clip_scale, clip_guidance, given=clip_embedding is not None)
    how = Guidance(guidance, guidance_rescale, guidance_interval)
    check_guidance(how, clip_guidance)
    step = make_step(sampler, diffusion, eta)
    device = tokens.device
    if noise is None:
        side = model.config.image_size
        noise = _draw((len(tokens), 3, side, side), device, generator)
    small = None if low_res is None else _round_to_bytes(low_res)
    conditions = {"low_res": small, "inpaint_image": inpaint_image, "inpaint_mask": inpaint_mask}
    with _evaluating(model):
        clip = None
        if clip_embedding is not None and clip_scale:
            clip = ClipPrompt(clip_embedding, clip_scale, clip_guidance, clip_weights)
        denoise = make_denoiser(model, diffusion, tokens, mask, clip, how, conditions)
        if inpaint_image is not None and inpaint_mask is not None:
            denoise = _keep_known(diffusion, denoise, inpaint_image, inpaint_mask)
        x, shape = noise * noise_scale, noise.shape
        x = x if low_res is None else _begun_at(low_res, diffusion, x)
        x = run_steps(diffusion, denoise, x, step, lambda _: _draw(shape, device, generator), progress)
    return x.clamp(-1, 1)


def _begun_at(low_res: Tensor, diffusion: Diffusion, noise: Tensor) -> Tensor:
    """x_T of a process that begins where a picture is seen already; the noise itself for any other."""
    if diffusion.alphas_cumprod[-1] < PURE_NOISE:
        return noise
    enlarged = F.interpolate(low_res, noise.shape[-2:], mode="bicubic", align_corners=False).clamp(-1, 1)
    last = torch.full((len(noise),), diffusion.num_timesteps - 1, device=noise.device)
    return diffusion.q_sample(enlarged, last, noise)


def _keep_known(diffusion: Diffusion, denoise: Denoiser, image: Tensor, mask: Tensor) -> Denoiser:
    """Replace epsilon where the mask is 1, so that the x_0 it implies is the known image there."""

    def constrained(x: Tensor, t: Tensor) -> Tensor:
        eps, variance = denoise(x, t).chunk(2, dim=1)
        eps = torch.where(mask.bool(), diffusion.predict_eps(image, x, t), eps)
        return torch.cat([eps, variance], dim=1)

    return constrained


def _draw(
    shape: Sequence[int],
    device: torch.device,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    if isinstance(generator, Sequence):
        return torch.stack([_draw(shape[1:], device, own) for own in generator])
    source = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, device=source).to(device)


def _round_to_bytes(image: Tensor) -> Tensor:
    """[-1, 1] -> the nearest of 256 levels: the upsampler was trained on 8-bit images."""
    return ((image + 1) * 127.5).round() / 127.5 - 1


@contextmanager
def _evaluating(model: Glide) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
