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
from glide_ds.model.tensor_files import State
from glide_ds.training.checkpoint.commit import Committed
from glide_ds.training.faults.ranks import agreed
from glide_ds.training.zero.optimizer import state_dict_to_fp32
from glide_ds.training.zero.stored import COUNTERS, model_state, partitions, read_facts

MOMENTS = ("exp_avg", "exp_avg_sq")


def load_engine(engine: Any, checkpoint: Committed) -> None:
    """Put the engine into the state of a checkpoint that any number of ranks wrote. Collective.

    Parameters, frozen ones, buffers, fp32 masters, moments, learning rate and counters are exact; 8-bit moments are
    quantised anew where another number of ranks moves the cut. Raises WeightsError or CheckpointError, on all ranks
    alike.
    """
    zero = engine.optimizer
    module, ranks, facts = agreed(lambda: _read(checkpoint, engine))
    engine.module.load_state_dict(module)
    totals = [sum(parameter.numel() for parameter in group) for group in zero.bit16_groups]
    own = [len(master) for master in zero.single_partition_of_fp32_groups]
    for i, master in enumerate(zero.single_partition_of_fp32_groups):
        master.data.copy_(own_part([rank[i]["master"] for rank in ranks], totals[i], own[i]))
    zero.optimizer.load_state_dict(
        {"state": _optimizer_state(ranks, totals, own), "param_groups": facts["param_groups"]}
    )
    zero.update_lp_params()
    engine.lr_scheduler.load_state_dict(facts["lr_scheduler"])
    for counter in COUNTERS:
        setattr(engine, counter, facts[counter])


def _read(checkpoint: Committed, engine: Any) -> tuple[State, list[list[State]], dict[str, Any]]:
    """The checkpoint's module, every rank's partitions, and facts, which fit the engine's parameter groups."""
    module = model_state(checkpoint)
    if missing := [name for name in engine.module.state_dict() if name not in module]:
        raise CheckpointError(
            f"{checkpoint.path} was written before the model had {', '.join(missing[:2])}"
            f"{' and more' if len(missing) > 2 else ''}",
            "its phase can't go on from there, for the optimizer knows nothing of them",
            f"glide-ds export {checkpoint.path} --out X.pt, and start the phase in another run.dir with "
            "model.weights=X.pt",
        )
    ranks = partitions(checkpoint)
    held = [sum(len(part["master"]) for part in parts) for parts in zip(*ranks, strict=True)]
    wanted = [sum(parameter.numel() for parameter in group) for group in engine.optimizer.bit16_groups]
    if len(held) != len(wanted) or any(there < total for there, total in zip(held, wanted, strict=True)):
        raise CheckpointError(
            f"{checkpoint.path} holds other parameter groups than this phase trains ({held} values, {wanted} wanted)",
            "it belongs to another configuration",
            "choose another run.dir",
        )
    return module, ranks, read_facts(checkpoint)


def _optimizer_state(
    ranks: Sequence[Sequence[State]], totals: Sequence[int], own: Sequence[int]
) -> dict[int, State]:
    """This rank's optimizer state by group: as it is where as many ranks wrote it, else cut anew, in fp32."""
    if len(ranks) == dist.get_world_size():
        return {
            i: {name: tensor for name, tensor in group.items() if name != "master"}
            for i, group in enumerate(ranks[dist.get_rank()])
        }
    whole = [state_dict_to_fp32({"state": dict(enumerate(rank))})["state"] for rank in ranks]
    return {
        i: {"step": group["step"]}
        | {key: own_part([rank[i][key] for rank in whole], totals[i], own[i]) for key in MOMENTS}
        for i, group in enumerate(ranks[0])
    }


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


def weights(checkpoint: Committed) -> State:
    """Every weight and buffer as exactly as the checkpoint has it: in fp32, also where the module was in bf16."""
    state = model_state(checkpoint)
    if not any(tensor.dtype == torch.bfloat16 for tensor in state.values()):
        return state  # memory-mapped
    return {**state, **dict(trained_weights(checkpoint, masters(checkpoint)))}


def trained_weights(checkpoint: Committed, ranks: Sequence[Sequence[Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every trained parameter, put together from the ranks' parts of each parameter group."""
    state = model_state(checkpoint)
    for i, names in enumerate(read_facts(checkpoint)["groups"]):
        parts, position = [rank[i] for rank in ranks], 0
        total = sum(state[name].numel() for name in names)
        for name in names:
            yield name, stretch(parts, position, state[name].numel(), total).view(state[name].shape)
            position += state[name].numel()


def masters(checkpoint: Committed) -> list[list[Tensor]]:
    """Every rank's part of the fp32 masters of every parameter group, memory-mapped."""
    return [[group["master"] for group in rank] for rank in partitions(checkpoint)]
