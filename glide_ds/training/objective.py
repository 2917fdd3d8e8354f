"""What one micro-batch is trained on, and its loss.

B samples of the micro-batch, S image side, T diffusion steps, D CLIP width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glide_ds.config import Config
from glide_ds.diffusion import Diffusion
from glide_ds.diffusion.losses import min_snr_weight, reverse_kl, v_weight
from glide_ds.diffusion.pixels import shown, to_signed
from glide_ds.model.clip import FrozenClip
from glide_ds.model.text import TextEncoding
from glide_ds.model.unet import Seen
from glide_ds.tokenizer import encode
from glide_ds.training.phases import hash64, phase_seed
from glide_ds.types import Batch, send


class Draws(NamedTuple):
    """The random numbers of one micro-batch."""

    timesteps: Tensor  # int64 [B], each uniform over all T
    noise: Tensor  # [B, 3, S, S]
    drop_clip: Tensor  # bool [B]
    added: Tensor | None = None  # [B, 3, S, S], in the input alone


class Losses(NamedTuple):
    """`total` carries the graph; the others are detached, for the log."""

    total: Tensor  # scalar
    mse: Tensor  # [B]
    vb: Tensor  # [B], bits per dimension
    kl: Tensor | None  # scalar, where this step has the KL term
    timesteps: Tensor  # int64 [B]
    alignment: Tensor | None = None  # scalar, where train.align_weight asks for it


def draw(
    seed: int,
    step: int,
    slots: Sequence[int],
    side: int,
    timesteps: int,
    drop: float,
    device: Any,
    *,
    strata: int = 0,
    offset: float = 0.0,
    perturbation: float = 0.0,
) -> Draws:
    """Timesteps, noise and CLIP dropout for these slots of global batch `step`.

    Every slot has its own generator, seeded by (seed, step, slot): the numbers depend neither on the
    number of ranks nor on the micro-batch, and a rank draws only its own. They are drawn on the host, so that
    every kind of device trains on the same ones. What is asked for beside them is drawn after them.

    With `strata`, the global batch's size, the timesteps of its slots lie in as many equal parts of 0 … T-1, one in
    each, in a random order. `offset` is the standard deviation of noise that a channel's pixels share, `perturbation`
    that of `added` (Ning et al. 2023, arXiv 2301.11706).
    """
    generator = torch.Generator()
    # Slots are numbered from 0, so -1 seeds what all of them share.
    shared = torch.Generator().manual_seed(hash64(seed, step, -1))
    order = torch.randperm(strata, generator=shared).tolist() if strata else []
    t = torch.empty(len(slots), dtype=torch.int64)
    noise = torch.empty(len(slots), 3, side, side)
    dropped = torch.empty(len(slots))
    added = torch.empty_like(noise) if perturbation else None
    for row, slot in enumerate(slots):
        generator.manual_seed(hash64(seed, step, slot))
        if strata:
            within = float(torch.rand(1, generator=generator, dtype=torch.float64))
            t[row] = min(int((order[slot] + within) / strata * timesteps), timesteps - 1)
        else:
            torch.randint(timesteps, (1,), generator=generator, out=t[row : row + 1])
        torch.rand(1, generator=generator, out=dropped[row : row + 1])
        torch.randn(3, side, side, generator=generator, out=noise[row])
        if offset:
            noise[row] += offset * torch.randn(3, 1, 1, generator=generator)
        if added is not None:
            torch.randn(3, side, side, generator=generator, out=added[row]).mul_(perturbation)
    drop_clip, extra = send(dropped < drop, device), None if added is None else send(added, device)
    return Draws(send(t, device), send(noise, device), drop_clip, extra)


class Randomness:
    """The state of torch's generators, of which dropout draws, to draw the same again."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within, the generators start from that state; afterwards they go on where they were."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.states[0])
            for device, state in zip(self.devices, self.states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


class Objective:
    """The training loss of one phase: eps-MSE, or hybrid, with the KL to the CLIP-off pass every N steps.

    Hybrid: L = mse + w·vb (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 16, w in `train.vb_weight`
    times T). KL: between the reverse-process Gaussians with CLIP on and off, the latter without
    gradient and with the same dropout masks, averaged per element, 0 for samples whose caption is emptied: it
    keeps the pretrained model's behaviour (diffusion/losses.py). Alignment: see `alignment`.
    """

    def __init__(self, config: Config, diffusion: Diffusion, engine: Any, clip: FrozenClip | None) -> None:
        self.config, self.diffusion, self.engine, self.clip = config, diffusion, engine, clip
        self.seed = phase_seed(config)
        self.ahead: dict[tuple[int, ...], tuple[int, Draws]] = {}  # of the next update, by slots

    def __call__(self, batch: Batch, step: int) -> Losses:
        """The losses of a micro-batch on the device, in update `step` (0-based)."""
        train, diffusion = self.config.train, self.diffusion
        slots = tuple(batch.slots.tolist())
        draws = self._drawn(step, slots, batch)
        x0 = to_signed(batch.images)
        seen = draws.noise if draws.added is None else draws.noise + draws.added
        x_t = diffusion.q_sample(x0, draws.timesteps, seen)
        # Said either way: pictures come as [B, S, S, 3], so their layout is NHWC already.
        x_t = x_t.contiguous(
            memory_format=torch.channels_last if train.channels_last else torch.contiguous_format
        )
        inputs: dict[str, Any] = {"tokens": batch.tokens, "mask": batch.mask}
        inputs |= shown(x0, batch.low_res, batch.known)
        clip: dict[str, Any] = {}
        if self.clip is not None:
            clip = {"clip_embedding": self.embed(batch), "clip_drop": batch.drop_clip | draws.drop_clip}
        sights: Seen | None = [] if self.clip is not None and train.align_weight > 0 else None
        if sights is not None:
            clip["seen"] = sights
        times = diffusion.model_timesteps(draws.timesteps)
        has_kl = self.clip is not None and train.kl_weight > 0 and step % train.kl_every == 0
        masks = Randomness(x_t.device) if has_kl else None
        # Compiled and recorded passes draw dropout masks of their own, and the KL term needs the same twice.
        with self.engine.module.plain() if masks else nullcontext():
            output = self.engine(x_t, times, **inputs, **clip)
        losses = diffusion.losses(output, x0, x_t, draws.timesteps, draws.noise)
        total = (losses["mse"] * self.weight(draws.timesteps)).mean()
        if train.loss == "hybrid":
            total = total + train.vb_weight * diffusion.num_timesteps * losses["vb"].mean()
        kl = None
        if masks:
            with torch.no_grad(), masks.again(), self.engine.module.plain():
                off = self.engine.module(x_t, times, **inputs)
            kl = reverse_kl(
                diffusion.p_mean_variance(output, x_t, draws.timesteps, clip_x0=False).gaussian,
                diffusion.p_mean_variance(off, x_t, draws.timesteps, clip_x0=False).gaussian,
            )
            # Without a caption the pass without CLIP knows nothing: to stay close to it would be to unlearn CLIP.
            kl = (kl * batch.mask.any(1)).mean()
            total = total + train.kl_weight * kl
        alignment = None
        if sights is not None:
            alignment = self.alignment(batch, sights, clip["clip_embedding"], clip["clip_drop"])
            total = total + train.align_weight * alignment
        # A GPU is busy with the forward pass now; at the start of a step it would have to wait.
        self.ahead[slots] = step + 1, self._draw(step + 1, slots, batch)
        return Losses(
            total,
            losses["mse"].detach(),
            losses["vb"].detach(),
            None if kl is None else kl.detach(),
            draws.timesteps,
            None if alignment is None else alignment.detach(),
        )

    def alignment(self, batch: Batch, seen: Seen, embedding: Tensor, drop: Tensor) -> Tensor:
        """How far CLIP's additions are from what the caption's dropout took away, mean over samples: scalar.

        GLIDE gives its caption to the timestep embedding and to every attention block. Where the caption is emptied,
        CLIP is to give the same there, beside the same picture; where it is kept, nothing. The eps-MSE alone finds
        that through the whole UNet and the noise, in several times the steps (docs/clip.md). 0 for samples whose CLIP
        is dropped or that have no caption. No gradient reaches GLIDE's own parameters.
        """
        model = self.engine.module
        tokens, mask = encode([*batch.captions, ""], batch.tokens.shape[1])
        with torch.no_grad(), model.plain():
            text = model.encode_text(send(tokens, batch.tokens.device), send(mask, batch.mask.device))
        full = TextEncoding(*(part[:-1] for part in text))
        empty = TextEncoding(*(part[-1:].expand_as(whole) for part, whole in zip(text, full, strict=True)))
        missed: Tensor = model.clip_missed(seen, ~batch.mask.any(1), embedding, drop, empty, full)
        return (missed * ~drop).mean()

    def _drawn(self, step: int, slots: tuple[int, ...], batch: Batch) -> Draws:
        made_for, draws = self.ahead.pop(slots, (None, None))
        return draws if draws is not None and made_for == step else self._draw(step, slots, batch)

    def _draw(self, step: int, slots: Sequence[int], batch: Batch) -> Draws:
        side, device = batch.images.shape[1], batch.images.device
        train = self.config.train
        return draw(
            self.seed,
            step,
            slots,
            side,
            self.diffusion.num_timesteps,
            self.config.clip.drop,
            device,
            strata=self.config.deepspeed["train_batch_size"] if train.timesteps == "stratified" else 0,
            offset=train.offset_noise,
            perturbation=train.input_perturbation,
        )

    def weight(self, timesteps: Tensor) -> Tensor:
        """Each sample's weight [B] in the eps-MSE; the logged loss is not weighted."""
        train = self.config.train
        if train.weighting == "eps":
            return torch.ones_like(timesteps, dtype=torch.float32)
        alpha_bar = self.diffusion.table("alphas_cumprod", timesteps).flatten()
        return v_weight(alpha_bar) if train.weighting == "v" else min_snr_weight(alpha_bar, train.min_snr_gamma)

    def embed(self, batch: Batch) -> Tensor:
        """CLIP embeddings [B, D] of the batch: from its store, or encoded now."""
        assert self.clip is not None
        return batch.clip.float() if batch.clip is not None else self.clip.embed(batch)
