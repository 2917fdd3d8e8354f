"""Captions to pictures, and pictures to a grid."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from glide_ds.diffusion import create_diffusion, sample
from glide_ds.diffusion.pixels import to_bytes
from glide_ds.diffusion.sampling import Options
from glide_ds.errors import ConfigError
from glide_ds.files import write_file
from glide_ds.tokenizer import encode


def draw(
    model: Any,
    captions: list[str],
    *,
    schedule: str,
    steps: int | str = 100,
    spacing: str = "uniform",
    seed: int | Sequence[int] = 0,
    **options: Unpack[Options],
) -> Tensor:
    """Draw uint8 [B, S, S, 3] for captions; the same seed gives the same pictures on any device.

    Each picture has a seed of its own, by which alone its noise is drawn: seed, seed + 1, … or those given. `steps` is
    a respacing: a number, or a name such as fast27; `spacing` one of schedule.SPACINGS. options: diffusion.sample.
    Raises ConfigError for steps that leave out the noisiest without a low_res to begin at.
    """
    if options.get("low_res") is None and "0" in str(steps).split(",")[1:]:
        raise ConfigError(
            f"the steps {steps} leave out the noisiest",
            "only an upsampler has a picture to begin at: another would take noise for one",
            "leave no count at 0",
        )
    device = next(model.parameters()).device
    tokens, mask = encode(captions, model.config.text_ctx)
    seeds = range(seed, seed + len(captions)) if isinstance(seed, int) else seed
    images = sample(
        model,
        create_diffusion(schedule, respacing=str(steps), spacing=spacing),
        tokens=tokens.to(device),
        mask=mask.to(device),
        generator=[torch.Generator().manual_seed(own) for own in seeds],
        **options,
    )
    return to_bytes(images)


class Row(NamedTuple):
    """Pictures that stand beside each other."""

    images: Tensor  # uint8 [N, S, S, 3]
    labels: list[str]


def rows_grid(rows: Sequence[Row]) -> Image.Image:
    """Rows one above the other, with white where one is shorter; each picture over its label."""
    columns = max(len(row.labels) for row in rows)
    images = [F.pad(row.images, (0, 0, 0, 0, 0, 0, 0, columns - len(row.labels)), value=255) for row in rows]
    labels = [label for row in rows for label in [*row.labels, *[""] * (columns - len(row.labels))]]
    return grid(torch.cat(images), labels, columns=columns)


def grid(images: Tensor, captions: Sequence[str], columns: int = 8) -> Image.Image:
    """Pictures (uint8 [N, S, S, 3]) side by side, each over its caption; small ones are enlarged."""
    count, side = images.shape[0], images.shape[1]
    columns = min(columns, count)
    shown = side * max(1, round(128 / side))
    font = ImageFont.load_default(10)
    wrapped = [_wrap(caption, font, shown - 4) for caption in captions]
    text_height = 12 * max(text.count("\n") + 1 for text in wrapped) + 6
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * (shown + 4), rows * (shown + text_height)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (pixels, text) in enumerate(zip(images.cpu().numpy(), wrapped, strict=True)):
        x, y = i % columns * (shown + 4), i // columns * (shown + text_height)
        sheet.paste(Image.fromarray(pixels).resize((shown, shown), Image.Resampling.NEAREST), (x, y))
        draw.multiline_text((x + 2, y + shown + 1), text, fill="black", font=font, spacing=2)
    return sheet


def picture_format(path: Path) -> str:
    """What Pillow calls the format that a file's name asks for. Raises ConfigError where it names none."""
    kind = Image.registered_extensions().get(path.suffix.lower(), "")
    if kind not in Image.SAVE:
        raise ConfigError(f"{path} names no format of pictures", remedy="end it in .png or .jpg")
    return kind


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture all or nothing, its folder too. Raises OSError where it can't be."""
    data = io.BytesIO()
    picture.save(data, picture_format(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data.getvalue())


def _wrap(text: str, font: Any, width: int, lines: int = 3) -> str:
    wrapped = [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width or not wrapped[-1]:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1] + " …"]
    return "\n".join(wrapped)
