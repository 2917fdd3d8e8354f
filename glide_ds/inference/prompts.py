"""What CLIP is to see when a picture is drawn: pictures and texts, several of them averaged with weights.

C side of the pictures that CLIP reads, D CLIP width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from glide_ds.data.pictures.decode import Cropping, DecodeOptions, decode
from glide_ds.data.tally import Unusable
from glide_ds.errors import ConfigError, DataError
from glide_ds.files import PathLike, user_path
from glide_ds.model.clip import FrozenClip

_WEIGHTED = re.compile(r"(.+):([^:/\\]*)", re.DOTALL)


def read_picture(path: PathLike, side: int, cropping: Cropping) -> Tensor:
    """An image file as CLIP reads it: uint8 [C, C, 3], squared as the run's own pictures are.

    Raises DataError where it is no picture or can't be read.
    """
    place = user_path(path)
    try:
        data = place.read_bytes()
    except OSError as error:
        raise DataError(
            f"the image prompt {place} can't be read ({error.strerror})", remedy="give the path of a picture"
        ) from error
    return decode_picture(data, side, cropping, str(place))


def decode_picture(data: bytes, side: int, cropping: Cropping, name: str) -> Tensor:
    """The same of an image file's bytes; `name` is what an error calls it."""
    try:
        pixels = decode(data, DecodeOptions(side, *cropping))
    except Unusable as error:
        raise DataError(
            f"the image prompt {name} is no picture that can be used ({error.cause}: {error.detail})",
            remedy="give a JPEG, PNG, WebP, GIF, BMP or TIFF file",
        ) from None
    return torch.from_numpy(pixels)


def weighted(prompts: Sequence[str], *, files: bool = False) -> list[tuple[str, float | None]]:
    """Prompts as people write them, `x` or `x:0.7`, with the weight where one is given.

    What ends in a colon and no number is a prompt with a colon in it; so is a file of that very name.
    """
    found: list[tuple[str, float | None]] = []
    for prompt in prompts:
        match = _WEIGHTED.fullmatch(prompt)
        weight = _number(match[2]) if match else None
        if match is None or weight is None or (files and user_path(prompt).exists()):
            found.append((prompt, None))
        else:
            found.append((match[1], weight))
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def check_weights(prompts: Sequence[tuple[str, float | None]]) -> list[float]:
    """The weights, 1 each where none is given. Raises ConfigError where some lack one, or they are no shares."""
    weights = [weight for _, weight in prompts if weight is not None]
    if weights and len(weights) < len(prompts):
        without = next(prompt for prompt, weight in prompts if weight is None)
        raise ConfigError(
            f"{len(weights)} weights are given for {len(prompts)} CLIP prompts; {without!r} has none",
            "their shares are unclear",
            "give each one a weight (a.png:0.7 b.png:0.3), or none",
        )
    if any(not 0 <= weight < math.inf for weight in weights) or (weights and not sum(weights)):
        raise ConfigError(
            f"the weights of the CLIP prompts are {', '.join(f'{weight:g}' for weight in weights)}",
            remedy="give numbers from 0 up, at least one of them above 0",
        )
    return weights or [1.0] * len(prompts)


def clip_prompt(clip: FrozenClip, images: Sequence[str], texts: Sequence[str], cropping: Cropping) -> Tensor:
    """The mean direction [1, D] of pictures and texts, each `x` or `x:weight`; on the encoder's device.

    Raises DataError for a file that is no picture, ConfigError for weights that don't match.
    """
    each, weights = clip_prompts(clip, images, texts, cropping)
    shares = torch.tensor(weights, device=clip.device)
    return (shares[:, None] * each).sum(0, keepdim=True)


def clip_prompts(
    clip: FrozenClip, images: Sequence[str], texts: Sequence[str], cropping: Cropping
) -> tuple[Tensor, list[float]]:
    """What CLIP says of each of the same, [N, D], and the weights: 1 each where none is given."""
    pictures, words = weighted(images, files=True), weighted(texts)
    weights = check_weights([*pictures, *words])
    parts = [clip.encode_text([text for text, _ in words])] if words else []
    if pictures:
        read = [read_picture(path, clip.image_side, cropping) for path, _ in pictures]
        parts.insert(0, clip.encode_image(torch.stack(read)))
    return torch.cat(parts), weights
