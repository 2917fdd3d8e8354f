"""One DeepSpeed engine per phase: built, clipped by role, scheduled, and taken down without a trace.

Touches internals of DeepSpeed 0.19 (pinned in pyproject.toml): how the ZeRO optimizer keeps gradients and weights,
its `dp_process_group`, and the attributes that it hangs on parameters. tests/training/test_engine.py fails where
they change.
"""

from __future__ import annotations

import gc
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from glide_ds.config import BatchArithmetic, Config
from glide_ds.training.speed.meta import weight_bytes
from glide_ds.training.zero.clipping import RoleClipping
from glide_ds.training.zero.elastic import own_part
from glide_ds.training.zero.group import limit_waiting
from glide_ds.training.zero.optimizer import KINDS

ZERO_ATTRIBUTES = (
    "_hp_mapping",
    "_dp_group",
    "_zero_optimizer",
    "grad_accum",
    "_index_in_param_group",
    "param_idx_in_group",
    "get_full_hp_param",
    "get_full_hp_grad",
    "set_full_hp_param",
    "set_full_hp_grad",
    "load_hp_checkpoint_state",
)
# What torch would keep its compiler from, by importing it.
STAYS_OUT = (Optimizer.add_param_group, Optimizer.zero_grad, Optimizer.state_dict, Optimizer.load_state_dict)
ENGINE_HOOKS = ("module_forward_pre_hook", "module_forward_post_hook")


def build_engine(
    model: nn.Module, groups: list[dict[str, Any]], config: Config, arithmetic: BatchArithmetic
) -> Any:
    """Wrap `model` in a DeepSpeed ZeRO-2 engine that trains `groups` (see phases.parameter_groups).

    In bf16 the masters start at the model's fp32 weights, and rank 0 keeps those of the frozen ones, by name, in
    `engine.frozen`, for the module holds what they round to.
    """
    import deepspeed
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    spare_compiler()
    section = config.deepspeed["optimizer"]
    rates = {key: value for key, value in section["params"].items() if key in ("betas", "eps")}
    optimizer = KINDS[section["type"]].make(groups, lr=section["params"]["lr"], **rates)
    ZERO_SUPPORTED_OPTIMIZERS[:] = {*ZERO_SUPPORTED_OPTIMIZERS, type(optimizer)}
    schedule = LambdaLR(optimizer, lambda step: lr_ratio(step, config))
    rounded = weight_bytes(config) == 2
    exact = {parameter: parameter.detach() for parameter in model.parameters()} if rounded else {}
    engine, _, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=deepspeed_config(config, arithmetic)
    )
    limit_waiting(config.run.timeout_s)
    # The parameters are views of what is gathered after a step; DeepSpeed would make each view again, while a
    # GPU has nothing left to do.
    engine.optimizer._update_model_bit16_weights = lambda group: None
    # For those who call loss.backward() themselves, each backward pass would count the parameters in use: 15 ms of
    # Python for the base model.
    engine.optimizer.should_refresh_expected_hook_count = lambda: False
    engine.role_clipping = RoleClipping(engine.optimizer, config)
    if exact:
        start_masters(engine.optimizer, exact)
    engine.frozen = {
        name: exact[parameter].cpu()
        for name, parameter in model.named_parameters()
        if parameter in exact and not parameter.requires_grad and dist.get_rank() == 0
    }
    if dist.get_world_size(engine.optimizer.dp_process_group) == 1:
        keep_gradients(engine.optimizer)
        if weight_bytes(config) == 4:
            share_weights(engine.optimizer)
    return engine


def spare_compiler() -> None:
    """Have torch not import its compiler, 4 s, to keep optimizers out of its graphs: those are of blocks only."""
    for function in STAYS_OUT:
        direct = inspect.unwrap(function)
        vars(direct).setdefault("__dynamo_disable", direct)


def deepspeed_config(config: Config, arithmetic: BatchArithmetic) -> dict[str, Any]:
    """What DeepSpeed is given: its own part, with our arithmetic, and without what we build ourselves."""
    ours = ("optimizer", "scheduler", "gradient_clipping")
    theirs = {key: value for key, value in config.deepspeed.items() if key not in ours}
    added_up = arithmetic.accumulation > 1 and weight_bytes(config) == 2
    return {
        "steps_per_print": 1 << 62,
        # bf16 would lose a small gradient beside a large sum.
        "data_types": {"grad_accum_dtype": "fp32" if added_up else None},
        **theirs,
        "train_batch_size": arithmetic.global_batch,
        "train_micro_batch_size_per_gpu": arithmetic.micro_batch,
        "gradient_accumulation_steps": arithmetic.accumulation,
        "gradient_clipping": 0.0,  # RoleClipping clips
        "checkpoint": {"tag_validation": "Ignore"},  # all ranks name a save by the step, which they count alike
    }


def lr_ratio(step: int, config: Config) -> float:
    """The learning rate of update `step` (0-based) as a fraction of each group's own.

    A linear warm-up from `warmup_min_ratio`, then WarmupCosineLR's half cosine down to `cos_min_ratio`
    at `total_num_steps`, or WarmupLR's constant.
    """
    section = config.deepspeed["scheduler"]
    params = section["params"]
    warmup = params.get("warmup_num_steps", 0)
    if step < warmup:
        low = params.get("warmup_min_ratio", 0.0)
        return low + (1 - low) * (step + 1) / warmup
    if section["type"] == "WarmupLR":
        return 1.0
    total = cosine_end(config)
    low = params.get("cos_min_ratio", 1e-4)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


def cosine_end(config: Config) -> int:
    """The update at which the learning rate is at its lowest."""
    return int(config.deepspeed["scheduler"]["params"].get("total_num_steps", config.train.steps))


def start_masters(zero: Any, exact: Mapping[nn.Parameter, torch.Tensor]) -> None:
    """Put `exact` fp32 weights into the masters of a module in bf16.

    DeepSpeed makes them from the module's weights. Each would start at the middle of what rounds to the same bf16
    number, and none of the weights that the model computes with would change before its master had moved half
    the way to the next one, 30 learning rates and more: half of the base model's progress in 50 steps.
    """
    for master, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
        weights = [exact[parameter].reshape(-1) for parameter in group]
        master.data.copy_(own_part(weights, sum(map(len, weights)), master.numel()))


def keep_gradients(zero: Any) -> None:
    """Let a rank that is alone keep its gradients where backward put them.

    DeepSpeed would copy them into a bucket, divide it by one, reduce it over one rank, and copy them into the
    partition: a third of what it costs over a bare loop. Where each gradient is then just where it belongs, it need
    not be called for each of them either, 20 µs in which the GPU waits for its next kernel.
    """
    zero.contiguous_gradients = False  # no bucket is needed
    if not any(zero._use_compact_grad_partition_buffer(group) for group in range(len(zero.bit16_groups))):
        for hook in zero._grad_acc_hooks:
            hook.remove()
        zero._grad_acc_hooks.clear()
        return

    def keep(parameter: nn.Parameter, group: int) -> None:
        number = zero.get_param_id(parameter)
        owned = zero._get_compact_grad_partition_slice(group, 0, number, parameter.numel())
        owned.add_(zero.get_gradient_for_reduction(parameter).view(-1))  # bf16's add up in fp32
        zero.clear_grad_attribute(parameter)

    zero.reduce_independent_p_g_buckets_and_remove_grads = keep


def share_weights(zero: Any) -> None:
    """Let the fp32 weights of a rank that is alone be their own masters.

    DeepSpeed keeps a copy of them for the optimizer, and copies it back after every step: 4 bytes per parameter and
    a pass over memory, for nothing where one rank has the whole of them in the precision of the masters.
    """
    masters = zero.single_partition_of_fp32_groups
    for master, (weights,) in zip(masters, zero.parallel_partitioned_bit16_groups, strict=True):
        master.data = weights  # to copy a tensor onto itself costs nothing
    zero._link_all_hp_params()  # else what hangs on the parameters would hold the copy


def cut_rates(engine: Any, factor: float) -> None:
    """Multiply every group's learning rate by `factor`, from now on; checkpoints keep the product."""
    schedule = engine.lr_scheduler
    schedule.base_lrs = [rate * factor for rate in schedule.base_lrs]
    for group in schedule.optimizer.param_groups:
        group["lr"] *= factor


def release(engine: Any) -> nn.Module:
    """Take the engine down and give the bare module back, with nothing of DeepSpeed's left on it.

    `destroy()` alone leaks the whole engine: two hooks and the parameters' attributes keep it alive
    (DeepSpeed issue 7204).
    """
    module: nn.Module = engine.module
    engine.destroy()
    for parameter in module.parameters():
        for attribute in ZERO_ATTRIBUTES:
            if hasattr(parameter, attribute):
                delattr(parameter, attribute)
        parameter.grad = None
        parameter.data = parameter.data.clone()  # out of the flat buffer, so that it can be freed
        parameter.requires_grad_(True)
    for hook in ENGINE_HOOKS:
        getattr(engine, hook).remove()
    for holder in (getattr(engine.optimizer, "optimizer", None), engine.optimizer, engine):
        if holder is not None:
            holder.__dict__.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return module
