"""The CUDA kernel of AdamW8bit in Triton: one pass over memory, 16 bytes per fp32 parameter instead of 28.

The definition it implements is `optimizer.py`'s; imported, and compiled by Triton, at the first step on a GPU.
"""

import triton
import triton.language as tl


@triton.jit
def decode(index, top: tl.constexpr):  # type: ignore[no-untyped-def]
    z = (index + 1).to(tl.float32).to(tl.int32, bitcast=True)
    level = z & 0x7F800000
    fraction = ((z & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    middle = fraction + (0x7E800000 - level).to(tl.float32, bitcast=True)
    cell = (middle * 0.875 - 0.75).to(tl.int32, bitcast=True) + 3 * (level - ((127 + top) << 23))
    return tl.where(index == 0, 0.0, tl.minimum(cell.to(tl.float32, bitcast=True), 1.0))


@triton.jit
def encode(x, top: tl.constexpr):  # type: ignore[no-untyped-def]
    bits = x.to(tl.int32, bitcast=True)
    depth = ((126 - (bits >> 23)) * 43) >> 7
    unit = (bits + depth * 0x1800000).to(tl.float32, bitcast=True) * (8.0 / 7.0) + (6.0 / 7.0)
    shifted = unit.to(tl.int32, bitcast=True) + ((top - depth) << 23)
    index = shifted.to(tl.float32, bitcast=True).to(tl.int32) - 1
    return tl.where(depth >= top, 0, index)


@triton.jit
def step_kernel(  # type: ignore[no-untyped-def]
    n, p_ptr, g_ptr, avg_ptr, avg_scale_ptr, root_ptr, root_scale_ptr,
    beta1, gain1, beta2, gain2, decay, rate, unbias, eps, rows: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    at = row[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside, row_inside = at < n, row * 256 < n
    g = tl.load(g_ptr + at, mask=inside, other=0.0)
    p = tl.load(p_ptr + at, mask=inside, other=0.0)
    code = tl.load(avg_ptr + at, mask=inside, other=0).to(tl.int32)
    old_avg = tl.load(avg_scale_ptr + row, mask=row_inside, other=0.0)[:, None]
    old_root = tl.load(root_scale_ptr + row, mask=row_inside, other=0.0)[:, None]
    avg = decode(code & 127, 6) * old_avg
    avg = tl.where(code >= 128, -avg, avg) * beta1 + gain1 * g
    root = decode(tl.load(root_ptr + at, mask=inside, other=0).to(tl.int32), 7) * old_root
    root = tl.sqrt_rn(beta2 * (root * root) + gain2 * (g * g))
    tl.store(p_ptr + at, p * decay - rate * avg / (root * unbias + eps), mask=inside)
    # The scale as the largest bit pattern: NaN wins, as in the other implementations.
    avg_bits = avg.to(tl.int32, bitcast=True)
    avg_max = tl.maximum(tl.max(avg_bits & 0x7FFFFFFF, axis=1), 0x800000).to(tl.float32, bitcast=True)
    root_max = tl.max(root.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    root_max = tl.maximum(root_max, 0x800000).to(tl.float32, bitcast=True)
    tl.store(avg_scale_ptr + row, avg_max, mask=row_inside)
    tl.store(root_scale_ptr + row, root_max, mask=row_inside)
    nudge = 1.0000002384185791
    avg_code = encode(tl.abs(avg) * tl.div_rn(nudge, avg_max)[:, None], 6) | ((avg_bits >> 24) & 128)
    root_code = encode(root * tl.div_rn(nudge, root_max)[:, None], 7)
    tl.store(avg_ptr + at, avg_code.to(tl.uint8), mask=inside)
    tl.store(root_ptr + at, root_code.to(tl.uint8), mask=inside)
