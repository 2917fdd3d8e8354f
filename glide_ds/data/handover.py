"""How batches get from a worker process to its trainer: by memory that both have, which is handed over once.

torch's DataLoader makes a file of each tensor and sends its descriptor through a socket, which takes both processes
half a millisecond per tensor of any size; the trainer needs that time to launch kernels. Here a worker writes a batch
into one of a few buffers, each of which was sent that way at its first use, and sends the buffer's number.
"""

from __future__ import annotations

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
    buffer: Tensor | None  # uint8 [bytes] of shared memory, where the trainer does not have it yet
    parts: tuple[tuple[str, torch.dtype, torch.Size], ...]  # field, dtype and shape, in the order of the buffer
    captions: tuple[str, ...]


class Sender:
    """A worker's side. `ahead` batches are made before they are asked for, and one more is being read."""

    def __init__(self, ahead: int) -> None:
        self._buffers: list[Tensor | None] = [None] * (ahead + 1)
        self._turn = -1

    def pack(self, batch: Batch) -> Packed:
        found = [(f.name, value) for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)]
        found.sort(key=lambda part: -part[1].itemsize)  # so that each begins at a multiple of its items' size
        pieces = [tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in found]
        size = sum(len(piece) for piece in pieces)
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer = self._buffers[self._turn]
        known = buffer is not None and len(buffer) >= size  # batches differ in how many pictures CLIP reads
        if buffer is None or not known:
            buffer = self._buffers[self._turn] = torch.empty(size, dtype=torch.uint8).share_memory_()
        torch.cat(pieces, out=buffer[:size])
        info = get_worker_info()
        return Packed(
            info.id if info else 0,
            self._turn,
            None if known else buffer,
            tuple((name, tensor.dtype, tensor.shape) for name, tensor in found),
            batch.captions,
        )


class Receiver:
    """The trainer's side."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, int], Tensor] = {}

    def unpack(self, packed: Packed) -> Batch:
        """The batch, in memory of its own: the worker will write into the buffer again."""
        key = packed.worker, packed.number
        if packed.buffer is not None:
            self._buffers[key] = packed.buffer
        sizes = [shape.numel() * dtype.itemsize for _, dtype, shape in packed.parts]
        pieces = zip(packed.parts, self._buffers[key][: sum(sizes)].clone().split(sizes), strict=True)
        tensors = {name: piece.view(dtype).view(shape) for (name, dtype, shape), piece in pieces}
        return Batch(captions=packed.captions, **tensors)
