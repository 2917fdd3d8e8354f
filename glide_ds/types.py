"""The contracts between layers, with shapes.

B samples, T caption tokens, S image side in pixels, D CLIP embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from glide_ds.errors import ConfigError

# What is computed again in the backward pass; budget: as little as train.activation_gb allows.
Recompute = Literal["auto", "none", "attention", "blocks", "budget"]
# How a GPU takes products of fp32 numbers: in full, on TF32 matrix units, or some of them by the kernels for fp16.
Precision = Literal["fp32", "tf32", "tf32-fp16-kernels"]

KINDS = ("base", "upsample", "base-inpaint", "upsample-inpaint")


@dataclass(frozen=True)
class GlideConfig:
    """One GLIDE architecture. The defaults are the published 64 px base model.

    `attention_ds` lists downsampling factors (2 means half the image side), not resolutions.
    `clip_dim=None` builds plain GLIDE; a width (512, 768, …) adds DualAttention and the ClipAdapter.
    """

    kind: str = "base"
    image_size: int = 64
    text_ctx: int = 128
    xf_width: int = 512
    xf_layers: int = 16
    xf_heads: int = 8
    model_channels: int = 192
    num_res_blocks: int = 3
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    attention_ds: tuple[int, ...] = (2, 4, 8)
    num_head_channels: int = 64
    dropout: float = 0.1
    clip_dim: int | None = None
    clip_tokens: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_mult", tuple(self.channel_mult))
        object.__setattr__(self, "attention_ds", tuple(self.attention_ds))
        if self.kind not in KINDS:
            raise ConfigError(
                f"model kind {self.kind!r} does not exist", remedy=f"choose one of {', '.join(KINDS)}"
            )

    @classmethod
    def published(cls, kind: str = "base", **changes: Any) -> GlideConfig:
        """The architecture of the released model of that kind, with `changes` applied."""
        if kind.startswith("upsample"):
            config = cls(kind, 256, num_res_blocks=2, channel_mult=(1, 1, 2, 2, 4, 4), attention_ds=(8, 16, 32))
        else:
            config = cls(kind)
        return replace(config, **changes)

    @property
    def upsamples(self) -> bool:
        return self.kind.startswith("upsample")

    @property
    def inpaints(self) -> bool:
        return self.kind.endswith("inpaint")

    @property
    def inpaint_channels(self) -> slice | None:
        """Where known pixels and their mask lie among the input channels; None where there are none."""
        return slice(3, 7) if self.inpaints else None


def send(host: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor's copy on the device, which neither waits for what the device is doing nor is waited for."""
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


ON_HOST = ("sample_ids", "slots", "pictured")


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, as the loader hands it over.

    Images stay uint8 until they reach the device: a quarter of the bytes to move.
    """

    sample_ids: Tensor  # int64 [B], the sample's number in the data set
    slots: Tensor  # int64 [B], the sample's place in the global batch
    images: Tensor  # uint8 [B, S, S, 3]
    tokens: Tensor  # int64 [B, T], of the caption, or of "" where caption dropout emptied it
    mask: Tensor  # bool [B, T]
    drop_clip: Tensor  # bool [B], the caption's dropout took CLIP along
    captions: tuple[str, ...]  # as read, before dropout
    clip: Tensor | None = None  # float16 [B, D], from a store of embeddings
    low_res: Tensor | None = None  # uint8 [B, S/4, S/4, 3], for the upsampler
    known: Tensor | None = None  # uint8 [B, S, S], 1 where an inpainting model is shown the picture
    # Where CLIP reads pictures: bool [B], the rows whose embedding is the picture's; stays on the host.
    pictured: Tensor | None = None
    clip_images: Tensor | None = (
        None  # uint8 [P, C, C, 3], the P pictured rows' at CLIP's own side, never mirrored
    )

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with what the model reads on `device`; the others stay, for the host reads them."""
        moved: dict[str, Any] = {
            f.name: send(value, device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and f.name not in ON_HOST
        }
        return replace(self, **moved)


class BatchSource(Protocol):
    """What the training loop reads: the micro-batches of global batch `step`, from any step on."""

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Yield this rank's micro-batches of global batches start_step, start_step + 1, … without end."""
        ...

    def report(self) -> dict[str, Any]:
        """What was read, skipped by cause, filtered by rule, replaced, so far."""
        ...
