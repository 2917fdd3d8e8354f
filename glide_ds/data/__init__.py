"""From shards, or the built-in shapes, to the micro-batches a rank trains on.

Each name is imported where it is first asked for: torch takes seconds, which reading a tar or a picture must not cost.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glide_ds.data.loader import Source
    from glide_ds.data.pictures.decode import DecodeOptions, decode
    from glide_ds.data.streams.source import build_source
    from glide_ds.data.tally import Unusable
    from glide_ds.data.tars.shards import open_shards

__all__ = ["DecodeOptions", "Source", "Unusable", "build_source", "decode", "open_shards"]

_HOMES = {
    "DecodeOptions": "pictures.decode",
    "Source": "loader",
    "Unusable": "tally",
    "build_source": "streams.source",
    "decode": "pictures.decode",
    "open_shards": "tars.shards",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
