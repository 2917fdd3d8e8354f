"""From shards, or the built-in shapes, to the micro-batches a rank trains on."""

from glide_ds.data.loader import Source, build_source

__all__ = ["Source", "build_source"]
