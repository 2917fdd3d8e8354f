"""What of the fp16 kernel's use can be held without a GPU; test_cuda.py holds the rest."""

from __future__ import annotations

import pytest
import torch

from glide_ds.model.attention import LARGEST, can_reduce, gradient_scale


@pytest.mark.parametrize("size", [1e-38, 1e-20, 3e-5, 1.0, 7e4, 1e30, 3e38, 0.0])
def test_gradients_of_any_size_come_into_the_range_of_fp16(size: float) -> None:
    gradient = torch.tensor([[[[size, -size / 3, 0.0]]]])
    scale = gradient_scale(gradient)
    assert scale.isfinite()
    assert torch.frexp(scale)[0] == 0.5  # a power of two
    scaled = gradient * scale
    assert scaled.half().isfinite().all()
    if size > 1e-29:
        assert LARGEST / 2 <= scaled.max() <= LARGEST
    torch.testing.assert_close(scaled.half().float() / scale, gradient, rtol=2**-11, atol=1e-36)


def test_a_cpu_attends_in_full_precision() -> None:
    assert not can_reduce(torch.device("cpu"))
