"""How good the model is on held-out samples, at the same noise and timesteps each time.

B samples, S image side, D CLIP width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from glide_ds.config import Config, DataConfig, DegradeConfig, with_changes
from glide_ds.data.loader import Source, build_source
from glide_ds.data.order import mix
from glide_ds.data.pictures.degrade import degraded
from glide_ds.data.samples import SHAPES_HELD_OUT
from glide_ds.data.tars.patterns import held_out_beside
from glide_ds.data.tars.peers import Peers
from glide_ds.data.tars.shards import open_shards
from glide_ds.diffusion import Diffusion
from glide_ds.errors import ConfigError
from glide_ds.inference.enlarge import Enlarged, Small, compared, enlarged
from glide_ds.inference.held_out import CHUNK, Figures, HeldOut
from glide_ds.inference.judged import TOLD, Cases, Drawing, Score, draw_ways, held_out_cases, judged
from glide_ds.model.clip import FrozenClip
from glide_ds.model.glide import Glide
from glide_ds.training.checkpoint.start import Start
from glide_ds.training.faults.ranks import Ranks, agreed
from glide_ds.training.faults.watchdog import Watch
from glide_ds.training.logging import RunLog, finite
from glide_ds.training.zero.ema import Ema, averaged


@dataclass(frozen=True)
class Best:
    """The best of each figure so far, and how many validations ago one was last bettered."""

    loss: float = math.inf
    gain_with_caption: float = -math.inf  # over shuffled embeddings, like the next one
    gain_without_caption: float = -math.inf
    since: int = 0

    def after(self, figures: Figures) -> Best:
        """With one more validation counted. A figure that is not finite betters nothing."""
        gains = {name: getattr(figures, name) for name in ("gain_with_caption", "gain_without_caption")}
        new = {name: gain.over_shuffled for name, gain in gains.items() if gain is not None}
        better = {name: value for name, value in new.items() if value > getattr(self, name)}
        if figures.loss < self.loss:
            better["loss"] = figures.loss
        return replace(self, **better, since=0 if better else self.since + 1)

    def facts(self) -> dict[str, Any]:
        """What the manifest keeps: JSON has no infinity."""
        return {name: value for name, value in asdict(self).items() if math.isfinite(value)}


class Validation:
    """Measures a phase every `validation.every` updates, and knows what the pretrained model could do.

    It measures by the averaged weights where there are any.
    """

    def __init__(
        self,
        config: Config,
        start: Start,
        diffusion: Diffusion,
        clip: FrozenClip | None,
        *,
        model: Glide,
        ema: Ema | None,
        log: RunLog,
        watch: Watch,
    ) -> None:
        asked, config = config, agreed(lambda: with_found(config))
        self.config, self.options, self.start = config, config.validation, start
        self.found = config.validation.shards if config is not asked else None
        self.too_few = self.found is not None and config.validation.samples < dist.get_world_size()
        self.model, self.ema, self.log, self.watch = model, ema, log, watch
        self.held_out: HeldOut | None = None
        self.cases: Cases | None = None  # to be drawn and judged
        self.small: Small | None = None  # to be enlarged and compared
        self.latest: dict[str, Any] | None = None  # the figures of the last update, where it was validated
        # The pretrained model's loss with CLIP off, measured at the beginning of the run's first phase.
        self.baseline: float | None = None
        self.identity: dict[str, Any] = {}
        self.best = Best()
        shards = held_out_shards(config)
        if shards is None or self.too_few:
            return
        side = clip.image_side if clip and config.clip.pictured else None
        source = agreed(lambda: open_held_out(config, shards, side, Ranks()))
        self.held_out = load_held_out(config, source, diffusion, clip)
        if self.options.drawn and dist.get_rank() == 0 and config.model.architecture.upsamples:
            self.small = small_pictures(config, source, clip)
        elif self.options.drawn and dist.get_rank() == 0:
            self.cases = held_out_cases(config.model.architecture.image_size, clip, self.options.drawn)
        self.identity = {"fingerprint": source.fingerprint, "samples": self.options.samples}
        before = start.resumed or start.parent
        told = before.manifest.get("validation") if before else None
        if told and told["identity"] == self.identity:
            self.baseline = told["baseline"]
            if start.resumed:
                self.best = Best(**told.get("best", {}))

    def begin(self) -> None:
        """Measure the baseline where no phase before has done it. Collective."""
        if self.found is not None:
            held = f"{self.options.samples:,} held-out samples of {', '.join(self.found)}"
            self.log.line(
                f"validation is off: {held} are fewer than {dist.get_world_size()} ranks"
                if self.too_few
                else f"validation on {held}"
            )
        elif self.held_out is None and self.options.every:
            self.log.line(
                "validation is off: data.shards is not built in and has no held-out shards beside it; name some in "
                "validation.shards, or set them aside by glide-ds prepare pack --hold_out 0.02"
            )
        self._say_exhausted(self.start.step)
        if self.held_out is None or self.baseline is not None:
            return
        self.watch.at("validate", self.start.step)
        self.model.eval()
        self.baseline = self.held_out.loss_clip_off(self.model)
        when = f"at step {self.start.step}, first measured there," if self.start.resumed else "before training:"
        self.log.line(f"validation {when} loss {self.baseline:.4f} with CLIP off")

    def after(self, done: int) -> bool:
        """Measure after update number `done`, where it is time, and say whether it was. Collective."""
        self.latest = None
        if self.held_out is None or (done % self.options.every and done != self.config.train.steps):
            return False
        self.watch.at("validate", done)
        self.model.eval()
        with averaged(self.ema):
            figures = self.held_out.measure(self.model)
            scores, larger = dict(self._judged()), dict(self._enlarged())
        drawn = {name: asdict(score) for name, score in scores.items()}
        drawn |= {name: asdict(told) for name, told in larger.items()}
        self.best = self.best.after(figures)
        self.latest = (
            asdict(figures) | drawn | {"loss_clip_off_start": self.baseline, "since_best": self.best.since}
        )
        self.log.line(f"validation at step {done}: {self._describe(figures)}")
        for name, score in scores.items():
            self.log.line(f"  {score.count} drawn, {TOLD[name]}: {score}")
        for name, told in larger.items():
            self.log.line(f"  {told.count} {name.replace('_', ' ')} inputs: {told}")
        return True

    @property
    def degraded(self) -> bool:
        """Whether the pretrained ability was just found worse than allowed."""
        limit = self.options.max_degradation
        if not limit or self.latest is None or self.baseline is None:
            return False
        return not self.latest["loss_clip_off"] <= self.baseline * (1 + limit)  # NaN is worse, too

    @property
    def ends(self) -> bool:
        """Whether the update just validated is the phase's last."""
        return self.degraded or (self.exhausted and self.latest is not None)

    @property
    def exhausted(self) -> bool:
        """Whether nothing has improved for as many validations as `validation.patience` allows."""
        return 0 < self.options.patience <= self.best.since

    def check(self, done: int, stop: Callable[..., NoReturn]) -> None:
        """Have `stop` (see Guard.stop) end the run where the pretrained ability is lost; say where patience is."""
        self._say_exhausted(done)
        if not self.degraded:
            return
        assert self.latest is not None
        assert self.baseline is not None
        worse = self.latest["loss_clip_off"] / self.baseline - 1
        stop(
            done,
            f"the validation loss with CLIP off is {self.latest['loss_clip_off']:.4g}, {worse:.1%} above the "
            f"{self.baseline:.4g} at first, more than validation.max_degradation = "
            f"{self.options.max_degradation:g} allows: the pretrained ability is being lost",
            "lower the learning rate of unet and text (train.lr_scale) or raise train.kl_weight in a new run.dir; "
            "or raise validation.max_degradation, or set it to 0, and start again to go on",
            validation=self.latest,
        )

    def facts(self) -> dict[str, Any]:
        """What the manifest keeps: the baseline for later phases, and the figures of this very update."""
        if self.held_out is None:
            return {}
        told = {
            "identity": self.identity,
            "baseline": self.baseline,
            "latest": finite(self.latest),
            "best": self.best.facts(),
        }
        loss = self.latest["loss"] if self.latest else math.nan
        return {"validation": told} | ({"validation_loss": loss} if math.isfinite(loss) else {})

    def metrics(self) -> dict[str, Any]:
        """What a line of metrics.jsonl says of it."""
        return {"validation": self.latest} if self.latest else {}

    def _say_exhausted(self, done: int) -> None:
        if self.exhausted:
            self.log.line(
                f"the phase ends at step {done}: the last {self.best.since} validations bettered nothing "
                f"(validation.patience = {self.options.patience})"
            )

    def _judged(self) -> Iterator[tuple[str, Score]]:
        """What the judge reads in rank 0's pictures of held-out shapes, in every way they can be asked for."""
        if self.cases is None:
            return
        drawing = Drawing(
            self.config.model.noise_schedule,
            self.config.log.sample_steps,
            self.config.log.guidance,
            by_pictures=self.config.clip.source == "image",
        )
        for name, images in draw_ways(self.model, self.cases, drawing, lambda _: self.watch.over):
            yield name, judged(images, self.cases.captions)

    def _enlarged(self) -> Iterator[tuple[str, Enlarged]]:
        """How near rank 0's enlarged pictures come to the held-out ones."""
        if self.small is None:
            return
        for name, images in enlarged(self.model, self.small, self.config.model.noise_schedule, self.watch.over):
            yield f"enlarged_{name}", compared(images, self.small, name)

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


def held_out_shards(config: Config) -> str | tuple[str, ...] | None:
    """What to validate on: `validation.shards`, the shapes' held-out set, or nothing."""
    if not config.validation.every:
        return None
    if config.validation.shards is not None:
        return config.validation.shards
    return SHAPES_HELD_OUT if config.data.draws_shapes else None


def with_found(config: Config) -> Config:
    """With the held-out shards that lie beside data.shards, and as many samples as they have at most.

    As it is where validation.shards names some, where none are wanted, and where none are found.
    """
    options, data = config.validation, config.data
    if not options.every or options.shards is not None or data.draws_shapes or data.reader == "stream":
        return config
    beside = (held_out_beside(part.shards) for part in data.mix_parts)
    if not (found := tuple(dict.fromkeys(folder for folders in beside for folder in folders))):
        return config
    held = len(open_shards(found, data.index_dir, salvage=data.damaged_shards == "salvage"))
    return with_changes(config, validation={"shards": found, "samples": min(options.samples, held)})


def open_held_out(
    config: Config,
    shards: str | tuple[str, ...],
    clip_side: int | None = None,
    peers: Peers | None = None,
) -> Source:
    """The held-out samples, one per micro-batch, in their order, unaugmented, with CLIP's pictures of `clip_side`.

    Raises DataError, ConfigError.
    """
    architecture, samples = config.model.architecture, config.validation.samples
    plain: dict[str, Any] = {
        "flip": 0.0,
        "drop_caption": 0.0,
        "drop_both": 0.0,
        "shuffle": False,
        "clip_store": None,
        "degrade": DegradeConfig(),
    }
    plain |= {"reader": "indexed", "shuffle_buffer": DataConfig().shuffle_buffer}
    data = config.data.changed("data", shards=shards, mix={}, workers=0, drop_last=False, **plain)
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
        masked=architecture.inpaints,
        clip=config.clip.changed("clip", source="image") if clip_side else None,
        clip_side=clip_side,
        peers=peers,
    )
    held = source.facts()["samples"]
    if held < samples:
        raise ConfigError(
            f"{samples:,} held-out samples are wanted, and {shards} hold {held:,}",
            remedy=f"set validation.samples={held}, or for glide-ds evaluate --count {held}",
        )
    return source


def small_pictures(config: Config, source: Source, clip: FrozenClip | None) -> Small:
    """The first `validation.drawn` held-out samples to be enlarged, clean and, if the run degrades, all degraded."""
    batches = [source.one(row) for row in range(min(config.validation.drawn, config.validation.samples))]
    captions = [caption for batch in batches for caption in batch.captions]
    pictures = [batch.clip_images for batch in batches if batch.clip_images is not None]
    low_res = {"clean": torch.cat([batch.low_res for batch in batches if batch.low_res is not None])}
    if config.data.degrade.share:
        every = config.data.degrade.changed("data.degrade", share=1.0)
        keys = mix(torch.cat([batch.sample_ids for batch in batches]).numpy())
        low_res["degraded"] = torch.from_numpy(degraded(low_res["clean"].numpy(), keys, every))
    embedding = None
    if clip is not None:
        embedding = clip.encode_image(torch.cat(pictures)) if pictures else clip.encode_text(captions)
    return Small(torch.cat([batch.images for batch in batches]), captions, low_res, embedding)


def load_held_out(config: Config, source: Source, diffusion: Diffusion, clip: FrozenClip | None) -> HeldOut:
    """This rank's part of the held-out samples: every W-th of them, by number. Collective."""
    count, world = config.validation.samples, dist.get_world_size()
    if count < world:
        raise ConfigError(
            f"validation.samples = {count} are fewer than {world} ranks", remedy=f"give at least {world}"
        )
    rows = torch.arange(dist.get_rank(), count, world)
    batches = agreed(lambda: [source.one(row) for row in rows.tolist()])
    captions = [caption for batch in batches for caption in batch.captions]
    embeddings: list[Tensor] = []
    if clip is not None and config.clip.pictured < 1:
        embeddings.append(torch.cat([clip.encode_text(part).cpu() for part in _chunks(captions)]))
    if clip is not None and config.clip.pictured:
        pictures = [batch.clip_images for batch in batches if batch.clip_images is not None]
        embeddings.append(torch.cat([clip.encode_image(torch.cat(part)).cpu() for part in _chunks(pictures)]))
    low_res = [batch.low_res for batch in batches if batch.low_res is not None]
    known = [batch.known for batch in batches if batch.known is not None]
    return HeldOut(
        diffusion,
        torch.cat([batch.images for batch in batches]),
        captions,
        embeddings[0] if embeddings else None,
        picture_embedding=embeddings[1] if len(embeddings) > 1 else None,
        low_res=torch.cat(low_res) if low_res else None,
        known=torch.cat(known) if known else None,
        rows=rows,
        count=count,
    )


def _chunks(items: list[Any]) -> Iterable[list[Any]]:
    return (items[i : i + CHUNK] for i in range(0, len(items), CHUNK))
