"""How good the model is on held-out samples, at the same noise and timesteps each time.

B samples, S image side, D CLIP width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from glide_ds.config import Config
from glide_ds.data.loader import SHAPES, SHAPES_HELD_OUT, Source, build_source
from glide_ds.diffusion import Diffusion
from glide_ds.errors import ConfigError
from glide_ds.model.clip import FrozenClip
from glide_ds.model.glide import Glide
from glide_ds.tokenizer import encode
from glide_ds.training.checkpoint.start import Start
from glide_ds.training.faults.ranks import agreed
from glide_ds.training.logging import finite
from glide_ds.training.objective import QUARTILES, to_signed
from glide_ds.types import Batch

if TYPE_CHECKING:
    from glide_ds.training.run import PhaseRun

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
        low_res: Tensor | None = None,  # uint8 [B, S/4, S/4, 3]
        rows: Tensor | None = None,
        count: int | None = None,
    ) -> None:
        self.diffusion, self.captions, self.embedding = diffusion, list(captions), embedding
        self.rows = torch.arange(len(images)) if rows is None else rows
        self.count = count or len(images)
        self.x0 = to_signed(images)
        self.low_res = None if low_res is None else to_signed(low_res)
        noise = torch.randn((self.count, *self.x0.shape[1:]), generator=torch.Generator().manual_seed(0))
        self.noise = noise[self.rows].clone()
        # Samples next to each other have nearly the same timestep, so a rotation shuffles fairly.
        self.shuffled = None if embedding is None else self._rotated(embedding)

    def measure(self, model: Glide) -> Figures:
        """Everything, in one pass over the samples per figure. Collective."""
        off = self._eps_errors(model, None)
        on = off if self.embedding is None else self._eps_errors(model, self.embedding)
        quartile = self._timesteps(0, self.diffusion.num_timesteps - 1) * QUARTILES
        quartile = quartile // self.diffusion.num_timesteps
        by_quartile = [torch.where(quartile == q, on, 0.0) for q in range(QUARTILES)]
        in_quartile = [(quartile == q).double() for q in range(QUARTILES)]
        columns = [on, off, *by_quartile, *in_quartile]
        if self.embedding is not None:
            for captions in (self.captions, [""] * len(self.captions)):
                for embedding in (self.embedding, self.shuffled, None):
                    columns.append(self._x0_errors(model, captions, embedding))
        sums = _over_ranks(torch.stack(columns).sum(1))
        loss, loss_off = (sums[:2] / self.count).tolist()
        totals, counts = sums[2 : 2 + 2 * QUARTILES].view(2, QUARTILES).tolist()
        quartiles = {f"q{i + 1}": t / n for i, (t, n) in enumerate(zip(totals, counts, strict=True)) if n}
        errors = sums[2 + 2 * QUARTILES :].view(-1, 3).tolist()
        gains = [
            Gain(over_shuffled=1 - right / wrong, over_off=1 - right / off) for right, wrong, off in errors
        ]
        return Figures(loss, loss_off, quartiles, *(gains or (None, None)))

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
            extra = {} if self.low_res is None else {"low_res": self.low_res[part].to(device)}
            output = model(
                x_t[part].to(device),
                t[part].to(device),
                tokens=tokens[part].to(device),
                mask=mask[part].to(device),
                clip_embedding=None if embedding is None else embedding[part].to(device),
                **extra,
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


class Validation:
    """Measures a phase every `validation.every` updates, and knows what the pretrained model could do."""

    def __init__(self, config: Config, start: Start, diffusion: Diffusion, clip: FrozenClip | None) -> None:
        self.config, self.options = config, config.validation
        self.held_out: HeldOut | None = None
        self.latest: dict[str, Any] | None = None  # the figures of the last update, where it was validated
        # The pretrained model's loss with CLIP off, measured at the beginning of the run's first phase.
        self.baseline: float | None = None
        self.identity: dict[str, Any] = {}
        shards = held_out_shards(config)
        if shards is None:
            return
        source = agreed(lambda: open_held_out(config, shards))
        self.held_out = load_held_out(config, source, diffusion, clip)
        self.identity = {"fingerprint": source.fingerprint, "samples": self.options.samples}
        before = start.resumed or start.parent
        told = before.manifest.get("validation") if before else None
        if told and told["identity"] == self.identity:
            self.baseline = told["baseline"]

    def begin(self, run: PhaseRun) -> None:
        """Measure the baseline where no phase before has done it. Collective."""
        if self.held_out is None or self.baseline is not None:
            if self.options.every and self.held_out is None:
                run.log.line("validation is off: data.shards is not built in; name some in validation.shards")
            return
        run.watch.at("validate", run.start.step)
        run.model.eval()
        self.baseline = self.held_out.loss_clip_off(run.model)
        run.log.line(f"validation before training: loss {self.baseline:.4f} with CLIP off")

    def after(self, run: PhaseRun, done: int) -> bool:
        """Measure after update number `done`, where it is time, and say whether it was. Collective."""
        self.latest = None
        if self.held_out is None or (done % self.options.every and done != self.config.train.steps):
            return False
        run.watch.at("validate", done)
        run.model.eval()
        with averaged(run):
            figures = self.held_out.measure(run.model)
        self.latest = asdict(figures) | {"loss_clip_off_start": self.baseline}
        run.log.line(f"validation at step {done}: {self._describe(figures)}")
        return True

    @property
    def degraded(self) -> bool:
        """Whether the pretrained ability was just found worse than allowed."""
        limit = self.options.max_degradation
        if not limit or self.latest is None or self.baseline is None:
            return False
        return not self.latest["loss_clip_off"] <= self.baseline * (1 + limit)  # NaN is worse, too

    def check(self, run: PhaseRun, done: int) -> None:
        """Stop the run where the pretrained ability is lost: UnstableError on all ranks."""
        if not self.degraded:
            return
        assert self.latest is not None
        assert self.baseline is not None
        worse = self.latest["loss_clip_off"] / self.baseline - 1
        run.guard.stop(
            done,
            f"the validation loss with CLIP off is {self.latest['loss_clip_off']:.4g}, {worse:.1%} above the "
            f"{self.baseline:.4g} before training, more than validation.max_degradation = "
            f"{self.options.max_degradation:g} allows: the pretrained ability is being lost",
            "Lower the learning rate of unet and text (train.lr_scale) or raise train.kl_weight in a new run.dir; "
            "or raise validation.max_degradation, or set it to 0, and start again to go on",
            validation=self.latest,
        )

    def facts(self) -> dict[str, Any]:
        """What the manifest keeps: the baseline for later phases, and the figures of this very update."""
        if self.held_out is None:
            return {}
        told = {"identity": self.identity, "baseline": self.baseline, "latest": finite(self.latest)}
        loss = self.latest["loss"] if self.latest else math.nan
        return {"validation": told} | ({"validation_loss": loss} if math.isfinite(loss) else {})

    def metrics(self) -> dict[str, Any]:
        """What a line of metrics.jsonl says of it."""
        return {"validation": self.latest} if self.latest else {}

    def _describe(self, figures: Figures) -> str:
        told = (
            f"loss {figures.loss:.4f}, with CLIP off {figures.loss_clip_off:.4f} ({self.baseline:.4f} at first)"
        )
        if figures.gain_with_caption and figures.gain_without_caption:
            told += (
                f", gain over shuffled embeddings {figures.gain_with_caption.over_shuffled:+.1%}, "
                f"without caption {figures.gain_without_caption.over_shuffled:+.1%}"
            )
        return told


def averaged(run: PhaseRun) -> Any:
    """A context with the averaged weights in the module, where the run keeps an average."""
    return run.ema.applied() if run.ema else nullcontext()


def held_out_shards(config: Config) -> str | tuple[str, ...] | None:
    """What to validate on: `validation.shards`, the shapes' held-out set, or nothing."""
    if not config.validation.every:
        return None
    if config.validation.shards is not None:
        return config.validation.shards
    return SHAPES_HELD_OUT if config.data.shards == SHAPES and not config.data.mix else None


def open_held_out(config: Config, shards: str | tuple[str, ...]) -> Source:
    """The held-out samples, one per micro-batch, in their order, unaugmented. Raises DataError, ConfigError."""
    architecture, samples = config.model.architecture, config.validation.samples
    plain = {"flip": 0.0, "drop_caption": 0.0, "drop_both": 0.0, "shuffle": False, "clip_store": None}
    data = replace(config.data, shards=shards, mix={}, workers=0, tail="pad", **plain)  # type: ignore[arg-type]
    source = build_source(
        data,
        image_size=architecture.image_size,
        context_length=architecture.text_ctx,
        global_batch=samples,
        micro_batch=1,
        rank=0,
        world_size=1,
        seed=config.train.seed,
        low_res=architecture.upsamples,
    )
    held = source.facts()["samples"]
    if held < samples:
        raise ConfigError(
            f"validation.samples = {samples}, but validation.shards hold {held}; set validation.samples={held}"
        )
    return source


def load_held_out(config: Config, source: Source, diffusion: Diffusion, clip: FrozenClip | None) -> HeldOut:
    """This rank's part of the held-out samples: every W-th of them, by number. Collective."""
    count, world = config.validation.samples, dist.get_world_size()
    if count < world:
        raise ConfigError(f"validation.samples = {count} are fewer than {world} ranks; give at least {world}")
    rows = torch.arange(dist.get_rank(), count, world)
    batches = agreed(lambda: [source.one(row) for row in rows.tolist()])
    embedding = None
    if clip is not None:
        embedding = torch.cat([_embed(config, clip, part) for part in _chunks(batches)])
    low_res = [batch.low_res for batch in batches if batch.low_res is not None]
    return HeldOut(
        diffusion,
        torch.cat([batch.images for batch in batches]),
        [caption for batch in batches for caption in batch.captions],
        embedding,
        low_res=torch.cat(low_res) if low_res else None,
        rows=rows,
        count=count,
    )


def _chunks(batches: list[Batch]) -> Iterable[list[Batch]]:
    return (batches[i : i + CHUNK] for i in range(0, len(batches), CHUNK))


def _embed(config: Config, clip: FrozenClip, batches: list[Batch]) -> Tensor:
    """CLIP embeddings [B, D] on the host, of what conditions the training: captions or pictures."""
    if config.clip.source == "image":
        return clip.encode_image(torch.cat([batch.images for batch in batches])).float().cpu()
    return clip.encode_text([caption for batch in batches for caption in batch.captions]).float().cpu()
