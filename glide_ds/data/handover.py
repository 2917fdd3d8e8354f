"""How batches get from a worker process to its trainer: by memory that both have, which is handed over once.

torch's DataLoader makes a file of each tensor and sends its descriptor through a socket, which takes both processes
half a millisecond per tensor of any size; the trainer needs that time to launch kernels. Here a worker writes a batch
into one of a few buffers, each of which was sent that way at its first use, and sends the buffer's number.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from glide_ds.types import Batch


class Packed(NamedTuple):
    """A batch on its way. Its tensors lie end to end in a buffer of its worker."""

    worker: int
    number: int  # of the buffer
    buffer: Tensor | str | None  # uint8 [bytes] of shared memory, or a file's name; None: the trainer has it
    parts: tuple[tuple[str, torch.dtype, torch.Size], ...]  # field, dtype and shape, in the order of the buffer
    captions: tuple[str, ...]


def _file_buffer(size: int) -> tuple[Tensor, str]:
    """uint8 [size] of a new file without a name, and where another process finds it. Raises OSError without room."""
    handle, name = tempfile.mkstemp(prefix="glide_ds-batch-")
    os.unlink(name)  # it goes with the last process that has it
    os.posix_fallocate(handle, 0, size)  # else a write without room would end the process
    name = f"/proc/{os.getpid()}/fd/{handle}"
    return torch.from_file(name, shared=True, size=size, dtype=torch.uint8), name


class Sender:
    """A worker's side. `ahead` batches are made before they are asked for, and one more is being read."""

    def __init__(self, ahead: int) -> None:
        self._buffers: list[Tensor | None] = [None] * (ahead + 1)
        self._turn = -1
        self._by_files = False

    def pack(self, batch: Batch) -> Packed:
        found = [(f.name, value) for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)]
        found.sort(key=lambda part: -part[1].itemsize)  # so that each begins at a multiple of its items' size
        pieces = [tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in found]
        size = sum(len(piece) for piece in pieces)
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer, name = self._buffers[self._turn], None
        known = buffer is not None and len(buffer) >= size  # batches differ in how many pictures CLIP reads
        if buffer is None or not known:
            buffer, name = self._new_buffer(size)
            self._buffers[self._turn] = buffer
        torch.cat(pieces, out=buffer[:size])
        info = get_worker_info()
        return Packed(
            info.id if info else 0,
            self._turn,
            None if known else name or buffer,
            tuple((name, tensor.dtype, tensor.shape) for name, tensor in found),
            batch.captions,
        )

    def _new_buffer(self, size: int) -> tuple[Tensor, str | None]:
        """uint8 [size] that the trainer can have too, and the file that it is, where it is one."""
        if not self._by_files:
            try:
                return torch.empty(size, dtype=torch.uint8).share_memory_(), None
            except RuntimeError as error:
                if "shared memory" not in str(error):
                    raise
                info = get_worker_info()
                told = f"!! shared memory (/dev/shm) has no room for a batch of {size:,} bytes"
                if info is None or info.id == 0:
                    print(f"{told}: files in {tempfile.gettempdir()} take its place", flush=True)
                self._by_files = True
        return _file_buffer(size)


class Receiver:
    """The trainer's side."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, int], Tensor] = {}

    def unpack(self, packed: Packed) -> Batch:
        """The batch, in memory of its own: the worker will write into the buffer again."""
        key = packed.worker, packed.number
        if isinstance(packed.buffer, str):
            size = os.path.getsize(packed.buffer)
            self._buffers[key] = torch.from_file(packed.buffer, shared=True, size=size, dtype=torch.uint8)
        elif packed.buffer is not None:
            self._buffers[key] = packed.buffer
        sizes = [shape.numel() * dtype.itemsize for _, dtype, shape in packed.parts]
        pieces = zip(packed.parts, self._buffers[key][: sum(sizes)].clone().split(sizes), strict=True)
        tensors = {name: piece.view(dtype).view(shape) for (name, dtype, shape), piece in pieces}
        return Batch(captions=packed.captions, **tensors)
