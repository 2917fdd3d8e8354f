"""All that a rank of launch/train.py imports on its way, for processes that fork ranks: 8 s once instead of in each."""
# ruff: noqa: F401

from __future__ import annotations

import gc

import deepspeed
import deepspeed.module_inject.auto_ep_layer
import deepspeed.ops.op_builder.all_ops
import deepspeed.runtime.zero.muon.muon_optimizer
import open_clip
import torch._dynamo  # to count activations that nobody has counted before

gc.collect()
gc.freeze()  # collecting garbage would walk all this in every rank, and copy its memory
