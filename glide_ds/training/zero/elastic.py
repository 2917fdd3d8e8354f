"""A ZeRO-2 checkpoint loaded by any number of ranks, as many as wrote it or others.

ZeRO lays the parameters of a group end to end, pads the end and cuts the line into one equal part per
rank. Each new rank reads, from the files of the old ones, the stretches that its own part covers.
DeepSpeed's own ways don't serve: the native load executes what a file tells it to and refuses other ranks, and
Universal Checkpoint silently leaves frozen parameters and buffers at their initial values and knows no 8-bit state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from glide_ds.errors import CheckpointError
from glide_ds.training.checkpoint.commit import Committed
from glide_ds.training.faults.ranks import agreed
from glide_ds.training.zero.optimizer import state_dict_to_fp32

MODEL_FILE = "mp_rank_00_model_states.pt"
OPTIMIZER_FILE = "zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"  # in bf16 after a prefix
MOMENTS = ("exp_avg", "exp_avg_sq")


def load_engine(engine: Any, checkpoint: Committed) -> None:
    """Put the engine into the state of a checkpoint that any number of ranks wrote. Collective.

    Parameters, frozen ones, buffers, fp32 masters, moments, learning rate and counters are exact; 8-bit moments are
    quantised anew where another number of ranks moves the cut. Raises WeightsError or CheckpointError, on all ranks
    alike.
    """
    zero = engine.optimizer
    model, parts = agreed(lambda: _read(checkpoint, engine))
    engine.module.load_state_dict(model["module"])
    sizes = [sum(parameter.numel() for parameter in group) for group in zero.bit16_groups]
    for i, (total, master) in enumerate(zip(sizes, zero.single_partition_of_fp32_groups, strict=True)):
        master.data.copy_(
            own_part([part["single_partition_of_fp32_groups"][i] for part in parts], total, len(master))
        )
    own = [len(master) for master in zero.single_partition_of_fp32_groups]
    zero.optimizer.load_state_dict(_base_state([part["base_optimizer_state"] for part in parts], sizes, own))
    zero.update_lp_params()
    engine.lr_scheduler.load_state_dict(model["lr_scheduler"])
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, model[counter])


def _read(checkpoint: Committed, engine: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The checkpoint's module and every rank's optimizer, which fit the engine's parameter groups."""
    model, zero = checkpoint.read(MODEL_FILE), engine.optimizer
    if missing := [name for name in engine.module.state_dict() if name not in model["module"]]:
        raise CheckpointError(
            f"{checkpoint.path} was written before the model had {', '.join(missing[:2])}"
            f"{' and more' if len(missing) > 2 else ''}",
            "its phase can't go on from there, for the optimizer knows nothing of them",
            f"glide-ds export {checkpoint.path} --out X.pt, and start the phase in another run.dir with "
            "model.weights=X.pt",
        )
    parts = [checkpoint.read(name)["optimizer_state_dict"] for name in optimizer_files(checkpoint)]
    held = [
        sum(len(part["single_partition_of_fp32_groups"][i]) for part in parts) for i in range(_groups(parts[0]))
    ]
    wanted = [sum(parameter.numel() for parameter in group) for group in zero.bit16_groups]
    if len(held) != len(wanted) or any(there < total for there, total in zip(held, wanted, strict=True)):
        raise CheckpointError(
            f"{checkpoint.path} holds other parameter groups than this phase trains ({held} values, {wanted} wanted)",
            "it belongs to another configuration",
            "choose another run.dir",
        )
    return model, parts


def _groups(part: dict[str, Any]) -> int:
    return len(part["single_partition_of_fp32_groups"])


def _base_state(bases: Sequence[dict[str, Any]], totals: Sequence[int], own: Sequence[int]) -> dict[str, Any]:
    """This rank's optimizer state: as it is where as many ranks wrote it, else cut anew, in fp32."""
    if len(bases) == dist.get_world_size():
        return dict(bases[dist.get_rank()])
    bases = [state_dict_to_fp32(base) for base in bases]
    state = {
        i: {"step": held["step"]}
        | {key: own_part([base["state"][i][key] for base in bases], totals[i], own[i]) for key in MOMENTS}
        for i, held in bases[0]["state"].items()
    }
    return {"state": state, "param_groups": bases[0]["param_groups"]}


def own_part(parts: Sequence[Tensor], total: int, size: int) -> Tensor:
    """This rank's `size` values of a line of `total`, cut elsewhere into `parts`; zeros beyond its end."""
    return stretch(parts, dist.get_rank() * size, size, total)


def stretch(parts: Sequence[Tensor], start: int, size: int, total: int) -> Tensor:
    """A copy of `size` values from `start` on of a line of `total`, cut into `parts`; zeros beyond its end.

    Only the stretches that overlap are touched: parts may be memory-mapped files.
    """
    own = torch.zeros(size, dtype=parts[0].dtype)
    position = 0
    for part in parts:
        low, high = max(start, position), min(start + size, position + part.numel(), total)
        if low < high:
            own[low - start : high - start] = part[low - position : high - position]
        position += part.numel()
    return own


def model_state(checkpoint: Committed) -> dict[str, Tensor]:
    """The module's state_dict as trained: fp32, or bf16 where the engine keeps a bf16 replica."""
    return dict(checkpoint.read(MODEL_FILE)["module"])


def optimizer_files(checkpoint: Committed) -> list[str]:
    """The names of DeepSpeed's files of optimizer states, by rank."""
    precision = "bf16_" if f"bf16_{OPTIMIZER_FILE.format(rank=0)}" in checkpoint.manifest["files"] else ""
    return [precision + OPTIMIZER_FILE.format(rank=rank) for rank in range(checkpoint.world_size)]


def weights(checkpoint: Committed) -> dict[str, Tensor]:
    """Every weight and buffer as exactly as the checkpoint has it: in fp32, also where the module was in bf16."""
    model = checkpoint.read(MODEL_FILE)
    if not any(tensor.dtype == torch.bfloat16 for tensor in model["module"].values()):
        return dict(model["module"])  # memory-mapped
    trained = dict(trained_weights(model, masters(checkpoint)))
    return {**model["module"], **frozen_weights(checkpoint), **trained}


def frozen_weights(checkpoint: Committed) -> dict[str, Tensor]:
    """The weights that the checkpoint's phase doesn't train, in fp32."""
    return dict(checkpoint.read(MODEL_FILE)["frozen_param_fragments"] or {})


def trained_weights(model: dict[str, Any], ranks: Sequence[Sequence[Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every trained parameter, put together from the ranks' parts of each parameter group.

    `model` is the checkpoint's MODEL_FILE, which has their names and shapes.
    """
    for i, shapes in enumerate(model["param_shapes"]):
        parts, position = [rank[i] for rank in ranks], 0
        total = sum(shape.numel() for shape in shapes.values())
        for name, shape in shapes.items():
            yield name, stretch(parts, position, shape.numel(), total).view(shape)
            position += shape.numel()


def masters(checkpoint: Committed) -> list[list[Tensor]]:
    """Every rank's part of the fp32 masters of every parameter group, memory-mapped."""
    states = (checkpoint.read(name)["optimizer_state_dict"] for name in optimizer_files(checkpoint))
    return [state["single_partition_of_fp32_groups"] for state in states]
