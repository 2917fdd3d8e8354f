"""How good a model is on held-out samples, at the same noise and timesteps each time.

B samples, S image side, D CLIP width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from glide_ds.diffusion import Diffusion
from glide_ds.diffusion.losses import QUARTILES
from glide_ds.diffusion.pixels import shown, to_signed
from glide_ds.model.glide import Glide
from glide_ds.tokenizer import encode

CHUNK = 32  # pictures per forward pass, at most
GAIN_TIMESTEPS = (250, 950)  # below, the picture shows through the noise and nothing needs conditioning


@dataclass(frozen=True)
class Gain:
    """By how much the right CLIP embedding lowers the squared error of the predicted x0.

    Fractions of the error with embeddings shuffled between the samples, and of the error with CLIP off.
    """

    over_shuffled: float
    over_off: float

    def __str__(self) -> str:
        return f"{self.over_shuffled:+.1%} against shuffled embeddings, {self.over_off:+.1%} against CLIP off"


@dataclass(frozen=True)
class Figures:
    """What is measured; without CLIP, `loss` is `loss_clip_off` and there is no gain."""

    loss: float  # eps-MSE with caption and CLIP, timesteps even over all T
    loss_clip_off: float
    loss_by_quartile: dict[str, float]  # of `loss`, by quarter of the timesteps
    gain_with_caption: Gain | None
    gain_without_caption: Gain | None
    gain_of_pictures: Gain | None = (
        None  # by the pictures' embeddings, caption emptied, where both kinds are given
    )


class HeldOut:
    """Held-out pictures under fixed noise and timesteps: figures of two models can be compared.

    Samples are numbered 0 … `count`-1, and this process measures those of `rows` [B]; the sums go over all
    ranks, where there are ranks.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        images: Tensor,  # uint8 [B, S, S, 3]
        captions: Iterable[str],
        embedding: Tensor | None,  # [B, D]
        *,
        picture_embedding: Tensor | None = None,  # [B, D], where the other one is the captions'
        low_res: Tensor | None = None,  # uint8 [B, S/4, S/4, 3]
        known: Tensor | None = None,  # uint8 [B, S, S]
        rows: Tensor | None = None,
        count: int | None = None,
    ) -> None:
        self.diffusion, self.captions, self.embedding = diffusion, list(captions), embedding
        self.rows = torch.arange(len(images)) if rows is None else rows
        self.count = count or len(images)
        self.x0 = to_signed(images)
        self.shown = shown(self.x0, low_res, known)
        noise = torch.randn((self.count, *self.x0.shape[1:]), generator=torch.Generator().manual_seed(0))
        self.noise = noise[self.rows].clone()
        empty = [""] * len(self.captions)
        asked = {
            "gain_with_caption": (self.captions, embedding),
            "gain_without_caption": (empty, embedding),
            "gain_of_pictures": (empty, picture_embedding),
        }
        # Samples next to each other have nearly the same timestep, so a rotation shuffles fairly.
        self.gains = {
            name: (captions, (right, self._rotated(right), None))
            for name, (captions, right) in asked.items()
            if right is not None
        }

    def measure(self, model: Glide) -> Figures:
        """Everything, in one pass over the samples per figure. Collective."""
        off = self._eps_errors(model, None)
        on = off if self.embedding is None else self._eps_errors(model, self.embedding)
        quartile = self._timesteps(0, self.diffusion.num_timesteps - 1) * QUARTILES
        quartile = quartile // self.diffusion.num_timesteps
        by_quartile = [torch.where(quartile == q, on, 0.0) for q in range(QUARTILES)]
        in_quartile = [(quartile == q).double() for q in range(QUARTILES)]
        columns = [on, off, *by_quartile, *in_quartile]
        for captions, embeddings in self.gains.values():
            columns += [self._x0_errors(model, captions, embedding) for embedding in embeddings]
        sums = _over_ranks(torch.stack(columns).sum(1))
        loss, loss_off = (sums[:2] / self.count).tolist()
        totals, counts = sums[2 : 2 + 2 * QUARTILES].view(2, QUARTILES).tolist()
        quartiles = {f"q{i + 1}": t / n for i, (t, n) in enumerate(zip(totals, counts, strict=True)) if n}
        errors = sums[2 + 2 * QUARTILES :].view(-1, 3).tolist()
        gains: dict[str, Gain | None] = {"gain_with_caption": None, "gain_without_caption": None}
        for name, (right, wrong, off) in zip(self.gains, errors, strict=True):
            gains[name] = Gain(over_shuffled=1 - right / wrong, over_off=1 - right / off)
        return Figures(loss, loss_off, quartiles, **gains)

    def loss_clip_off(self, model: Glide) -> float:
        """That one figure alone. Collective."""
        return float(_over_ranks(self._eps_errors(model, None).sum())) / self.count

    def _eps_errors(self, model: Glide, embedding: Tensor | None) -> Tensor:
        """Each sample's mean squared error [B] of the predicted noise, timesteps even over all T."""
        t = self._timesteps(0, self.diffusion.num_timesteps - 1)
        predicted, _ = self._predict(model, t, self.captions, embedding)
        return (predicted - self.noise).double().square().flatten(1).mean(1)

    def _x0_errors(self, model: Glide, captions: list[str], embedding: Tensor | None) -> Tensor:
        """Each sample's mean squared error [B] of the predicted x0, timesteps even in GAIN_TIMESTEPS.

        The loss hides it, for steps with little noise dominate that and need no conditioning.
        """
        t = self._timesteps(*GAIN_TIMESTEPS)
        predicted, x_t = self._predict(model, t, captions, embedding)
        return (self.diffusion.predict_x0(predicted, x_t, t) - self.x0).double().square().flatten(1).mean(1)

    def _timesteps(self, low: int, high: int) -> Tensor:
        return torch.linspace(low, high, self.count).long()[self.rows]

    @torch.no_grad()
    def _predict(
        self, model: Glide, t: Tensor, captions: list[str], embedding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The predicted noise and x_t, both [B, 3, S, S] on the host."""
        device = next(model.parameters()).device
        x_t = self.diffusion.q_sample(self.x0, t, self.noise)
        tokens, mask = encode(captions, model.config.text_ctx)
        outputs = [torch.empty(0, *x_t.shape[1:])]
        for first in range(0, len(t), CHUNK):
            part = slice(first, first + CHUNK)
            given = {name: tensor[part].to(device) for name, tensor in self.shown.items()}
            output = model(
                x_t[part].to(device),
                t[part].to(device),
                tokens=tokens[part].to(device),
                mask=mask[part].to(device),
                clip_embedding=None if embedding is None else embedding[part].to(device),
                **given,
            )
            outputs.append(output[:, :3].float().cpu())
        return torch.cat(outputs), x_t

    def _rotated(self, embedding: Tensor) -> Tensor:
        """To each of our samples the embedding [B, D] of the sample before it. Collective."""
        if not _distributed():
            return embedding.roll(1, 0)
        whole = torch.zeros(self.count, embedding.shape[1])
        whole[self.rows] = embedding
        gathered = _over_ranks(whole.to(_reduced_on())).cpu()
        return gathered[(self.rows - 1) % self.count]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _reduced_on() -> torch.device:
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _over_ranks(values: Tensor) -> Tensor:
    """The sum over all ranks, where there are ranks."""
    if not _distributed():
        return values
    summed = values.to(_reduced_on())
    dist.all_reduce(summed)
    return summed.cpu()
