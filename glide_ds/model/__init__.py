"""GLIDE with optional CLIP conditioning, under the published state_dict names."""

from glide_ds.model.glide import create_model
from glide_ds.types import GlideConfig
