"""Classifier-free guidance: what the model is asked at each step, and how its answers become one prediction.

B samples, S image side, D CLIP width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from glide_ds.diffusion.process import Diffusion
from glide_ds.errors import ConfigError
from glide_ds.model.glide import Glide
from glide_ds.tokenizer import END_TOKEN

Denoiser = Callable[[Tensor, Tensor], Tensor]  # x_t [B, 3, S, S], t [B] -> model output [B, 6, S, S]


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


def compose(output: Tensor, scale: float, weights: Sequence[float]) -> Tensor:
    """Several conditions at once, each pulling for itself: eps = u + scale * sum_k w_k (c_k - u).

    Composable diffusion's conjunction (Liu et al. 2022, arXiv 2206.01714, equation 11). Rows come in a part of B for
    each weight, and one without a condition (u). Returns [B, 6, S, S] with the variance channels of the first.
    """
    eps, variance = output.chunk(2, dim=1)
    *conditional, neither = eps.chunk(len(weights) + 1)
    pulls = (weight * (part - neither) for weight, part in zip(weights, conditional, strict=True))
    guided = torch.stack([neither, *(scale * pull for pull in pulls)]).sum(0)
    return torch.cat([guided, variance[: len(guided)]], dim=1)


class Guidance(NamedTuple):
    """How strongly, and where, pictures are pushed towards their captions."""

    scale: float = 3.0  # 1: not at all
    rescale: float = 0.0  # by this share the prediction is brought back to the spread of the unguided one
    interval: tuple[float, float] | None = (
        None  # guided only at noise levels sigma / alpha within; None: at all
    )


def check_guidance(guidance: Guidance, clip_guidance: float | None) -> None:
    """Raises ConfigError for what could not be drawn by, or would do nothing."""
    if not math.isfinite(guidance.scale):
        raise ConfigError(f"guidance is {guidance.scale:g}", remedy="give a number, such as 3")
    if not 0 <= guidance.rescale <= 1:
        raise ConfigError(f"guidance_rescale is {guidance.rescale:g}", remedy="give a share from 0 to 1")
    low, high = guidance.interval or (0.0, math.inf)
    if not 0 <= low < high:
        raise ConfigError(
            f"guidance_interval is {low:g} to {high:g}",
            remedy="give two noise levels sigma / alpha, the lower one first, such as 0.3 5",
        )
    if guidance.scale == 1 and clip_guidance is None and (guidance.rescale or guidance.interval):
        given = "guidance_rescale" if guidance.rescale else "guidance_interval"
        raise ConfigError(f"{given} without guidance (1)", "it would do nothing", "leave one of them out")


def rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """The guided epsilon with the conditional one's standard deviation, by `share` (arXiv 2305.08891, equation 16).

    Both are model outputs [B, 6, S, S]; the variance channels stay.
    """
    eps, variance = guided.chunk(2, dim=1)
    spread = conditional.chunk(2, dim=1)[0].std((1, 2, 3), keepdim=True) / eps.std((1, 2, 3), keepdim=True)
    return torch.cat([eps * (share * spread + 1 - share), variance], dim=1)


class ClipPrompt(NamedTuple):
    """What CLIP is to say, and how loudly."""

    embedding: Tensor  # [B, D], or [B, N, D] where N are composed
    scale: float = 1.0
    guidance: float | None = None  # None: that of the caption, which takes two passes instead of three
    weights: Sequence[float] = ()  # of the N


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


def make_denoiser(
    model: Glide,
    diffusion: Diffusion,
    tokens: Tensor,
    mask: Tensor,
    clip: ClipPrompt | None,
    guidance: Guidance,
    conditions: dict[str, Any],
) -> Denoiser:
    """The model with everything but x_t and t fixed; the captions are encoded once, here.

    Its passes are rows of one batch, by (caption kept, CLIP prompt kept). Where nothing is said there is nothing to
    guide by.
    """
    said = clip is not None or bool(mask.any())
    passes, combine = _passes(guidance.scale if said else 1.0, clip)
    count, empty = len(tokens), torch.full_like(tokens, END_TOKEN)
    text = model.encode_text(
        torch.cat([tokens if caption else empty for caption, _ in passes]),
        torch.cat([mask if caption else torch.zeros_like(mask) for caption, _ in passes]),
    )
    given: dict[str, Any] = {name: _times(value, len(passes)) for name, value in conditions.items()}
    if clip is not None:
        several = clip.embedding.unbind(1) if clip.weights else [clip.embedding]
        given["clip_embedding"] = torch.cat([several[which or 0] for _, which in passes])
        given["clip_scale"] = clip.scale
        if len(passes) > 1:
            dropped = torch.tensor([which is None for _, which in passes], device=tokens.device)
            given["clip_drop"] = dropped.repeat_interleave(count)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        times = diffusion.model_timesteps(t).repeat(len(passes))
        output = model(_times(x, len(passes)), times, text=text, **given)
        guided = combine(output)[:count]
        return rescaled(guided, output[:count], guidance.rescale) if guidance.rescale else guided

    if guidance.interval is None or len(passes) == 1:
        return denoise
    low, high = guidance.interval
    levels = np.exp(-diffusion.half_log_snr)
    inside = ((low < levels) & (levels <= high)).tolist()
    said_alone = clip._replace(guidance=None) if clip else None
    plain = make_denoiser(model, diffusion, tokens, mask, said_alone, Guidance(1.0), conditions)
    # t[0] is a sync point, once a step: all rows are at the same t.
    return lambda x, t: (denoise if inside[int(t[0])] else plain)(x, t)


def _passes(
    guidance: float, clip: ClipPrompt | None
) -> tuple[list[tuple[bool, int | None]], Callable[[Tensor], Tensor]]:
    """(caption kept, which CLIP prompt is kept) of each pass, and what makes one prediction of them."""
    if clip is not None and clip.weights:
        several: list[tuple[bool, int | None]] = [(True, which) for which in range(len(clip.weights))]
        return [*several, (False, None)], partial(compose, scale=guidance, weights=clip.weights)
    if clip is not None and clip.guidance is not None:
        return [(True, 0), (True, None), (False, None)], partial(
            guide_apart, scale=guidance, clip_scale=clip.guidance
        )
    if guidance == 1:
        return [(True, 0)], lambda output: output
    return [(True, 0), (False, None)], partial(guide, scale=guidance)


def _times(x: Tensor | None, count: int) -> Tensor | None:
    return x if x is None or count == 1 else torch.cat([x] * count)
