"""Blocks of the UNet."""

import math

import pytest
import torch
import torch.nn.functional as F

from glide_ds.model.attention import Attending
from glide_ds.model.layers import GroupNorm, LayerNorm
from glide_ds.model.unet import AttentionBlock, Context, ResBlock, doubled, frequencies, timestep_embedding


def joint_attention(block: AttentionBlock, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The block written out: q and k scaled by width**-1/4 each, text before pixels, softmax over both."""
    batch, channels, height, width = x.shape
    heads = block.heads
    pixels = F.conv1d(block.norm(x).reshape(batch, channels, -1), block.qkv.weight, block.qkv.bias)
    words = F.conv1d(text.transpose(1, 2), block.encoder_kv.weight, block.encoder_kv.bias)
    size = channels // heads
    out = []
    for head in range(heads):
        q, k, v = pixels[:, 3 * head * size : 3 * (head + 1) * size].split(size, dim=1)
        text_k, text_v = words[:, 2 * head * size : 2 * (head + 1) * size].split(size, dim=1)
        k, v = torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)
        scores = torch.einsum("bcq,bck->bqk", q * size**-0.25, k * size**-0.25)
        out.append(torch.einsum("bqk,bck->bcq", scores.softmax(dim=-1), v))
    h = F.conv1d(torch.cat(out, dim=1), block.proj_out.weight, block.proj_out.bias)
    return x + h.reshape(batch, channels, height, width)


def test_attention_is_one_softmax_over_text_and_pixels() -> None:
    torch.manual_seed(0)
    block = AttentionBlock(channels=64, head_channels=16, text_width=24)
    torch.nn.init.normal_(block.proj_out.weight)
    x, text = torch.randn(2, 64, 4, 6), torch.randn(2, 5, 24)
    torch.testing.assert_close(block(x, Context(text)), joint_attention(block, x, text), rtol=1e-4, atol=1e-5)


def test_a_cpu_attends_to_bf16_in_fp32() -> None:
    """Not in its kernels for bf16, which are slow and round on the way: the output is rounded, and nothing before."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16, dtype=torch.bfloat16) for n in (40, 52, 52))
    inputs, wide = (
        [part.to(dtype).requires_grad_() for part in (q, k, v)] for dtype in (q.dtype, torch.float32)
    )
    output, exact = Attending().attend(*inputs), F.scaled_dot_product_attention(*wide)
    assert torch.equal(output, exact.bfloat16())
    arriving = torch.randn_like(output)
    gradients = torch.autograd.grad(output, inputs, arriving)
    for got, want in zip(gradients, torch.autograd.grad(exact, wide, arriving.float()), strict=True):
        assert torch.equal(got, want.bfloat16())


def test_res_blocks_resample_both_branches() -> None:
    x, emb = torch.randn(1, 32, 8, 8), torch.randn(1, 128)
    for resample, expected in [
        ("up", x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)),
        ("down", x.reshape(1, 32, 4, 2, 4, 2).mean(dim=(3, 5))),
        (None, x),
    ]:
        block = ResBlock(32, 128, 32, dropout=0.0, resample=resample)
        torch.testing.assert_close(block(x, emb), expected)  # fresh: the residual branch is zero
        torch.nn.init.normal_(block.out_layers[3].weight)
        assert not torch.allclose(block(x, emb), expected)


def test_the_first_half_of_the_embedding_scales() -> None:
    block = ResBlock(32, 128, 32, dropout=0.0).eval()
    torch.nn.init.normal_(block.out_layers[3].weight)
    with torch.no_grad():
        block.emb_layers[1].weight.zero_()
        block.emb_layers[1].bias[:32] = -1  # scale: 1 + -1 leaves the shift alone
        block.emb_layers[1].bias[32:] = 2
    a, b = torch.randn(2, 1, 32, 8, 8)
    emb = torch.zeros(1, 128)
    torch.testing.assert_close(block(a, emb) - a, block(b, emb) - b)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_compilers_way_to_enlarge_is_torchs(layout: torch.memory_format) -> None:
    x = torch.randn(2, 4, 3, 5).contiguous(memory_format=layout).requires_grad_()
    expected = F.interpolate(x, scale_factor=2.0)
    got = doubled(x)
    assert torch.equal(got, expected)
    assert got.is_contiguous(memory_format=layout)
    arriving = torch.randn_like(got)
    gradients = [torch.autograd.grad(enlarged, x, arriving)[0] for enlarged in (got, expected)]
    torch.testing.assert_close(*gradients)


def test_norms_compute_in_float32() -> None:
    """In bf16 a mean of 100 would leave three digits of a deviation of 1; the statistics must not suffer."""
    torch.manual_seed(0)
    x = (100 + torch.randn(4, 32, 16, 16)).bfloat16()
    for norm, value in [(GroupNorm(32), x), (LayerNorm(16), x)]:
        expected = norm(value.float())
        torch.testing.assert_close(norm.bfloat16()(value), expected.bfloat16(), rtol=0, atol=0)


def test_frequencies_are_float32_and_correctly_rounded() -> None:
    """Computed here with float64 alone but for the exponents: no processor's fp32 exponential enters."""
    exponents = [float(torch.tensor(-math.log(10_000)) * i / 96) for i in range(96)]
    expected = torch.tensor([math.exp(exponent) for exponent in exponents], dtype=torch.float32)
    assert torch.equal(frequencies(96, torch.device("cpu")), expected)
    wide = timestep_embedding(torch.tensor([999]), 192, torch.float64)
    assert torch.equal(wide, torch.cat([f(999 * expected.double()) for f in (torch.cos, torch.sin)])[None])
