"""GLIDE: text transformer and UNet under the published names, CLIP conditioning as an addition.

B samples, S image side, T caption tokens, W text width, D CLIP embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_ds.errors import ConfigError, GlideError
from glide_ds.model.clip_adapter import ClipAdapter, ClipVector
from glide_ds.model.dual_attention import DualAttention, missed
from glide_ds.model.layers import Block, LayerNorm, normal_parameter
from glide_ds.model.reduced import Reducible
from glide_ds.model.text import TextEncoding, Transformer
from glide_ds.model.unet import (
    AttentionBlock,
    ClipContext,
    Context,
    Seen,
    UNet,
    laid_out_as,
    timestep_embedding,
)
from glide_ds.tokenizer import N_VOCAB
from glide_ds.types import GlideConfig

_NORM_GROUPS = 32
# What is computed again in the backward pass instead of being kept, by setting of train.recompute.
RECOMPUTED: dict[str, tuple[type[Block], ...]] = {
    "none": (),
    "attention": (AttentionBlock,),
    "blocks": (Block,),
}
_EMBEDDING_STD = 0.01  # of the positional and padding embeddings; the published code leaves them undefined


def create_model(config: GlideConfig) -> Glide:
    """A freshly initialised model. Raises ConfigError if the sizes do not fit together."""
    _check(config)
    return Glide(config)


class Glide(UNet):
    """The denoiser. Its state_dict has OpenAI's names; whatever CLIP adds has `clip` in its name."""

    def __init__(self, config: GlideConfig) -> None:
        super().__init__(config, _input_channels(config), lambda channels: _attention(config, channels))
        width = config.xf_width
        self.transformer = Transformer(width, config.xf_layers, config.xf_heads)
        self.final_ln = LayerNorm(width)
        self.token_embedding = nn.Embedding(N_VOCAB, width, _weight=normal_parameter(N_VOCAB, width, std=1.0))
        self.positional_embedding = normal_parameter(config.text_ctx, width, std=_EMBEDDING_STD)
        self.padding_embedding = normal_parameter(config.text_ctx, width, std=_EMBEDDING_STD)
        self.transformer_proj = nn.Linear(width, self.emb_width)
        if config.clip_dim is not None:
            self.clip_adapter = ClipAdapter(config.clip_dim, width, config.clip_tokens, self.emb_width)
            self.clip_vector = ClipVector(config.clip_dim, self.emb_width)
            self.clip_gate_offset: Tensor
            self.register_buffer("clip_gate_offset", torch.zeros(()))

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        low_res: Tensor | None = None,
        inpaint_image: Tensor | None = None,
        inpaint_mask: Tensor | None = None,
        clip_embedding: Tensor | None = None,
        clip_drop: Tensor | None = None,
        clip_scale: float = 1.0,
        text: TextEncoding | None = None,
        seen: Seen | None = None,
    ) -> Tensor:
        """Predict noise and variance of x_t.

        x [B, 3, S, S]: x_t; timesteps [B] of the original process.
        tokens int64 [B, T] and mask bool [B, T]: the caption; or `text`, what encode_text returned for it.
        low_res [B, 3, S/4, S/4]: for upsamplers.
        inpaint_image [B, 3, S, S] and inpaint_mask [B, 1, S, S], 1 = known; neither = nothing is known.
        clip_embedding [B, D], of any length: None leaves CLIP out, which is plain GLIDE.
        clip_drop bool [B]: rows that use the null embedding instead. clip_scale multiplies what CLIP adds.
        seen: a list, to which is added what every attention block was given; see `clip_missed`.

        Returns [B, 6, S, S] in the dtype of x: epsilon, then the interpolation weights of the log variance.
        Raises GlideError if an input is missing or this kind of model has no use for it.
        """
        text = text if text is not None else self.encode_text(tokens, mask)
        dtype = self.positional_embedding.dtype
        sinusoids = timestep_embedding(
            timesteps, self.config.model_channels, torch.promote_types(dtype, torch.float32)
        )
        emb, clip = self.time_embed(sinusoids.to(dtype)) + text.pooled, None
        if clip_embedding is not None:
            x_clip = self._read_clip(clip_embedding, clip_drop)
            vector, clip = self._clip(x_clip, text.pooled, clip_scale)
            emb = emb + vector
        context = Context(text.tokens, clip, seen)
        image = self._input_image(x, low_res, inpaint_image, inpaint_mask).to(dtype)
        return self.denoise(image, emb, context).to(x.dtype)

    def encode_text(self, tokens: Tensor | None, mask: Tensor | None) -> TextEncoding:
        """Run the text transformer on tokens int64 [B, T] and mask bool [B, T] (False = padding)."""
        if tokens is None or mask is None:
            raise GlideError(
                "the model was called without a caption, which GLIDE always reads",
                remedy="pass tokens and mask (tokenizer.encode(['']) is the empty caption), or text",
            )
        if tokens.shape[1] != self.config.text_ctx:
            raise GlideError(
                f"captions of {tokens.shape[1]} tokens were given to a model that reads {self.config.text_ctx}",
                remedy=f"encode them with context_length={self.config.text_ctx}",
            )
        h = self.token_embedding(tokens) + self.positional_embedding
        h = torch.where(mask[..., None], h, self.padding_embedding)
        h = self.final_ln(self.transformer(h))
        return TextEncoding(pooled=self.transformer_proj(h[:, -1]), tokens=h)

    def clip_missed(
        self,
        seen: Seen,
        emptied_b: Tensor,
        clip_embedding: Tensor,
        clip_drop: Tensor,
        empty: TextEncoding,
        full: TextEncoding,
    ) -> Tensor:
        """How far CLIP is from adding what the emptied captions took away, and nothing beside the others: [B].

        seen: of a pass with these embeddings [B, D] and this clip_drop bool [B], in which the captions of `emptied`
        bool [B] were. empty and full: the empty caption and the real ones, encoded. Vector and tokens are each
        measured relative to what the caption says there, the tokens by the mean of all attention blocks, and added
        up: 2 where CLIP adds nothing for an emptied caption. Gradients reach what CLIP adds, and nothing else.
        """
        pooled = torch.where(emptied_b[:, None], empty.pooled, full.pooled)
        vector, clip = self._clip(self._read_clip(clip_embedding, clip_drop), pooled)
        blocks = [
            sight.block.missed(sight.x, emptied_b, empty.tokens, full.tokens, clip)
            for sight in seen
            if isinstance(sight.block, DualAttention)
        ]
        return missed(vector, full.pooled - empty.pooled, emptied_b) + torch.stack(blocks).mean(0)

    def blocks(self) -> dict[str, Block]:
        """Residual, attention and transformer blocks by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Block)}

    def reduce_products(self, reduced: bool) -> None:
        """Choose how attention and convolutions take products of fp32 tensors (see `reduced`)."""
        for module in self.modules():
            if isinstance(module, Reducible):
                module.reduced = reduced

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Within, passes go as they are written: neither compiled nor recorded."""
        recorded = self.__dict__.pop("forward", None)
        compiled = {block: block.compiled for block in self.blocks().values()}
        for block in compiled:
            block.compiled = None
        try:
            yield
        finally:
            for block, call in compiled.items():
                block.compiled = call
            if recorded is not None:
                self.__dict__["forward"] = recorded

    def recompute(self, dial: str) -> None:
        """Choose the blocks that are computed again in the backward pass, by a name of RECOMPUTED."""
        for block in self.blocks().values():
            block.recompute = isinstance(block, RECOMPUTED[dial])

    def _clip(self, x_clip: Tensor, pooled: Tensor, scale: float = 1.0) -> tuple[Tensor, ClipContext]:
        """What CLIP adds to the timestep embedding [B, E], and what DualAttention reads of it."""
        offset = self.clip_gate_offset
        vector = scale * self.clip_vector(x_clip, pooled, offset)
        return vector, ClipContext(self.clip_adapter(x_clip, pooled, offset), offset, scale)

    def _read_clip(self, embedding: Tensor, drop: Tensor | None) -> Tensor:
        if self.config.clip_dim is None:
            raise GlideError(
                "clip_embedding was given to a model without CLIP layers",
                "it would be ignored",
                f"create the model with clip_dim={embedding.shape[-1]}",
            )
        if embedding.shape[-1] != self.config.clip_dim:
            raise GlideError(
                f"clip_embedding is {embedding.shape[-1]} wide, the adapter reads {self.config.clip_dim}",
                remedy="use the CLIP encoder the model was made for, or create the model with that clip_dim",
            )
        if drop is None:
            drop = torch.zeros(len(embedding), dtype=torch.bool, device=embedding.device)
        return self.clip_adapter.read(embedding, drop)

    def _input_image(
        self, x: Tensor, low_res: Tensor | None, inpaint_image: Tensor | None, inpaint_mask: Tensor | None
    ) -> Tensor:
        """Concatenate x, known pixels, their mask and the enlarged low-resolution image, as published."""
        parts = [x]
        _check_inputs(self.config, low_res, inpaint_image, inpaint_mask)
        if inpaint_image is not None and inpaint_mask is not None:
            known = inpaint_mask.to(x.dtype)
            parts += [inpaint_image * known, known]
        elif self.config.inpaints:
            parts += [torch.zeros_like(x), torch.zeros_like(x[:, :1])]
        if low_res is not None:
            parts.append(F.interpolate(low_res, x.shape[-2:], mode="bilinear", align_corners=False))
        return laid_out_as(x, torch.cat(parts, dim=1)) if len(parts) > 1 else x


def _attention(config: GlideConfig, channels: int) -> AttentionBlock:
    if config.clip_dim is None:
        return AttentionBlock(channels, config.num_head_channels, config.xf_width)
    return DualAttention(channels, config.num_head_channels, config.xf_width, clip_width=config.xf_width)


def _input_channels(config: GlideConfig) -> int:
    return 3 + 4 * config.inpaints + 3 * config.upsamples


def _check_inputs(
    config: GlideConfig, low_res: Tensor | None, inpaint_image: Tensor | None, inpaint_mask: Tensor | None
) -> None:
    if config.upsamples != (low_res is not None):
        problem = "needs low_res [B, 3, S/4, S/4]" if config.upsamples else "has no use for low_res"
        raise GlideError(
            f"a model of kind {config.kind!r} {problem}", remedy="check which model is being called"
        )
    if (inpaint_image is None) != (inpaint_mask is None):
        raise GlideError(
            "inpaint_image and inpaint_mask go together", remedy="pass both, or neither for all unknown"
        )
    if inpaint_image is not None and not config.inpaints:
        raise GlideError(
            f"a model of kind {config.kind!r} has no use for inpaint_image", remedy=f"use {config.kind}-inpaint"
        )


def _check(config: GlideConfig) -> None:
    for mult in config.channel_mult:
        channels = mult * config.model_channels
        if channels % _NORM_GROUPS:
            raise ConfigError(
                f"model_channels {config.model_channels} times channel_mult {mult} is {channels}, which "
                f"GroupNorm cannot divide into {_NORM_GROUPS} groups",
                remedy=f"choose a multiple of {_NORM_GROUPS}",
            )
        if channels % config.num_head_channels:
            raise ConfigError(
                f"{channels} channels cannot be divided into heads of num_head_channels={config.num_head_channels}",
                remedy="choose a divisor",
            )
    if config.xf_width % config.xf_heads:
        raise ConfigError(
            f"xf_width {config.xf_width} cannot be divided into xf_heads={config.xf_heads}",
            remedy="choose a divisor",
        )
