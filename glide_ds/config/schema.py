"""Every key of the glide_ds block: type, range, default, meaning, and whether two starts of a phase may differ in it.

What may differ is where things are, how often they are said, how a step is computed and how the work is spread;
everything else decides what is trained, and a run directory holds one value of it for ever.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_origin, get_type_hints

from pydantic import AfterValidator, BeforeValidator, PlainValidator, create_model

from glide_ds.config.phases import PHASES
from glide_ds.config.section import (
    Conflict,
    Patterns,
    Section,
    Texts,
    UserPath,
    WrongError,
    fixed,
    free,
    listed,
)
from glide_ds.errors import ConfigError, Fault
from glide_ds.masking import masked
from glide_ds.types import KINDS, GlideConfig, Precision, Recompute

BLOCK = "glide_ds"

PRESETS: dict[str, Callable[[], GlideConfig]] = {
    "base": lambda: GlideConfig.published("base"),
    "upsample": lambda: GlideConfig.published("upsample"),
    "base-inpaint": lambda: GlideConfig.published("base-inpaint"),
    "upsample-inpaint": lambda: GlideConfig.published("upsample-inpaint"),
    "tiny": lambda: GlideConfig(
        image_size=32,
        text_ctx=24,
        xf_width=64,
        xf_layers=3,
        xf_heads=2,
        model_channels=64,  # 2 per norm group: with 1 the output could not see an image's mean colour
        num_res_blocks=1,
        channel_mult=(1, 1, 1),
        attention_ds=(4,),
        num_head_channels=32,
        dropout=0.0,
    ),
}


class RunConfig(Section):
    """Where the run lives. The same directory again continues it."""

    dir: UserPath = free("runs/default", "the run directory; the same again continues the run")
    timeout_s: float = free(
        600.0, "a rank that waits so many seconds for the others ends the run with an error", ge=1
    )
    hang_s: float = free(
        0.0,
        "where no rank moves for so many seconds, the run ends and names the late one; 0: half of timeout_s",
        ge=0,
    )
    max_hours: float = free(
        0.0, "hours since the process started after which the run stops well; 0: no limit", ge=0
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.hang_s >= self.timeout_s:
            fault = Fault(
                f"run.hang_s = {self.hang_s} is not less than run.timeout_s = {self.timeout_s}",
                "waiting ranks would give up before the late one is named",
                "lower run.hang_s or raise run.timeout_s",
            )
            yield Conflict(("hang_s", "timeout_s"), fault)


ARCHITECTURE: dict[str, tuple[str, dict[str, Any]]] = {
    "kind": ("what the model draws from: base a caption, upsample a small picture, *-inpaint a masked one", {}),
    "image_size": ("side of the pictures, in pixels", {"ge": 1}),
    "text_ctx": ("caption tokens that the text transformer reads", {"ge": 1}),
    "xf_width": ("width of the text transformer", {"ge": 1}),
    "xf_layers": ("layers of the text transformer", {"ge": 0}),
    "xf_heads": ("attention heads of the text transformer", {"ge": 1}),
    "model_channels": ("channels of the UNet at full resolution", {"ge": 1}),
    "num_res_blocks": ("residual blocks per resolution of the UNet", {"ge": 1}),
    "channel_mult": ("channels of each resolution, from the full one, as multiples of model_channels", {}),
    "attention_ds": ("where the UNet attends: factors by which the picture is smaller there", {}),
    "num_head_channels": ("channels of an attention head of the UNet", {"ge": 1}),
    "dropout": ("probability that a residual block drops an activation", {"ge": 0, "le": 1}),
    "clip_tokens": ("tokens that the adapter makes of a CLIP embedding", {"ge": 1}),
}


class _Departures(Section):
    """What a preset's architecture is changed in."""

    refused: ClassVar = {"clip_dim": "it follows from clip.model and from the phase; remove it"}


def _architecture() -> type[Section]:
    """GlideConfig as a section."""
    hints: dict[str, Any] = get_type_hints(GlideConfig) | {"kind": Literal[KINDS]}
    defaults = {f.name: f.default for f in fields(GlideConfig)}
    tuples = {
        name: Annotated[hint, BeforeValidator(listed)]
        for name, hint in hints.items()
        if get_origin(hint) is tuple
    }
    made: Any = {
        name: ((hints | tuples)[name], fixed(defaults[name], meaning, **limits))
        for name, (meaning, limits) in ARCHITECTURE.items()
    }
    return create_model("Architecture", __base__=_Departures, **made)


Architecture = _architecture()


def _built(value: Any) -> GlideConfig:
    if not isinstance(value, GlideConfig):
        return GlideConfig(**dict(Architecture.model_validate(value)))
    if value.clip_dim is not None:
        raise WrongError(
            "", f"leave clip_dim={value.clip_dim} out: it follows from clip.model and from the phase"
        )
    return value


class ModelConfig(Section):
    """Which GLIDE, and where its weights come from."""

    preset: Literal[tuple(PRESETS)] = fixed("base", "the architecture to start from")  # type: ignore[valid-type]
    weights: str = free(
        "auto",
        "what the first phase starts from: a file, openai (downloads the published ones), random, builtin:tiny; auto: "
        "random for built-in data. A parent phase's checkpoint in run.dir goes first",
    )
    schedule: Literal["auto", "squaredcos_cap_v2", "linear"] = fixed(
        "auto", "how the noise grows with the timestep; auto: as published for the kind"
    )
    architecture: Annotated[GlideConfig, PlainValidator(_built, json_schema_input_type=Architecture)] = fixed(
        GlideConfig(), "departures from the preset"
    )

    @property
    def noise_schedule(self) -> str:
        if self.schedule != "auto":
            return self.schedule
        return "linear" if self.architecture.upsamples else "squaredcos_cap_v2"


def _takes_squares(aspect: float) -> float:
    if 0 < aspect < 1:
        raise WrongError("every picture is dropped", "give 1 or more, or 0 to take any")
    return aspect


class FilterConfig(Section):
    """What a sample's JSON record must say for it to be used; a record that does not say it is dropped."""

    min_size: int = fixed(0, "pixels of the original's shorter side", ge=0)
    max_aspect: Annotated[float, AfterValidator(_takes_squares)] = fixed(
        0.0, "the original's longer by its shorter side; 0 takes any", ge=0
    )
    min_similarity: float | None = fixed(None, "CLIP similarity of picture and caption")
    max_punsafe: float | None = fixed(None, "probability that the picture is unsafe, as LAION's record has it")
    nsfw: Texts = fixed((), "allowed values of nsfw, such as UNLIKELY; none: any")
    language: Texts = fixed((), "allowed values of language, such as en; none: any")

    @property
    def active(self) -> bool:
        return self != FilterConfig()


def is_built_in(shards: Any) -> bool:
    """Whether data is named that comes with the package."""
    return isinstance(shards, str) and shards.startswith("builtin:")


def _tars(shards: Any) -> Any:
    if is_built_in(shards):
        raise WrongError("it can't be mixed", "write tar shards with `glide-ds prepare shapes`")
    return shards


class MixConfig(Section):
    """One data set of a mix."""

    shards: Annotated[Patterns, AfterValidator(_tars)] = free(..., "tar shards, as in data.shards")
    weight: float = fixed(1.0, "how often it is drawn from, beside the other sets' weights", gt=0)
    filter: FilterConfig | None = fixed(None, "as data.filter, which holds where it is null")


class MixPart(NamedTuple):
    """One data set of a mix, with the filter that holds for it."""

    shards: str | tuple[str, ...]
    weight: float
    filter: FilterConfig


class MaskConfig(Section):
    """How an inpainting model's pictures are masked: relative shares of the kinds of masks."""

    boxes: float = fixed(0.5, "up to three boxes are hidden", ge=0)
    strokes: float = fixed(0.2, "a stroke of a round brush is hidden", ge=0)
    halves: float = fixed(0.1, "all beyond a line is hidden, as where a picture is to be continued", ge=0)
    everything: float = fixed(0.15, "all is hidden, which keeps what the plain model can draw", ge=0)
    nothing: float = fixed(0.05, "nothing is hidden", ge=0)

    def conflicts(self) -> Iterator[Conflict]:
        names = tuple(type(self).model_fields)
        if not any(getattr(self, name) for name in names):
            fault = Fault("every share of data.mask is 0", "no mask could be drawn", "give one of them more")
            yield Conflict(names, fault)


class DegradeConfig(Section):
    """What an upsampler's low-resolution inputs suffer, so that it can enlarge drawn pictures too."""

    share: float = fixed(0.0, "of the samples whose input is degraded, as strongly as is drawn", ge=0, le=1)
    blur: float = fixed(0.8, "standard deviation of a Gaussian blur, in the input's pixels, at most", ge=0)
    noise: float = fixed(10.0, "standard deviation of added noise, in 1/255, at most", ge=0)
    jpeg: int = fixed(40, "quality of JPEG, at least; 100: no JPEG", ge=1, le=100)

    def conflicts(self) -> Iterator[Conflict]:
        fields = type(self).model_fields.items()
        if not self.share and any(getattr(self, name) != field.default for name, field in fields):
            fault = Fault(
                "data.degrade says how strongly inputs are degraded, and data.degrade.share = 0 of them are",
                "it would do nothing",
                "give data.degrade.share, such as 0.5, or remove the others",
            )
            yield Conflict(("share",), fault)


class DataConfig(Section):
    """Which samples, and how a picture and its caption become a training pair."""

    # Free, for a resume compares the samples themselves (their fingerprint): shards may have moved.
    shards: Patterns = free(
        "builtin:shapes",
        "brace patterns or a list of them, paths or URLs; a folder of pictures, which is packed into the cache; or "
        "builtin:shapes",
    )
    reader: Literal["indexed", "stream"] = fixed(
        "indexed",
        "stream: read shards from beginning to end, for what has no index: compressed tars, pipe: commands, stores "
        "without ranges",
    )
    shuffle_buffer: int = fixed(
        1000, "samples that a loader process mixes at a time, with reader=stream; held in memory, encoded", ge=1
    )
    workers: int = free(2, "loader processes per rank; 0 loads in the training process", ge=0)
    shuffle: bool = fixed(True, "a new order in every epoch")
    crop: Literal["center", "pad"] = fixed("center", "how a picture becomes square")
    trim: bool = fixed(True, "cut uniform borders away before the resize")
    flip: float = fixed(0.0, "probability of a left-right mirror; captions may speak of sides", ge=0, le=1)
    drop_caption: float = fixed(0.1, "probability that the caption is emptied and CLIP kept", ge=0, le=1)
    drop_both: float = fixed(
        0.1, "probability that both are dropped: the unconditional pass of guidance", ge=0, le=1
    )
    min_side: int = fixed(2, "pictures with a shorter side, in pixels, are skipped", ge=1)
    max_pixels: int = fixed(
        64_000_000, "pictures with more pixels are skipped undecoded: decompression bombs", ge=1
    )
    max_bad_fraction: float = fixed(0.5, "a larger share of unusable samples stops the run", ge=0, le=1)
    mix: Mapping[str, MixConfig] = fixed({}, "instead of shards: several data sets, by names of your choice")
    filter: FilterConfig = fixed(FilterConfig(), "which samples are used, by their JSON records")
    captions: Mapping[str, float] = fixed(
        {},
        "weights of the captions drawn, by where they are: txt, txt.lines (one a line), json.FIELD, file.FIELD; none: "
        "a text, else the record's",
    )
    caption_file: UserPath | None = fixed(None, "captions by sample key, as JSON lines or parquet: file.FIELD")
    degrade: DegradeConfig = fixed(DegradeConfig(), "what an upsampler's low-resolution inputs suffer")
    mask: MaskConfig = fixed(MaskConfig(), "what an inpainting model is to fill in, sample by sample")
    drop_last: bool = fixed(
        True, "leave an epoch's last, partial batch out; false: fill it with the epoch's first samples"
    )
    damaged_shards: Literal["stop", "salvage"] = fixed(
        "stop", "salvage: train on the members of a damaged tar that are whole"
    )
    index_dir: UserPath | None = free(
        None, "folder of the shards' indexes and catalog; null: beside the shards, or in the user's cache"
    )
    clip_store: UserPath | None = fixed(
        None, "folder that `glide-ds prepare clip` wrote; null: embeddings are computed while training"
    )
    cache_dir: UserPath | None = free(
        None, "where a node keeps blocks of remote shards; null: the user's cache"
    )
    cache_gb: float = free(
        50.0, "the cache's bound in GiB; an epoch's window wants 65,536 samples, some 3 GiB", ge=0
    )
    shapes_samples: int = fixed(50_000, "size of the built-in set's epoch", ge=1)
    trace: bool = free(False, "write RUN/trace/rank*.jsonl: the samples and timesteps of every step")

    def conflicts(self) -> Iterator[Conflict]:
        if self.drop_caption + self.drop_both > 1:
            fault = Fault(
                f"data.drop_caption={self.drop_caption} and data.drop_both={self.drop_both} add up to more than 1, "
                "but a sample is dropped in one way only",
                remedy="lower one of them",
            )
            yield Conflict(("drop_caption", "drop_both"), fault)
        yield from self._among_captions()
        if self.reader == "stream":
            yield from self._against_streams()
        if self.shuffle_buffer != type(self).model_fields["shuffle_buffer"].default:
            given = f"data.shuffle_buffer = {self.shuffle_buffer}"
            if self.reader != "stream":
                fault = Fault(
                    f"{given} with data.reader = 'indexed'",
                    "it would do nothing: an index orders all samples without a buffer",
                    "set data.reader=stream, or remove it",
                )
                yield Conflict(("reader", "shuffle_buffer"), fault)
            elif not self.shuffle:
                fault = Fault(f"{given} with data.shuffle = false", "it would do nothing", "remove one of them")
                yield Conflict(("shuffle", "shuffle_buffer"), fault)

    def _among_captions(self) -> Iterator[Conflict]:
        fields, given = dict(self.captions), f"data.captions = {dict(self.captions)}"
        keys: tuple[str, ...] = ("captions",)
        if any(weight < 0 for weight in fields.values()):
            yield Conflict(keys, Fault(f"{given} has weights that can't be drawn by", remedy="give 0 or more"))
        elif fields and not any(fields.values()):
            yield Conflict(keys, Fault(f"{given} leaves no caption to draw", remedy="give one a weight"))
        elif fields and self.draws_shapes:
            yield Conflict((*keys, "shards"), Fault(f"{given} would do nothing: shapes have one caption each"))
        if any(name.split(".")[0] == "file" and fields[name] for name in fields) != (
            self.caption_file is not None
        ):
            fault = Fault(
                f"{given} and data.caption_file = {self.caption_file} do not go together",
                remedy='name its fields as in data.captions={"file.caption": 1}, and the file by data.caption_file',
            )
            yield Conflict((*keys, "caption_file"), fault)

    def _against_streams(self) -> Iterator[Conflict]:
        """What needs samples that can be read by number."""
        shards = (self.shards,) if isinstance(self.shards, str) else self.shards
        reasons = {
            "mix": (bool(self.mix), "sets mix in exact proportions by their samples' numbers"),
            "clip_store": (
                self.clip_store is not None,
                "a store's embeddings lie by shard and place, which only an index tells",
            ),
            "drop_last": (
                not self.drop_last,
                "an epoch's last batch can't be filled with samples that have gone by",
            ),
            "shards": (
                any(each.startswith("builtin:") for each in shards),
                "built-in samples are drawn, not read",
            ),
        }
        for key, (given, reason) in reasons.items():
            if given:
                fault = Fault(
                    f"data.{key} = {getattr(self, key)!r} does not go with data.reader = 'stream'",
                    reason,
                    f"set data.reader=indexed, or {'name shards' if key == 'shards' else f'remove data.{key}'}",
                )
                yield Conflict((key, "reader"), fault)

    @property
    def draws_shapes(self) -> bool:
        """Whether the samples are the built-in shapes, drawn on the fly."""
        return self.shards == "builtin:shapes" and not self.mix

    @property
    def mix_parts(self) -> tuple[MixPart, ...]:
        """The data sets to mix; one, of `shards`, where there is no mix."""
        if not self.mix:
            return (MixPart(self.shards, 1.0, self.filter),)
        return tuple(
            MixPart(part.shards, part.weight, part.filter or self.filter) for part in self.mix.values()
        )


class ClipConfig(Section):
    """The frozen encoder whose embeddings condition the adapter."""

    model: str = fixed("ViT-L/14", "its name as people write it, or builtin:tiny")
    weights: str = fixed("openai", "open_clip's tag or a local file; builtin:tiny brings its own")
    source: Literal["text", "image", "both"] = fixed(
        "text", "which embedding trains the adapter; both: a model that takes either prompt"
    )
    image_share: float = fixed(
        0.5, "of the samples whose picture is embedded, with source=both; the others' caption is", gt=0, lt=1
    )
    drop: float = fixed(
        0.1, "probability that CLIP alone is dropped (with the caption: data.drop_both)", ge=0, le=1
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.source != "both" and self.image_share != type(self).model_fields["image_share"].default:
            fault = Fault(
                f"clip.image_share = {self.image_share:g} with clip.source = {self.source!r}",
                "it would do nothing",
                "set clip.source=both, or remove it",
            )
            yield Conflict(("source", "image_share"), fault)

    @property
    def pictured(self) -> float:
        """The share of samples whose embedding is their picture's."""
        return {"text": 0.0, "image": 1.0, "both": self.image_share}[self.source]


class LrScale(Section):
    """Each role's learning rate as a multiple of the optimizer's `lr`."""

    adapter: float = fixed(1.0, "of the adapter: DualAttention's keys and values, and the ClipAdapter")
    gates: float = fixed(1.0, "of the gates' logits")
    unet: float = fixed(1.0, "of the pretrained UNet")
    text: float = fixed(1.0, "of the pretrained text transformer")


def _span(steps: str) -> str:
    match = re.fullmatch(r"(\d+):(\d+)", steps)
    if steps and (match is None or not 1 <= int(match[1]) <= int(match[2])):
        raise WrongError("it names no updates", "give the first and the last one, such as 10:13")
    return steps


class TrainConfig(Section):
    """What one phase optimises, for how long, and how its steps are computed."""

    phase: Literal[tuple(PHASES)] = fixed(  # type: ignore[valid-type]
        "full", "what is trained: base GLIDE without CLIP, the adapter, adapter and gates, or all"
    )
    steps: int = free(1000, "the phase's total, counted over all resumes", ge=1)
    seed: int = fixed(0, "of data order, augmentation, noise, timesteps and dropout", ge=0)
    scope: Literal["all", "unet", "text"] = fixed("all", "what phase base trains")
    loss: Literal["mse", "hybrid"] = fixed(
        "mse", "hybrid adds the variational bound, which trains the variance channels"
    )
    weighting: Literal["eps", "v", "min-snr"] = fixed(
        "eps",
        "of the timesteps in the loss: v weighs noisy ones more, where conditioning decides; min-snr the clean ones "
        "less, down to what the squared error of the picture would give them",
    )
    min_snr_gamma: float = fixed(5.0, "signal-to-noise ratio above which weighting=min-snr weighs less", gt=0)
    timesteps: Literal["uniform", "stratified"] = fixed(
        "uniform",
        "stratified: of every global batch one timestep in each of as many equal parts of the schedule, for a loss "
        "that varies less; uniform: each for itself",
    )
    offset_noise: float = fixed(
        0.0, "standard deviation of noise that all of a channel's pixels share: dark and bright pictures", ge=0
    )
    input_perturbation: float = fixed(
        0.0,
        "standard deviation of noise that the model sees and is not asked for: 0.1 as in arXiv 2301.11706",
        ge=0,
    )
    vb_weight: float = fixed(0.001, "of the variational bound (bits per dimension) in the hybrid loss", ge=0)
    lr_scale: LrScale = fixed(LrScale(), "each role's learning rate as a multiple of the optimizer's lr")
    adapter_clipping: float = fixed(
        0.5, "gradient norm threshold of adapter and gates, 0 for none; the rest: gradient_clipping", ge=0
    )
    gate_offset: float = fixed(
        10.0, "the scheduled part of every gate's logit, reached at the end of gate_warmup"
    )
    gate_warmup: int = fixed(0, "steps over which gate_offset is reached; 0 sets it at once", ge=0)
    kl_weight: float = fixed(0.0, "of the Gaussian KL to the pass without CLIP; 0: no such pass", ge=0)
    kl_every: int = fixed(100, "steps between two KL terms", ge=1)
    align_weight: float = fixed(
        0.0,
        "of the distance of what CLIP adds, to the timestep and in attention, to what an emptied caption would have",
        ge=0,
    )
    recompute: Recompute = free(
        "auto",
        "what the backward pass computes again instead of keeping it: none of it, attention, blocks (all of them), "
        "budget: as little as activation_gb allows, or auto: the least of the first three that fits by the planner's "
        "estimate (training/speed/fitting.py), which the opening block shows",
    )
    activation_gb: float = free(
        0.0, "GiB that recompute=budget may keep per rank between forward and backward pass", ge=0
    )
    compile: bool = free(False, "compile the blocks by torch.compile: minutes at the first start, then kept")
    cuda_graph: bool = free(False, "record a step's passes once and launch them as one; with recompute=none")
    precision: Precision = free(
        "tf32",
        "how a GPU multiplies fp32 numbers: in full (fp32), on its TF32 matrix units, or some of them by the faster "
        "kernels for fp16, whose mantissa is as long (model/reduced.py). bf16.enabled=true goes before it: then only "
        "what stays in fp32, such as the CLIP encoder, is multiplied so",
    )
    channels_last: bool = free(False, "lay activations out as NHWC: 1.25 times as fast on a CPU")
    profile_steps: Annotated[str, AfterValidator(_span)] = free(
        "",
        "first and last update, such as 10:13, of which RUN/profile gets a trace for Perfetto and TensorBoard and the "
        "log the ten longest kernels; none: no trace",
    )
    profile_ranks: Annotated[tuple[int, ...], BeforeValidator(listed)] = free(
        (0,), "the ranks that profile_steps traces, numbered from 0"
    )

    @property
    def profiled(self) -> range:
        """The updates of profile_steps, numbered from 1."""
        first, _, last = self.profile_steps.partition(":")
        return range(int(first), int(last) + 1) if last else range(0)

    def conflicts(self) -> Iterator[Conflict]:
        if (self.recompute == "budget") != (self.activation_gb > 0):
            fault = Fault(
                f"train.recompute = {self.recompute!r} with train.activation_gb = {self.activation_gb:g}",
                "one of them would do nothing: the budget and its size go together",
                "give both or neither",
            )
            yield Conflict(("recompute", "activation_gb"), fault)
        if self.cuda_graph and self.recompute not in ("none", "auto"):
            fault = Fault(
                f"train.cuda_graph=true with train.recompute={self.recompute!r}: what is computed again must draw the "
                "same dropout again, which a recording can't",
                remedy="set train.recompute=none, with a smaller micro-batch if that takes too much memory, or "
                "train.cuda_graph=false",
            )
            yield Conflict(("cuda_graph", "recompute"), fault)
        if (
            self.weighting != "min-snr"
            and self.min_snr_gamma != type(self).model_fields["min_snr_gamma"].default
        ):
            fault = Fault(
                f"train.min_snr_gamma = {self.min_snr_gamma:g} with train.weighting = {self.weighting!r}",
                "it would do nothing",
                "set train.weighting=min-snr, or remove it",
            )
            yield Conflict(("weighting", "min_snr_gamma"), fault)
        if self.cuda_graph and self.align_weight:
            fault = Fault(
                f"train.cuda_graph=true with train.align_weight={self.align_weight}: a recorded pass does not tell "
                "what its attention blocks were given",
                "CLIP's tokens would have no target",
                "train.cuda_graph=false, or train.align_weight=0",
            )
            yield Conflict(("cuda_graph", "align_weight"), fault)
        yield from self._against_profiling()
        if not PHASES[self.phase].scoped and self.scope != "all":
            fault = Fault(
                f"train.scope = {self.scope!r} belongs to phase base; phase {self.phase!r} fixes what trains",
                remedy="remove train.scope or set train.phase=base",
            )
            yield Conflict(("scope", "phase"), fault)

    def _against_profiling(self) -> Iterator[Conflict]:
        if not self.profiled and self.profile_ranks != type(self).model_fields["profile_ranks"].default:
            fault = Fault(
                f"train.profile_ranks = {list(self.profile_ranks)} without train.profile_steps",
                "it would do nothing",
                "set train.profile_steps, or remove it",
            )
            yield Conflict(("profile_ranks", "profile_steps"), fault)
        if self.profiled and self.profiled.start > self.steps:
            fault = Fault(
                f"train.profile_steps = {self.profile_steps!r} with train.steps = {self.steps}",
                "it would trace nothing",
                "name updates that there are",
            )
            yield Conflict(("profile_steps", "steps"), fault)


class CheckpointConfig(Section):
    """When the run's state is written, and how much of it is kept."""

    every: int = free(500, "steps between two checkpoints", ge=1)
    keep: int = free(2, "the newest committed checkpoints that stay, per phase; 0 keeps all", ge=0)
    keep_every: int = free(0, "steps; a checkpoint at a multiple of it is kept for good; 0: none is", ge=0)
    best: bool = free(True, "keep the one of the lowest validation loss too, as BEST")
    async_save: bool = free(True, "write while training goes on, from a copy of the state in host memory")


class EmaConfig(Section):
    """Averages of the trained weights, 4 bytes per parameter each, shared by the ranks."""

    decay: float = free(0.0, "of the average; 0 keeps none, 0.9999 is usual", ge=0, le=1)
    warmup: float = free(
        10.0, "update t decays by min(decay, (1 + t) / (warmup + t)); 0: by decay from the start", ge=0
    )
    snapshot_every: int = free(
        0,
        "steps; two more averages are kept, and those of a checkpoint at a multiple of it for good, 8 bytes per "
        "trained parameter on disk each time, so that export --ema_length can make one of any length afterwards; "
        "0: none are",
        ge=0,
    )


class StabilityConfig(Section):
    """What happens to an update whose loss or gradient is no good.

    One that is not finite is skipped in any case, and so is a loss spike, by all ranks alike. Several within
    `window` steps bring the run back to the checkpoint before them, past their data, at a lower rate.
    """

    spike_factor: float = free(
        15.0, "a loss so many deviations above the recent median is a spike; 0: none is", ge=0
    )
    window: int = free(
        100, "accepted updates that a loss is compared with; the first half of them is not judged", ge=4
    )
    skip_limit: int = free(
        3, "skipped updates within `window` steps that bring a rollback; 0: they never do", ge=0
    )
    max_rollbacks: int = free(3, "per phase; then the run stops with a report", ge=0)
    lr_cut: float = free(0.5, "what every learning rate is multiplied by after a rollback", ge=0.01, le=1)


class ValidationConfig(Section):
    """How good the model is on held-out samples, at the same noise and timesteps each time."""

    every: int = free(0, "steps between two validations; 0: none", ge=0)
    samples: int = free(256, "held-out samples", ge=1)
    shards: Patterns | None = free(
        None,
        "held-out shards; null: those that prepare pack --hold_out put beside data.shards, or the shapes' own held-out "
        "set; no validation where there are none",
    )
    drawn: int = free(
        0,
        "held-out shapes drawn in each way by rank 0, as the sample grids are, and judged; built-in data. For an "
        "upsampler: held-out pictures enlarged, and their PSNR; any data",
        ge=0,
    )
    patience: int = free(
        0,
        "validations in which neither the loss nor a conditioning gain betters its best, after which the phase ends; "
        "0: it goes on",
        ge=0,
    )
    max_degradation: float = free(
        0.1,
        "by what share the loss with CLIP off may exceed that before training; then the run stops; 0: any",
        ge=0,
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.patience and not self.every:
            fault = Fault(
                f"validation.patience = {self.patience} with validation.every = 0",
                "it would do nothing: there are no validations to count",
                "set validation.every, or remove it",
            )
            yield Conflict(("patience", "every"), fault)


class WandbConfig(Section):
    """Weights & Biases, beside the run's own files."""

    project: str = free("", "the project there that shows the run; none: it is not shown there")
    name: str = free("", "the run's name there; none: that of its directory")
    mode: Literal["online", "offline"] = free(
        "online", "offline: into RUN/wandb alone, written anew by each start, for `wandb sync`"
    )

    def conflicts(self) -> Iterator[Conflict]:
        for key in ("name", "mode"):
            if not self.project and getattr(self, key) != type(self).model_fields[key].default:
                fault = Fault(
                    f"log.wandb.{key} = {getattr(self, key)!r} without log.wandb.project",
                    "it would do nothing",
                    "set log.wandb.project, or remove it",
                )
                yield Conflict((key, "project"), fault)


class LogConfig(Section):
    """What a person sees while the run goes on."""

    every: int = free(10, "steps between two lines of metrics.jsonl", ge=1)
    tensorboard: bool = free(True, "write RUN/tensorboard too")
    wandb: WandbConfig = free(
        WandbConfig(), "Weights & Biases, which bash launch/env.sh --extras wandb installs"
    )
    samples_every: int = free(1000, "steps between two sample grids; 0 draws none", ge=0)
    sample_prompts: Texts = free((), "what the grids show; none: captions of the run's own data")
    sample_images: Texts = free(
        (), "picture files that the grids vary, where clip.source is image or both; none: of the run's own data"
    )
    samples: int = free(8, "pictures per grid where the prompts come from the data", ge=1)
    sample_steps: int = free(50, "timesteps of a picture in a grid", ge=1)
    guidance: float = free(3.0, "scale of classifier-free guidance in a grid")


class BatchArithmetic(NamedTuple):
    """How the global batch is split: global_batch = micro_batch * accumulation * world_size."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int


class Config(Section):
    """One phase of one run: DeepSpeed's own part (deepspeed.py) and ours."""

    deepspeed: Mapping[str, Any] = {}
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    clip: ClipConfig = ClipConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    stability: StabilityConfig = StabilityConfig()
    validation: ValidationConfig = ValidationConfig()
    ema: EmaConfig = EmaConfig()
    log: LogConfig = LogConfig()

    @property
    def uses_clip(self) -> bool:
        return PHASES[self.train.phase].clip

    def batch_arithmetic(self, world_size: int) -> BatchArithmetic:
        """Split `train_batch_size` over the ranks.

        The micro-batch is the largest divisor of a rank's share that does not exceed
        `train_micro_batch_size_per_gpu`. Raises ConfigError naming the nearest sizes that divide.
        """
        total = self.deepspeed["train_batch_size"]
        if total % world_size:
            below = total // world_size * world_size
            nearest = [size for size in (below, below + world_size) if size]
            raise ConfigError(
                f"train_batch_size {total} can't be split evenly over {world_size} ranks",
                remedy=f"use {' or '.join(map(str, nearest))}, or another number of ranks",
            )
        share = total // world_size
        most = self.deepspeed.get("train_micro_batch_size_per_gpu", share)
        micro = max(size for size in range(1, min(most, share) + 1) if share % size == 0)
        return BatchArithmetic(total, micro, share // micro, world_size)

    def to_json(self) -> dict[str, Any]:
        """The file that gives this value again: DeepSpeed's part with our block inside. Secrets are masked."""
        block = {name: plain(getattr(self, name)) for name in SECTIONS}
        del block["model"]["architecture"]["clip_dim"]
        return {**json.loads(json.dumps(self.deepspeed)), BLOCK: block}


SECTIONS = tuple(name for name in Config.model_fields if name != "deepspeed")


def plain(value: Any) -> Any:
    """A value of a configuration as JSON has it, for people to read: its secrets are masked."""
    if isinstance(value, Section | Mapping):
        return {name: plain(inner) for name, inner in dict(value).items()}
    if isinstance(value, GlideConfig):
        return plain(asdict(value))
    if isinstance(value, tuple):
        return [plain(inner) for inner in value]
    return masked(value) if isinstance(value, str) else value


def with_changes(config: Config, **sections: Mapping[str, Any]) -> Config:
    """A copy with fields of its sections replaced, checked like a fresh one."""
    return config.changed(
        **{name: getattr(config, name).changed(name, **new) for name, new in sections.items()}
    )
