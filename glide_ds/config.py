"""One run as frozen dataclasses: the JSON block, the YAML overlay and --set, validated together."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataConfig:
    """Which samples, and how a picture and its caption become a training pair."""

    shards: str | tuple[str, ...] = "builtin:shapes"  # brace patterns, lists, URLs, or builtin:shapes
    workers: int = 2  # loader processes per rank; 0 loads in the training process
    shuffle: bool = True
    crop: str = "center"  # how a picture becomes square: center | pad
    trim: bool = True  # cut uniform borders away before the resize
    flip: float = 0.0  # probability of a left-right mirror; captions may speak of sides
    drop_caption: float = 0.1  # probability that the caption is emptied and CLIP kept
    drop_both: float = 0.1  # probability that both are dropped: the unconditional pass of guidance
    min_side: int = 2  # pictures with a shorter side are skipped
    max_pixels: int = 64_000_000  # larger pictures are skipped undecoded: decompression bombs
    max_bad_fraction: float = 0.5  # a larger share of unusable samples stops the run
    shapes_samples: int = 50_000  # size of the built-in set's epoch
    trace: bool = False  # write RUN/trace/rank*.jsonl


@dataclass(frozen=True)
class ClipConfig:
    """The frozen encoder whose embeddings condition the adapter."""

    model: str = "ViT-L/14"  # as users write it, or builtin:tiny
    weights: str = "openai"  # open_clip's tag, a local file, or builtin
    source: str = "text"  # text | image: which embedding trains the adapter
    drop: float = 0.1  # probability that CLIP alone is dropped
    tokens: int = 8


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
