"""The CPU kernel of AdamW8bit: C, built once with the machine's compiler and called through ctypes.

The definition it implements is `optimizer.py`'s; nothing here is imported unless a CPU tensor is stepped.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Plain loops over one block that the compiler turns into vector code; integer comparison of
# non-negative floats finds the largest, lets NaN win and needs no -ffast-math.
_SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
#define BLOCK 256
#define EXP (1 << 23)
#define INLINE static inline __attribute__((always_inline))

INLINE int32_t bits(float x) { int32_t i; memcpy(&i, &x, 4); return i; }
INLINE float real(int32_t i) { float x; memcpy(&x, &i, 4); return x; }

INLINE int encode(float x, int top) {
  int32_t u = bits(x);
  int depth = ((126 - (u >> 23)) * 43) >> 7;
  float unit = real(u + depth * (3 * EXP)) * (8.f / 7) + (6.f / 7);
  int index = (int)real(bits(unit) + (top - depth) * EXP) - 1;
  return depth >= top ? 0 : index;
}

/* index + 1 = 2^level + cell, so its float holds the level in the exponent and the cell in the fraction */
INLINE float decode(int index, int top) {
  int32_t z = bits((float)(index + 1)), level = z & (255 * EXP);
  float middle = real((z & (EXP - 1)) | 127 * EXP) + real(253 * EXP - level);
  float x = real(bits(middle * (7.f / 8) - (6.f / 8)) + 3 * (level - (127 + top) * EXP));
  x = x < 1.f ? x : 1.f;
  return index == 0 ? 0.f : x;
}

INLINE void block(int n, float *__restrict__ p, const float *__restrict__ g,
                  uint8_t *__restrict__ avg, float *__restrict__ avg_scale,
                  uint8_t *__restrict__ root, float *__restrict__ root_scale, const float *__restrict__ c) {
  float m[BLOCK], s[BLOCK];
  float beta1 = c[0], gain1 = c[1], beta2 = c[2], gain2 = c[3], decay = c[4], rate = c[5], unbias = c[6];
  float eps = c[7], old_avg = *avg_scale, old_root = *root_scale;
  int32_t m_max = EXP, s_max = EXP;
  for (int i = 0; i < n; i++) {
    float mag = decode(avg[i] & 127, 6) * old_avg, r = decode(root[i], 7) * old_root;
    float mi = real(bits(mag) | (avg[i] & 128) << 24) * beta1 + gain1 * g[i];
    float si = sqrtf(beta2 * (r * r) + gain2 * (g[i] * g[i]));
    p[i] = p[i] * decay - rate * mi / (si * unbias + eps);
    m[i] = mi;
    s[i] = si;
    int32_t m_bits = bits(mi) & 0x7fffffff, s_bits = bits(si) & 0x7fffffff;
    m_max = m_bits > m_max ? m_bits : m_max;
    s_max = s_bits > s_max ? s_bits : s_max;
  }
  *avg_scale = real(m_max);
  *root_scale = real(s_max);
  float m_inv = (1 + 0x1p-22f) / real(m_max), s_inv = (1 + 0x1p-22f) / real(s_max);
  for (int i = 0; i < n; i++) avg[i] = (uint8_t)(encode(fabsf(m[i]) * m_inv, 6) | ((bits(m[i]) >> 24) & 128));
  for (int i = 0; i < n; i++) root[i] = (uint8_t)encode(s[i] * s_inv, 7);
}

void adamw8bit(int64_t n, float *p, const float *g, uint8_t *avg, float *avg_scale, uint8_t *root,
               float *root_scale, const float *c, int threads) {
  int64_t whole = n / BLOCK, rest = n % BLOCK;
  #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t b = 0; b < whole; b++) {
    int64_t o = b * BLOCK;
    block(BLOCK, p + o, g + o, avg + o, avg_scale + b, root + o, root_scale + b, c);
  }
  if (rest) {
    int64_t o = whole * BLOCK;
    block(rest, p + o, g + o, avg + o, avg_scale + whole, root + o, root_scale + whole, c);
  }
}
"""


def _build(compiler: str) -> Path:
    """Compile the C kernel, or find the one built before by this compiler for this processor."""
    flags = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
    if platform.machine() == "x86_64":
        flags.append("-mprefer-vector-width=512")
    # Unlike machines can share a home directory; the predefined macros name compiler and instruction set.
    probe = subprocess.run(
        [compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull], capture_output=True, check=True
    )
    key = hashlib.sha256(b"\0".join([_SOURCE.encode(), " ".join(flags).encode(), probe.stdout])).hexdigest()
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"glide_ds_adamw8bit_{key[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as build:
            source, target = Path(build, "kernel.c"), Path(build, "kernel.so")
            source.write_text(_SOURCE)
            subprocess.run([compiler, *flags, source, "-o", target, "-lm"], capture_output=True, check=True)
            os.replace(target, library)  # atomic: ranks may build at the same time
    return library


@functools.cache
def load() -> Callable[[Sequence[Tensor], Sequence[float]], None] | None:
    """The compiled kernel, or None, with a warning, on a machine that cannot build it.

    It takes the contiguous tensors (parameter, gradient, the four of `Moments`) and the eight `Coefficients`.
    """
    compiler = next((c for c in (os.environ.get("CC"), "cc", "gcc") if c and shutil.which(c)), None)
    try:
        if compiler is None:
            raise FileNotFoundError("no C compiler on the PATH")
        function = ctypes.CDLL(str(_build(compiler))).adamw8bit
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr.decode() if isinstance(error, subprocess.CalledProcessError) else error
        log.warning(
            "AdamW8bit's CPU kernel cannot be built (%s): its steps run as torch operations, the same result "
            "in some twenty times the time; install gcc or clang with OpenMP, or name a compiler in CC",
            detail,
        )
        return None
    function.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * 7, ctypes.c_int]
    function.restype = None

    def kernel(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> None:
        scalars = (ctypes.c_float * len(coefficients))(*coefficients)
        addresses = [t.data_ptr() for t in tensors]
        function(tensors[0].numel(), *addresses, scalars, torch.get_num_threads())

    return kernel
