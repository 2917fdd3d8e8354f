"""What generated pictures have that a downsampled photograph has not: blur, noise and the blocks of JPEG.

An upsampler is to enlarge what another model drew; one that only ever saw clean pictures takes its faults for
structure (arXiv 2106.15282, section 3, on conditioning augmentation). B samples, h, w height and width.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

from glide_ds.config import DegradeConfig
from glide_ds.data.order import Words, uniform
from glide_ds.data.pictures.resample import Pixels

BEST_JPEG = 95  # the highest quality drawn
WHETHER, BLUR, NOISE, JPEG, GRAIN = range(5)


def degraded(pictures: Pixels, keys: Words, config: DegradeConfig) -> Pixels:
    """Pictures uint8 [B, h, w, 3], a share of them worse: all that is drawn follows from a picture's key [B]."""
    return np.stack([_one(picture, key, config) for picture, key in zip(pictures, keys, strict=True)])


def _one(pixels: Pixels, key: np.uint64, config: DegradeConfig) -> Pixels:
    word = np.asarray([key])
    whether, blur, noise, quality = uniform(word, np.arange(GRAIN)).tolist()
    if whether >= config.share:
        return pixels
    picture = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(blur * config.blur))
    grainy = np.asarray(picture) + noise * config.noise * _normal(word, pixels.shape)
    picture = Image.fromarray(np.clip(np.rint(grainy), 0, 255).astype(np.uint8))
    if config.jpeg < 100:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=round(config.jpeg + quality * max(0, BEST_JPEG - config.jpeg)))
        picture = Image.open(file)
    return np.array(picture)


def _normal(word: Words, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal values that follow from the word alone (Box & Muller 1958): numpy promises no stable stream."""
    count = int(np.prod(shape))
    radius, angle = uniform(word, GRAIN, np.arange(2 * count)).reshape(2, count)
    values = np.sqrt(-2 * np.log(1 - radius)) * np.cos(2 * np.pi * angle)
    return values.reshape(shape)
