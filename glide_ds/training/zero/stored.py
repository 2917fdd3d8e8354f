"""What a checkpoint holds of an engine: tensors in safetensors, all else in the manifest.

    model.safetensors             the module's weights and buffers; the frozen weights in fp32 also where it is in bf16
    optimizer-rank-R.safetensors  of parameter group I, I.master: the rank's part of the fp32 weights, laid end to end;
                                  and what the optimizer keeps of it: I.step, I.exp_avg, ...
    manifest.json, "engine"       the names of each group's parameters in their order, the optimizer's settings, the
                                  schedule, the counters

Checkpoints of before are DeepSpeed's own files, pickles that hold the same.
"""

from __future__ import annotations

import copy
from typing import Any

import torch.distributed as dist

from glide_ds.model.tensor_files import State
from glide_ds.training.checkpoint.commit import Committed

MODEL_FILE = "model.safetensors"
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
# DeepSpeed's.
OLD_MODEL_FILE = "mp_rank_00_model_states.pt"
OLD_OPTIMIZER_FILE = "zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"  # in bf16 after a prefix


def optimizer_file(rank: int) -> str:
    return f"optimizer-rank-{rank}.safetensors"


def files(engine: Any) -> dict[str, State]:
    """This rank's files of a checkpoint, by name: the engine's own tensors, not copied."""
    zero, rank = engine.optimizer, dist.get_rank()
    state = zero.optimizer.state_dict()["state"]
    parts = {
        f"{i}.{name}": tensor
        for i, master in enumerate(zero.single_partition_of_fp32_groups)
        for name, tensor in {"master": master.detach(), **state.get(i, {})}.items()
    }
    module = {MODEL_FILE: {**engine.module.state_dict(), **engine.frozen}} if rank == 0 else {}
    return {**module, optimizer_file(rank): parts}


def facts(engine: Any) -> dict[str, Any]:
    """What the manifest has of the engine, the same on all ranks."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    return {
        "groups": [[names[parameter] for parameter in group] for group in engine.optimizer.bit16_groups],
        "param_groups": engine.optimizer.optimizer.state_dict()["param_groups"],
        "lr_scheduler": copy.deepcopy(engine.lr_scheduler.state_dict()),  # written while training goes on
        **{counter: getattr(engine, counter) for counter in COUNTERS},
    }


def read_facts(checkpoint: Committed) -> dict[str, Any]:
    """The `facts` of the engine that was saved."""
    if "engine" in checkpoint.manifest:
        return dict(checkpoint.manifest["engine"])
    model, optimizer = checkpoint.read(OLD_MODEL_FILE), checkpoint.read(_old_optimizer_files(checkpoint)[0])
    return {
        "groups": [list(shapes) for shapes in model["param_shapes"]],
        "param_groups": optimizer["optimizer_state_dict"]["base_optimizer_state"]["param_groups"],
        **{key: model[key] for key in ("lr_scheduler", *COUNTERS)},
    }


def model_state(checkpoint: Committed) -> State:
    """The module's state_dict as trained, memory-mapped: fp32, or bf16 where the engine computes in it.

    The frozen weights are in fp32 always.
    """
    if OLD_MODEL_FILE not in checkpoint.manifest["files"]:
        return checkpoint.read(MODEL_FILE)
    model = checkpoint.read(OLD_MODEL_FILE)
    return {**model["module"], **(model["frozen_param_fragments"] or {})}


def partitions(checkpoint: Committed) -> list[list[State]]:
    """Of every rank and parameter group: "master", the rank's part of the fp32 weights, and the optimizer's state.

    Memory-mapped. Parts of before may lack the padding at the end of the last ranks' masters.
    """
    if OLD_MODEL_FILE in checkpoint.manifest["files"]:
        old = (checkpoint.read(name)["optimizer_state_dict"] for name in _old_optimizer_files(checkpoint))
        return [
            [
                {"master": master, **state["base_optimizer_state"]["state"].get(i, {})}
                for i, master in enumerate(state["single_partition_of_fp32_groups"])
            ]
            for state in old
        ]
    return [
        by_group(checkpoint.read(optimizer_file(rank)), len(checkpoint.manifest["engine"]["groups"]))
        for rank in range(checkpoint.world_size)
    ]


def by_group(tensors: State, groups: int) -> list[State]:
    """The tensors named I.NAME as those of each group I, by NAME."""
    found: list[State] = [{} for _ in range(groups)]
    for key, tensor in tensors.items():
        number, name = key.split(".")
        found[int(number)][name] = tensor
    return found


def _old_optimizer_files(checkpoint: Committed) -> list[str]:
    """The names of DeepSpeed's files of optimizer states, by rank."""
    precision = "bf16_" if f"bf16_{OLD_OPTIMIZER_FILE.format(rank=0)}" in checkpoint.manifest["files"] else ""
    return [precision + OLD_OPTIMIZER_FILE.format(rank=rank) for rank in range(checkpoint.world_size)]
