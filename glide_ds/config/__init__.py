"""One run as frozen values: every key and what it means (schema.py), and how files become them (load.py)."""

from glide_ds.config.load import DEEPSPEED_KEYS, cache_dir, load_config, load_configs
from glide_ds.config.schema import (
    BLOCK,
    PRESETS,
    BatchArithmetic,
    CheckpointConfig,
    ClipConfig,
    Config,
    DataConfig,
    DegradeConfig,
    EmaConfig,
    FilterConfig,
    LogConfig,
    LrScale,
    MaskConfig,
    MixConfig,
    MixPart,
    ModelConfig,
    RunConfig,
    StabilityConfig,
    TrainConfig,
    ValidationConfig,
    is_built_in,
    with_changes,
)
