"""Any mode of picture as RGB: alpha over white, wide greys and floats by the range that their type or values say."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glide_ds.data.tally import Cause, Unusable

BITS_PER_SAMPLE, PHOTOMETRIC, PLANES, SAMPLE_FORMAT = 258, 262, 284, 339  # tags of TIFF
WHITE_IS_ZERO, APART, SIGNED = 0, 2, 2  # their values
BYTE, WORD = 255.0, 65535.0
LIGHTS = 16.0  # times white: no picture of bytes is as dark as that


def rgb(image: Image.Image, *, wide: bool = False) -> Image.Image:
    """The picture in RGB. `wide`: its file has 16 bits a channel, of which Pillow keeps the upper 8 of colours.

    Raises Unusable where no value of it is a number.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _narrow(image).convert("RGB")
    if wide and isinstance(image.info.get("transparency"), tuple):
        image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        if image.format == "BMP" and not np.asarray(layer)[..., 3].any():
            return image.convert("RGB")  # written by who left the fourth byte empty, for nobody draws nothing
        ground = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")


def check_planes(image: Image.Image) -> None:
    """Raises Unusable for a TIFF of more than 8 bits whose colours lie apart, which Pillow reads as noise."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(PLANES) == APART and len(image.getbands()) > 1 and max(tags.get(BITS_PER_SAMPLE, (8,))) > 8:
        raise Unusable(Cause.UNKNOWN_FORMAT, "a TIFF of 16 bits a colour, each colour in a plane of its own")


def _narrow(image: Image.Image) -> Image.Image:
    """Greys of more than 8 bits in 8."""
    values: NDArray[Any] = np.asarray(image).astype(np.float64)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        finite = values[np.isfinite(values)]
        if not finite.size:
            raise Unusable(Cause.CORRUPT_IMAGE, "no value of it is a number")
        top = _top_of_floats(finite)
    elif image.mode == "I":
        bits: int = tags[BITS_PER_SAMPLE][0] if BITS_PER_SAMPLE in tags else 16
        signed = SAMPLE_FORMAT in tags and tags[SAMPLE_FORMAT][0] == SIGNED
        if bits == 32 and not signed:
            values = values % 2.0**32  # Pillow takes them for signed
        top = 2.0 ** (bits - signed) - 1
        if values.max() <= WORD:  # 16 bits kept in 32, as most programs do
            top = min(top, WORD)
    else:
        top = WORD
    grey = (np.nan_to_num(values, nan=0.0, posinf=top, neginf=0.0) / top * 255).clip(0, 255).round()
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8))


def _top_of_floats(finite: NDArray[np.float64]) -> float:
    """What white is. Floats go from 0 to 1, and beyond in the lights, but for whole numbers: those of 8 or 16 bits."""
    largest = finite.max()
    few = largest <= LIGHTS or np.median(finite) <= 1
    if largest <= 1 or (few and not np.array_equal(finite, finite.round())):
        return 1.0
    return BYTE if largest <= BYTE else WORD
