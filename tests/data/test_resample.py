"""The resize is Lanczos, also of a box between pixels, and sees nothing beside the box."""

from __future__ import annotations

import numpy as np
import pytest
from data_kit import photo
from PIL import Image

from glide_ds.data.pictures.resample import resize


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (17, 90), (200, 150), (1, 1)])
def test_it_is_pillows_lanczos(rows: int, columns: int) -> None:
    pixels = photo(1, 150, 190)
    wanted = np.asarray(Image.fromarray(pixels).resize((columns, rows), Image.Resampling.LANCZOS))
    found = resize(pixels, (0, 150, 0, 190), rows, columns)
    assert found.shape == (rows, columns, 3)
    assert np.abs(found.astype(int) - wanted).max() <= 1


def test_a_box_between_pixels_shifts_by_less_than_one() -> None:
    ramp = np.repeat(np.arange(0, 200, 2, dtype=np.uint8)[:, None, None], 100, axis=1).repeat(3, axis=2)
    found = resize(ramp, (10.25, 90.25, 0, 100), 20, 20)
    # Output line i is centred on 10.25 + 4 (i + 1/2), where the ramp is twice that less half a pixel.
    wanted = 2 * (10.25 + 4 * (np.arange(20) + 0.5) - 0.5)
    assert np.abs(found[3:-3, 0, 0] - wanted[3:-3]).max() <= 1
    assert np.array_equal(
        resize(ramp.transpose(1, 0, 2), (0, 100, 10.25, 90.25), 20, 20), found.transpose(1, 0, 2)
    )


def test_nothing_beside_the_box_is_seen() -> None:
    pixels = np.full((60, 60, 3), 255, np.uint8)
    pixels[20:40, 30:50] = 7
    assert (resize(pixels, (19.5, 40.5, 29.75, 50), 16, 16) == 7).all()


def test_a_box_of_the_output_is_copied() -> None:
    pixels = photo(2, 16, 16)
    assert np.array_equal(resize(pixels, (0, 16, 0, 16), 16, 16), pixels)
