"""From noise to images: reverse steps, the loop over them, classifier-free guidance.

B samples, S image side. A sampler is one function in SAMPLERS; to add one, write it and enter it there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glide_ds.diffusion.process import Diffusion
from glide_ds.errors import ConfigError, GlideError
from glide_ds.model.glide import Glide
from glide_ds.tokenizer import END_TOKEN

Step = Callable[..., Tensor]  # (diffusion, model output, x_t, t, noise) -> x_{t-1}; options by keyword
Denoiser = Callable[[Tensor, Tensor], Tensor]  # x_t [B, 3, S, S], t [B] -> model output [B, 6, S, S]
Progress = Callable[[Sequence[int]], Iterable[int]]  # wraps the steps: tqdm, for one


def ddpm_step(diffusion: Diffusion, output: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Draw x_{t-1} from p(x_{t-1} | x_t) with the predicted x_0 clipped (DDPM, algorithm 2)."""
    p = diffusion.p_mean_variance(output, x_t, t, clip_x0=True)
    return p.mean + _not_last(t) * torch.exp(0.5 * p.log_variance) * noise


def ddim_step(
    diffusion: Diffusion, output: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, eta: float = 0.0
) -> Tensor:
    """x_{t-1} by DDIM (arXiv 2010.02502, equations 12 and 16): deterministic at eta 0."""
    x0 = diffusion.p_mean_variance(output, x_t, t, clip_x0=True).x0
    eps = diffusion.predict_eps(x0, x_t, t)
    alpha_bar = diffusion.table("alphas_cumprod", t, x_t.dtype)
    previous = diffusion.table("alphas_cumprod_prev", t, x_t.dtype)
    sigma = eta * torch.sqrt((1 - previous) / (1 - alpha_bar)) * torch.sqrt(1 - alpha_bar / previous)
    mean = torch.sqrt(previous) * x0 + torch.sqrt(1 - previous - sigma**2) * eps
    return mean + _not_last(t) * sigma * noise


def _not_last(t: Tensor) -> Tensor:
    return (t != 0)[:, None, None, None]


SAMPLERS: dict[str, Step] = {"ddpm": ddpm_step, "ddim": ddim_step}


def guide(output: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: eps = u + scale * (c - u) (GLIDE, equation 3).

    The first half of the rows is conditional, the second unconditional. All rows get the guided epsilon; each
    keeps its own variance channels.
    """
    eps, variance = output.chunk(2, dim=1)
    conditional, unconditional = eps.chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    return torch.cat([guided.repeat(2, 1, 1, 1), variance], dim=1)


def guide_apart(output: Tensor, scale: float, clip_scale: float) -> Tensor:
    """Guidance with a scale of its own for CLIP: eps = u + scale * (c - u) + clip_scale * (cc - c).

    As InstructPix2Pix guides by two conditions (arXiv 2211.09800, equation 3). Rows come in three parts of B: caption
    and CLIP (cc), the caption alone (c), neither (u). Returns [B, 6, S, S] with the variance channels of the first.
    """
    eps, variance = output.chunk(2, dim=1)
    both, caption, neither = eps.chunk(3)
    guided = neither + scale * (caption - neither) + clip_scale * (both - caption)
    return torch.cat([guided, variance[: len(guided)]], dim=1)


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
    sampler: str = "ddpm",
    eta: float = 0.0,
    noise: Tensor | None = None,
    noise_scale: float = 1.0,
    low_res: Tensor | None = None,
    inpaint_image: Tensor | None = None,
    inpaint_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Draw images [B, 3, S, S] in [-1, 1] for captions (tokens and mask [B, T]) with a bare Glide model.

    clip_embedding [B, D] conditions on CLIP as well, clip_scale times as strongly as trained (0: not at all); the
    unconditional rows of guidance then drop caption and CLIP together. guidance 1 means none and halves the work.
    clip_guidance gives CLIP a scale of its own beside the caption's, for half as much work again.

    noise is x_T [B, 3, S, S], drawn if not given and multiplied by noise_scale (GLIDE's upsampler: 0.997). A
    generator makes all draws reproducible; one on the CPU makes them equal on every device. low_res
    [B, 3, S/4, S/4] is rounded to 8-bit levels; known pixels of inpaint_image (mask 1) stay as they are. eta is
    DDIM's. progress wraps the sequence of steps, as tqdm does.

    The model is put in eval mode meanwhile. Raises GlideError for a sampler or option that does not exist, and for a
    clip_scale below 0 or a clip_guidance without an embedding.
    """
    check_clip_strength(clip_scale, clip_guidance, given=clip_embedding is not None)
    if clip_scale == 0:
        clip_embedding, clip_guidance = None, None
    step = _step(sampler, eta)
    device = tokens.device
    if noise is None:
        side = model.config.image_size
        noise = _draw((len(tokens), 3, side, side), device, generator)
    conditions: dict[str, Any] = {"low_res": None if low_res is None else _round_to_bytes(low_res)}
    conditions |= {"inpaint_image": inpaint_image, "inpaint_mask": inpaint_mask}
    with _evaluating(model):
        clip = None if clip_embedding is None else ClipPrompt(clip_embedding, clip_scale, clip_guidance)
        denoise = _denoiser(model, diffusion, tokens, mask, clip, guidance, conditions)
        if inpaint_image is not None and inpaint_mask is not None:
            denoise = _keep_known(diffusion, denoise, inpaint_image, inpaint_mask)
        shape = noise.shape
        x = run_steps(
            diffusion, denoise, noise * noise_scale, step, lambda _: _draw(shape, device, generator), progress
        )
    return x.clamp(-1, 1)


def _step(sampler: str, eta: float) -> Step:
    if sampler not in SAMPLERS:
        raise GlideError(f"sampler {sampler!r} does not exist", remedy=f"choose one of {', '.join(SAMPLERS)}")
    step = SAMPLERS[sampler]
    if not eta:
        return step
    if "eta" not in inspect.signature(step).parameters:
        raise GlideError(f"eta={eta} has no effect on sampler {sampler!r}", remedy="leave it out, or use ddim")
    return partial(step, eta=eta)


class ClipPrompt(NamedTuple):
    """What CLIP is to say, and how loudly."""

    embedding: Tensor  # [B, D]
    scale: float = 1.0
    guidance: float | None = None  # None: that of the caption, which takes two passes instead of three


def check_clip_strength(scale: float, guidance: float | None, *, given: bool) -> None:
    """Raises ConfigError for what could not be drawn by."""
    if not 0 <= scale < math.inf:
        raise ConfigError(
            f"clip_scale is {scale:g}", "CLIP can't add less than nothing", "give 0 (CLIP off) to about 1.5"
        )
    if guidance is not None and not math.isfinite(guidance):
        raise ConfigError(f"clip_guidance is {guidance:g}", remedy="give a number, such as 1")
    if guidance is not None and not given:
        raise ConfigError(
            f"clip_guidance = {guidance:g} without a CLIP embedding",
            "it would do nothing",
            "leave it out, or give a CLIP prompt to a model with an adapter",
        )


def _denoiser(
    model: Glide,
    diffusion: Diffusion,
    tokens: Tensor,
    mask: Tensor,
    clip: ClipPrompt | None,
    guidance: float,
    conditions: dict[str, Any],
) -> Denoiser:
    """The model with everything but x_t and t fixed; the captions are encoded once, here.

    Its passes are rows of one batch, by (caption kept, CLIP kept). Where nothing is said there is nothing to guide by.
    """
    said = clip is not None or bool(mask.any())
    passes, combine = _passes(guidance if said else 1.0, clip.guidance if clip else None)
    count, empty = len(tokens), torch.full_like(tokens, END_TOKEN)
    text = model.encode_text(
        torch.cat([tokens if caption else empty for caption, _ in passes]),
        torch.cat([mask if caption else torch.zeros_like(mask) for caption, _ in passes]),
    )
    given: dict[str, Any] = {name: _times(value, len(passes)) for name, value in conditions.items()}
    if clip is not None:
        given |= {"clip_embedding": _times(clip.embedding, len(passes)), "clip_scale": clip.scale}
        if len(passes) > 1:
            kept = torch.tensor([kept for _, kept in passes], device=tokens.device)
            given["clip_drop"] = ~kept.repeat_interleave(count)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        times = diffusion.model_timesteps(t).repeat(len(passes))
        return combine(model(_times(x, len(passes)), times, text=text, **given))[:count]

    return denoise


def _passes(
    guidance: float, clip_guidance: float | None
) -> tuple[list[tuple[bool, bool]], Callable[[Tensor], Tensor]]:
    """(caption kept, CLIP kept) of each pass, and what makes one prediction of them."""
    if clip_guidance is not None:
        passes = [(True, True), (True, False), (False, False)]
        return passes, partial(guide_apart, scale=guidance, clip_scale=clip_guidance)
    if guidance == 1:
        return [(True, True)], lambda output: output
    return [(True, True), (False, False)], partial(guide, scale=guidance)


def _keep_known(diffusion: Diffusion, denoise: Denoiser, image: Tensor, mask: Tensor) -> Denoiser:
    """Replace epsilon where the mask is 1, so that the x_0 it implies is the known image there."""

    def constrained(x: Tensor, t: Tensor) -> Tensor:
        eps, variance = denoise(x, t).chunk(2, dim=1)
        eps = torch.where(mask.bool(), diffusion.predict_eps(image, x, t), eps)
        return torch.cat([eps, variance], dim=1)

    return constrained


def _times(x: Tensor | None, count: int) -> Tensor | None:
    return x if x is None or count == 1 else torch.cat([x] * count)


def _draw(shape: Sequence[int], device: torch.device, generator: torch.Generator | None) -> Tensor:
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
