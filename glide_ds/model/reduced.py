"""Products of fp32 tensors in the precision of TF32, taken by the faster kernels for fp16.

TF32, which a GPU's matrix units take fp32 products in, keeps 10 bits of the mantissa. So does fp16, whose kernels are
up to four times as fast: with sums in fp32, as both have them, one's product is the other's. What fp16 lacks is
range. Activations have it (GLIDE was trained in fp16); gradients get it by a power-of-two scale for each call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Reducible(nn.Module):
    """A module with such a product. `reduced` takes the fp16 kernel: where TF32 is wanted, on a GPU."""

    reduced = False


def can_reduce(device: torch.device) -> bool:
    """Whether the device has TF32 and the kernels."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def gradient_scale(gradient: Tensor, largest: float) -> Tensor:
    """The power of two [] that brings the largest element to between `largest` / 2 and `largest`, a power of two."""
    # Powers of two change no mantissa. Below 2^-100 all is as good as zero, and the scale would overflow.
    _, exponent = torch.frexp(gradient.abs().amax())
    return torch.ldexp(torch.full_like(gradient.flatten()[0], largest), -exponent.clamp(min=-100))
