"""Tensors copied to host memory, to be written while training goes on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from glide_ds.files import sha256
from glide_ds.model.tensor_files import State
from glide_ds.training.faults.ranks import attempt


class Snapshot:
    """A copy of tensors in host memory, all but those of `constant`, which nobody writes to.

    The buffers are kept for the next save: page-locked, where the state comes from a GPU.
    """

    def __init__(self, constant: Iterable[Tensor]) -> None:
        self.files: dict[str, State] = {}
        self.failure: str | None = None
        self.buffers: dict[int, Tensor] = {}  # by their order in a save
        self.constant = {tensor.untyped_storage()._cdata for tensor in constant}

    def take(self, files: Mapping[str, State]) -> None:
        """Copy the files' tensors, by file and name. Not collective; an error is told by `failure`."""
        copies: dict[
            tuple[int, torch.dtype], Tensor
        ] = {}  # of storages, by address and the type they are read as
        self.files = {}
        self.failure = attempt(
            lambda: self.files.update(
                {
                    file: {name: self._host(tensor, copies) for name, tensor in state.items()}
                    for file, state in files.items()
                }
            )
        )
        if any(copy.is_pinned() for copy in copies.values()):  # it may arrive later than it is ordered
            torch.cuda.current_stream().synchronize()

    def write(self, target: Path) -> dict[str, dict[str, Any]]:
        """Write the files below `target`, onto the disk. Returns size and hash of each."""
        target.mkdir(exist_ok=True)
        written = {}
        for name, state in self.files.items():
            path = target / name
            try:
                save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
            except SafetensorError as error:
                raise OSError(str(error)) from error
            with path.open("rb") as file:
                os.fsync(file.fileno())
            written[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        return written

    def _host(self, tensor: Tensor, copies: dict[tuple[int, torch.dtype], Tensor]) -> Tensor:
        """ZeRO's parameters are views of one flat buffer: storages are copied, each once."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.constant:
            return tensor
        whole = copies.get((storage._cdata, tensor.dtype))
        if whole is None:
            number, size = len(copies), storage.nbytes()
            buffer = self.buffers.get(number)
            if buffer is None or buffer.numel() != size:
                buffer = torch.empty(size, dtype=torch.uint8, pin_memory=tensor.is_cuda)
                self.buffers[number] = buffer
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            whole = buffer.copy_(source, non_blocking=True).view(tensor.dtype)
            copies[storage._cdata, tensor.dtype] = whole
        return whole.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
