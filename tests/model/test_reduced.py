"""What of the fp16 kernels' use can be held without a GPU; test_cuda.py holds the rest."""

from __future__ import annotations

import pytest
import torch

from glide_ds.model.attention import LARGEST
from glide_ds.model.convolution import Conv2d
from glide_ds.model.reduced import can_reduce, gradient_scale


@pytest.mark.parametrize("size", [1e-38, 1e-20, 3e-5, 1.0, 7e4, 1e30, 3e38, 0.0])
def test_gradients_of_any_size_come_into_the_range_of_fp16(size: float) -> None:
    gradient = torch.tensor([[[[size, -size / 3, 0.0]]]])
    scale = gradient_scale(gradient, LARGEST)
    assert scale.isfinite()
    assert torch.frexp(scale)[0] == 0.5  # a power of two
    scaled = gradient * scale
    assert scaled.half().isfinite().all()
    if size > 1e-29:
        assert LARGEST / 2 <= scaled.max() <= LARGEST
    torch.testing.assert_close(scaled.half().float() / scale, gradient, rtol=2**-11, atol=1e-36)


def test_a_cpu_takes_products_in_full_precision() -> None:
    assert not can_reduce(torch.device("cpu"))


def gradients(conv: Conv2d, x: torch.Tensor, arriving: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(conv(x), [x, conv.weight, conv.bias], arriving)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e9, 0.0])
def test_a_reduced_convolution_rounds_its_weights_gradient_as_tf32_does(kernel: int, size: float) -> None:
    """Only that, and whatever the size of the gradient that arrives."""
    torch.manual_seed(0)
    conv = Conv2d(32, 64, kernel)
    x = torch.randn(4, 32, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    arriving = torch.randn(4, 64, 16, 16) * size
    exact, output = gradients(conv, x, arriving), conv(x)
    conv.reduced = True
    reduced = gradients(conv, x, arriving)
    assert torch.equal(conv(x), output)
    for got, want in zip(reduced[::2], exact[::2], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * size)
    assert reduced[1].dtype == torch.float32
    assert (reduced[1] - exact[1]).norm() <= 2**-11 * exact[1].norm()


def test_the_sum_of_a_whole_batch_of_large_products_fits_fp16() -> None:
    """All gradients alike and all inputs 3.5: what many pixels add up to at most."""
    conv = Conv2d(1, 1, 1)
    x = torch.full((64, 1, 128, 128), 3.5, requires_grad=True)
    conv.reduced = True
    _, found, _ = gradients(conv, x, torch.full_like(x, 0.75))
    assert found.item() == pytest.approx(3.5 * 0.75 * x.numel(), rel=0.02)  # a CPU adds them up in fp16


def test_a_frozen_convolution_keeps_no_input() -> None:
    conv = Conv2d(32, 32, 3).requires_grad_(False)
    conv.reduced = True
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        conv(torch.randn(1, 32, 8, 8, requires_grad=True))
    assert torch.float16 not in {tensor.dtype for tensor in kept}
