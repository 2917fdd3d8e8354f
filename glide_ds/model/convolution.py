"""A convolution whose weight's gradient is taken in the precision that the matrix units work in.

B samples, C input channels, D output channels.

TF32's matrix instructions want both factors laid along the sum, which here runs over the pixels, while memory holds
the channels of a pixel side by side. On an H200 the weights' gradients took 79 ms of the base model's step of 260,
outputs and inputs' gradients, with as many operations each, 28 and 34; in bf16, whose instructions take either
layout, the weights' took 18.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glide_ds.model.reduced import Reducible, gradient_scale

LARGEST = 2.0**6  # what the largest gradient of a call is brought to, or to less where there are many pixels:
SUM = 2.0**14  # so many times the largest, over all pixels, fits fp16's 2^16 even with inputs of 4


class Conv2d(nn.Conv2d, Reducible):
    """[B, C, H, W] -> [B, D, H, W], square kernel, zero padding that keeps the size."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        trained = self.weight.requires_grad and torch.is_grad_enabled()
        if self.reduced and trained and x.dtype == torch.float32:
            output: Tensor = _Reduced.apply(x, self.weight, self.bias)
            return output
        return super().forward(x)


class _Reduced(torch.autograd.Function):
    """A convolution that keeps its input in fp16, for the gradient of its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x.half(), weight)
        return torch.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        padding = weight.shape[-1] // 2
        # The input's gradient is a transposed convolution of the output's, which doesn't need the fp32 input.
        of_input = torch.conv_transpose2d(gradient, weight, padding=padding)
        return of_input, weight_gradient(gradient, x, weight.shape), gradient.sum((0, 2, 3))


def weight_gradient(gradient: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
    """Of a weight [D, C, K, K], from the output's gradient fp32 [B, D, H, W] and the input fp16 [B, C, H, W]: fp32."""
    pixels = gradient.numel() // gradient.shape[1]
    scale = gradient_scale(gradient, min(LARGEST, SUM / 2.0 ** (pixels - 1).bit_length()))
    padding = [shape[-1] // 2] * 2
    _, found, _ = torch.ops.aten.convolution_backward(
        (gradient * scale).half(),
        x,
        x.new_empty(shape),  # only its shape is read
        None,
        [1, 1],
        padding,
        [1, 1],
        False,
        [0, 0],
        1,
        [False, True, False],
    )
    wide: Tensor = found.float() / scale
    return wide
