"""GLIDE's UNet, with attention blocks that also read the caption.

B samples, C channels, N = H * W pixels, T text tokens, W text width, E embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_ds.model.attention import Attending
from glide_ds.model.convolution import Conv2d
from glide_ds.model.layers import Block, GroupNorm, PointwiseConv1d, zero_init
from glide_ds.types import GlideConfig


class ClipContext(NamedTuple):
    """What DualAttention reads of CLIP."""

    tokens: Tensor  # [B, clip tokens, W]
    gate_offset: Tensor  # scalar, added to every gate logit
    scale: float = 1.0  # of what the tokens add, beside the gate


class Context(NamedTuple):
    """What attention blocks read beside the image."""

    text: Tensor  # [B, T, W]
    clip: ClipContext | None = None  # None leaves the CLIP branch out
    seen: Seen | None = None  # what every attention block was given is added to it


class Sight(NamedTuple):
    """What one attention block was given in a pass."""

    block: AttentionBlock
    x: Tensor  # [B, C, H, W], without its graph


Seen = list[Sight]


def timestep_embedding(timesteps: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sinusoids [B, width], cosines first, of timesteps [B] (DDPM, section 3.3)."""
    angles = timesteps[:, None].to(dtype) * frequencies(width // 2, timesteps.device).to(dtype)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def frequencies(count: int, device: torch.device) -> Tensor:
    """exp(-ln 10000 * i / count) in fp32 whatever precision the model has, as published.

    The exponential is taken in fp64 and rounded: fp32 ones differ in the last bit between processors, and at
    t = 999 that bit moves the output by 1e-6.
    """
    exponents = -math.log(10_000) * torch.arange(count, dtype=torch.float32, device=device) / count
    return exponents.double().exp().float()


def doubled(x: Tensor) -> Tensor:
    """F.interpolate(x, scale_factor=2) for the compiler, which makes its gradient a sum and not a scatter."""
    b, c, h, w = x.shape
    larger = x[:, :, :, None, :, None].expand(b, c, h, 2, w, 2).reshape(b, c, 2 * h, 2 * w)
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return larger.contiguous(memory_format=torch.channels_last) if channels_last else larger


class ResBlock(Block):
    """Residual block with scale-shift conditioning; `resample` is "up", "down" or None."""

    def __init__(
        self, channels: int, emb_width: int, out_channels: int, dropout: float, resample: str | None = None
    ) -> None:
        super().__init__()
        self.resample = resample
        self.in_layers = nn.Sequential(GroupNorm(channels), nn.SiLU(), Conv2d(channels, out_channels, 3))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_width, 2 * out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(Conv2d(out_channels, out_channels, 3)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb_be: Tensor) -> Tensor:
        norm, silu, conv = self.in_layers
        h = conv(self._resample(silu(norm(x))))
        scale, shift = self.emb_layers(emb_be)[:, :, None, None].chunk(2, dim=1)
        norm, silu, dropout, conv = self.out_layers
        h = torch.addcmul(shift, norm(h), 1 + scale)
        return self.skip_connection(self._resample(x)) + conv(dropout(silu(h)))

    def _resample(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return doubled(x) if torch.compiler.is_compiling() else F.interpolate(x, scale_factor=2.0)
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return x


class AttentionBlock(Block, Attending):
    """Self-attention of pixels over text and pixels together, in one softmax with the text first."""

    def __init__(self, channels: int, head_channels: int, text_width: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.norm = GroupNorm(channels)
        self.qkv = PointwiseConv1d(channels, 3 * channels)
        self.encoder_kv = PointwiseConv1d(text_width, 2 * channels)
        self.proj_out = zero_init(PointwiseConv1d(channels, channels))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        attended = self._attend(*self._read(x), context).transpose(1, 2).flatten(2)
        return x + self.proj_out(attended).transpose(1, 2).reshape(x.shape)

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the pixels of x [B, C, H, W], each [B, heads, N, C / heads]."""
        q, k, v = self._split_heads(self.qkv(self.norm(x).flatten(2).transpose(1, 2)), 3)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Heads [B, heads, N, C / heads] -> the same shape; what DualAttention extends."""
        text_k, text_v = self._split_heads(self.encoder_kv(context.text), 2)
        k, v = torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)
        return self.attend(q, k, v)

    def _split_heads(self, slabs_bnc: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[B, N, heads * parts * D] -> `parts` tensors [B, heads, N, D]: each head owns one slab."""
        slabs = slabs_bnc.unflatten(-1, (self.heads, parts, -1))
        return tuple(part.transpose(1, 2) for part in slabs.unbind(3))


class Stem(nn.Conv2d):
    """The first convolution, in the published order of channels: x, then what its kind is given.

    An inpainting model's channels of known pixels and their mask are convolved apart: one sum over all channels would
    be taken in another order than without them, and with their weights at zero the output is to be its plain
    twin's to the bit.
    """

    def __init__(self, in_channels: int, out_channels: int, inpaint: slice | None) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.inpaint = inpaint

    def forward(self, x: Tensor) -> Tensor:
        if self.inpaint is None:
            return super().forward(x)
        picture, weight = self._without(x), self._without(self.weight)
        apart = F.conv2d(x[:, self.inpaint], self.weight[:, self.inpaint], padding=1)
        return F.conv2d(picture, weight, self.bias, padding=1) + apart

    def _without(self, channels: Tensor) -> Tensor:
        """The channels that the plain twin has too, laid out as they would be there."""
        assert self.inpaint is not None
        rest = torch.cat([channels[:, : self.inpaint.start], channels[:, self.inpaint.stop :]], dim=1)
        return laid_out_as(channels, rest)


def laid_out_as(example: Tensor, x: Tensor) -> Tensor:
    """x, both [B, C, H, W], in NHWC where the example is."""
    nhwc = example.is_contiguous(memory_format=torch.channels_last) and not example.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


class Stage(nn.ModuleList):
    """One entry of the published block lists: a convolution, or residual blocks and attention in turn."""

    def forward(self, h: Tensor, emb_be: Tensor, context: Context) -> Tensor:
        for block in self:
            if isinstance(block, AttentionBlock):
                if context.seen is not None:
                    context.seen.append(Sight(block, h.detach()))
                h = block.run(h, context._replace(seen=None))
            elif isinstance(block, ResBlock):
                h = block.run(h, emb_be)
            else:
                h = block(h)
        return h


class UNet(nn.Module):
    """[B, in_channels, S, S], embedding [B, E] and context -> [B, 6, S, S] (epsilon, then variance).

    `attention(channels)` builds the attention blocks, so that a caller can put richer ones in their place.
    """

    def __init__(
        self, config: GlideConfig, in_channels: int, attention: Callable[[int], AttentionBlock]
    ) -> None:
        super().__init__()
        self.config = config
        width = config.model_channels
        self.emb_width = 4 * width
        self.time_embed = nn.Sequential(
            nn.Linear(width, self.emb_width), nn.SiLU(), nn.Linear(self.emb_width, self.emb_width)
        )
        first = config.channel_mult[0] * width
        self.input_blocks = nn.ModuleList([Stage([Stem(in_channels, first, config.inpaint_channels)])])
        skips = self._build_down(first, attention)
        deepest = skips[-1]
        self.middle_block = Stage(
            [self._res_block(deepest, deepest), attention(deepest), self._res_block(deepest, deepest)]
        )
        self.output_blocks = nn.ModuleList()
        last = self._build_up(skips, attention)
        self.out = nn.Sequential(GroupNorm(last), nn.SiLU(), zero_init(nn.Conv2d(last, 6, 3, padding=1)))

    def _res_block(self, channels: int, out_channels: int, resample: str | None = None) -> ResBlock:
        return ResBlock(channels, self.emb_width, out_channels, self.config.dropout, resample)

    def _build_down(self, channels: int, attention: Callable[[int], AttentionBlock]) -> list[int]:
        """Append the descending half; return the width of every skip connection it leaves."""
        skips = [channels]
        for level, mult in enumerate(self.config.channel_mult):
            out_channels = mult * self.config.model_channels
            for _ in range(self.config.num_res_blocks):
                stage = Stage([self._res_block(channels, out_channels)])
                channels = out_channels
                if 2**level in self.config.attention_ds:
                    stage.append(attention(channels))
                self.input_blocks.append(stage)
                skips.append(channels)
            if level < len(self.config.channel_mult) - 1:
                self.input_blocks.append(Stage([self._res_block(channels, channels, "down")]))
                skips.append(channels)
        return skips

    def _build_up(self, skips: list[int], attention: Callable[[int], AttentionBlock]) -> int:
        """Append the ascending half; return its last width."""
        remaining = list(skips)
        channels = remaining[-1]
        for level, mult in reversed(list(enumerate(self.config.channel_mult))):
            out_channels = mult * self.config.model_channels
            for place in range(self.config.num_res_blocks + 1):
                stage = Stage([self._res_block(channels + remaining.pop(), out_channels)])
                channels = out_channels
                if 2**level in self.config.attention_ds:
                    stage.append(attention(channels))
                if level and place == self.config.num_res_blocks:
                    stage.append(self._res_block(channels, channels, "up"))
                self.output_blocks.append(stage)
        return channels

    def denoise(self, x: Tensor, emb_be: Tensor, context: Context) -> Tensor:
        """The UNet proper, after its inputs have been assembled."""
        skips = []
        for stage in self.input_blocks:
            x = stage(x, emb_be, context)
            skips.append(x)
        x = self.middle_block(x, emb_be, context)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), emb_be, context)
        return self.out(x)
