"""The engine's state copied to host memory, to be written while training goes on."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glide_ds.files import sha256
from glide_ds.training.faults.ranks import attempt

Copies = dict[tuple[int, torch.dtype], Tensor]  # of storages, by address and the type they are read as


class Snapshot:
    """A copy of the engine's state in host memory. Takes the place of DeepSpeed's checkpoint engine meanwhile.

    The buffers are kept for the next save: page-locked, where the state comes from a GPU.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.files: dict[str, Any] = {}
        self.failure: str | None = None
        self.buffers: dict[tuple[str, int], Tensor] = {}
        self.constant: set[int] = set()  # storages that need no copy
        self.from_gpu = False  # some of the copies arrive later than they are ordered
        spare_saving(engine)

    def take(self, folder: Path, tag: str, files: Mapping[str, Any]) -> None:
        """Copy what DeepSpeed saves of the engine on this rank, and `files`. Collective."""
        engine = self.engine
        self.files, self.failure = {}, None
        self.constant = {tensor.untyped_storage()._cdata for tensor in engine.frozen.values()}
        theirs, engine.checkpoint_engine = engine.checkpoint_engine, self
        try:
            engine.save_checkpoint(str(folder), tag=tag, client_state={}, save_latest=False)
        finally:
            engine.checkpoint_engine = theirs
        for name, state in files.items():
            self.save(state, name)
        if self.from_gpu:
            torch.cuda.current_stream().synchronize()

    def write(self, target: Path) -> dict[str, dict[str, Any]]:
        """Write the files below `target`, onto the disk. Returns size and hash of each."""
        target.mkdir(exist_ok=True)
        written = {}
        for name, state in self.files.items():
            path = target / name
            torch.save(state, path)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            written[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        return written

    # What DeepSpeed calls on a checkpoint engine.

    def save(self, state_dict: Mapping[str, Any], path: str) -> None:
        name = Path(path).name
        copies: Copies = {}
        # An error here would leave the other ranks waiting in DeepSpeed's barrier: it is told by the thread.
        self.failure = self.failure or attempt(
            lambda: self.files.update({name: self._copied(state_dict, name, copies)})
        )

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: the thread makes the folder."""

    def create(self, info: Any) -> None:
        """Nothing to prepare."""

    def commit(self, info: Any) -> bool:
        return True  # rank 0's thread commits

    def is_decoupled(self) -> bool:
        return False

    def _copied(self, value: Any, name: str, copies: Copies) -> Any:
        """`value` with new containers, and every tensor a view of a host copy of its storage."""
        if isinstance(value, Tensor):
            return self._host(value, name, copies)
        if isinstance(value, dict):
            twin = copy.copy(value)  # an OrderedDict of a module carries its versions along
            for key, inner in value.items():
                twin[key] = self._copied(inner, name, copies)
            return twin
        if type(value) in (list, tuple):
            return type(value)(self._copied(inner, name, copies) for inner in value)
        return value

    def _host(self, tensor: Tensor, name: str, copies: Copies) -> Tensor:
        """ZeRO's parameters are views of one flat buffer: storages are copied, each once."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.constant:
            return tensor
        whole = copies.get((storage._cdata, tensor.dtype))
        if whole is None:
            key, size, pinned = (name, len(copies)), storage.nbytes(), tensor.is_cuda
            buffer = self.buffers.get(key)
            if buffer is None or buffer.numel() != size:
                buffer = self.buffers[key] = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
            self.from_gpu |= tensor.is_cuda
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            whole = buffer.copy_(source, non_blocking=True).view(tensor.dtype)
            copies[storage._cdata, tensor.dtype] = whole
        return whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def spare_saving(engine: Any) -> None:
    """Keep DeepSpeed from work that a save has no use for, and have frozen weights saved in fp32 (engine.frozen).

    It would copy its own export script into every checkpoint while training waits, and list the module's names and
    shapes anew: a third of the stall of a small model's save.
    """
    engine._copy_recovery_script = lambda folder: None
    for name in ("_get_buffer_names", "_get_zero_param_shapes", "_get_shared_params"):
        if hasattr(engine, name):
            setattr(engine, name, functools.cache(getattr(engine, name)))
    if hasattr(engine, "_get_zero_frozen_param_attributes"):
        frozen = engine._get_zero_frozen_param_attributes(lambda parameter: parameter)
        engine._get_zero_frozen_param_attributes = lambda attribute: {
            name: attribute(engine.frozen.get(name, parameter)) for name, parameter in frozen.items()
        }
