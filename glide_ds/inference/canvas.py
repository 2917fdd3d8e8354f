"""Pictures that are to be filled in where a mask says so, as people give them: two files of one size.

B pictures, S image side.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from glide_ds.data.pictures.decode import DecodeOptions, decode
from glide_ds.data.tally import Unusable
from glide_ds.diffusion.pixels import to_signed
from glide_ds.diffusion.sampling import Options
from glide_ds.errors import DataError
from glide_ds.files import user_path

Files = tuple[str, str]  # a picture, and its mask: white where it is to be drawn anew
WHITE = 128  # from which level on a mask's pixel counts as white
TOUCHED = 8  # a reduced pixel is hidden where its share of white comes to this level: none of it may be shown


class Canvas(NamedTuple):
    """What an inpainting model is shown."""

    images: Tensor  # uint8 [B, S, S, 3]
    known: Tensor  # uint8 [B, S, S], 1 where the picture stays as it is

    def options(self, device: torch.device) -> Options:
        """The same for `diffusion.sample`."""
        known = self.known[:, None].float().to(device)
        return {"inpaint_image": to_signed(self.images).to(device), "inpaint_mask": known}

    def kept(self, drawn: Tensor) -> Tensor:
        """Pictures uint8 [B, S, S, 3], the known pixels exactly those that were given."""
        return torch.where(self.known[..., None].bool(), self.images, drawn)


def read_canvas(files: Sequence[Files | None], side: int) -> Canvas | None:
    """Pictures and masks cut to a square in the middle, at `side`; a row without files knows nothing of its picture.

    None where no row has any. Raises DataError for what can't be read or does not fit.
    """
    if not any(files):
        return None
    images = torch.zeros(len(files), side, side, 3, dtype=torch.uint8)
    known = torch.zeros(len(files), side, side, dtype=torch.uint8)
    for row, pair in enumerate(files):
        if pair is not None:
            images[row], known[row] = _read(*pair, side)
    return Canvas(images, known)


def _read(picture: str, mask: str, side: int) -> tuple[Tensor, Tensor]:
    data, (_, size) = _bytes(picture), _opened(picture)
    grey, mask_size = _opened(mask)
    if mask_size != size:
        raise DataError(
            f"the mask {mask} has {mask_size[0]} × {mask_size[1]} pixels, the picture {picture} {size[0]} × {size[1]}",
            "which pixels are to be drawn is not known",
            "give a mask of the picture's size, white where it is to be drawn anew",
        )
    white = np.asarray(grey) >= WHITE
    if not white.any():
        raise DataError(
            f"the mask {mask} is white nowhere",
            "there is nothing to draw",
            "paint white what is to be drawn anew",
        )
    flat = io.BytesIO()
    Image.fromarray(white.astype(np.uint8) * 255).save(flat, "PNG")
    options = DecodeOptions(side, "center", trim=False)
    try:
        pixels, hidden = decode(data, options), decode(flat.getvalue(), options)
    except Unusable as error:
        raise DataError(f"{picture} can't be used ({error.cause}: {error.detail})") from None
    return torch.from_numpy(pixels), torch.from_numpy((hidden[..., 0] < TOUCHED).astype(np.uint8))


def _bytes(name: str) -> bytes:
    try:
        return user_path(name).read_bytes()
    except OSError as error:
        raise DataError(
            f"{name} can't be read ({error.strerror})", remedy="give the path of a picture"
        ) from error


def _opened(name: str) -> tuple[Image.Image, tuple[int, int]]:
    """A picture in grey, upright, and its (width, height)."""
    try:
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(_bytes(name))))
        return picture.convert("L"), picture.size
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is no picture ({error})", remedy="give a PNG or JPEG") from error
