"""Consolidated fp32 weights from a ZeRO checkpoint of any phase and world size, verified by reading back."""

from __future__ import annotations

import argparse
import ctypes
import mmap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import glide_ds
from glide_ds.config import ClipConfig
from glide_ds.errors import CheckpointError, WeightsError
from glide_ds.model.tensor_files import sha256, write_sidecar, write_state
from glide_ds.training.checkpoint.commit import (
    LAST,
    MANIFEST,
    MODEL_FILE,
    Committed,
    committed,
    unreadable,
    verify,
)
from glide_ds.training.phases import PHASES
from glide_ds.training.zero.elastic import frozen_weights, masters, trained_weights
from glide_ds.training.zero.ema import has_average, read_files
from glide_ds.types import GlideConfig

State = dict[str, Tensor]
FORMATS = (".pt", ".safetensors")
_LIBC = ctypes.CDLL(None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run directory, phase folder or checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="X.pt or X.safetensors")
    parser.add_argument("--phase", choices=list(PHASES), help="default: the last phase that has a checkpoint")
    parser.add_argument("--ema", action="store_true", help="the average of the weights (ema.decay)")
    parser.add_argument("--split_adapter", action="store_true", help="the CLIP part into X-clip.pt of its own")


def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    checkpoint = find_checkpoint(args.run, args.phase)
    print(f"exporting {checkpoint.path} ({checkpoint.manifest['phase']}, step {checkpoint.step})", flush=True)
    written = export(checkpoint, args.out, split_adapter=args.split_adapter, ema=args.ema)
    for path, tensors in written.items():
        values = sum(tensor.numel() for tensor in tensors.values())
        print(f"wrote {path}: {len(tensors)} tensors, {values:,} values, verified against the checkpoint")
    print(f"done in {time.monotonic() - started:.1f} s")


def find_checkpoint(place: Path, phase: str | None = None) -> Committed:
    """The newest committed checkpoint below a run directory or phase folder, or the one in this folder.

    Raises CheckpointError where there is none, or where its files don't match its manifest.
    """
    if (place / MANIFEST).is_file():
        wanted = place.resolve()
        found = [c for c in committed(wanted.parent) if c.path == wanted]
        broken = [path for path in unreadable(wanted.parent) if path == wanted]
    else:
        names = [phase] if phase else list(reversed(PHASES))
        folders = [place] if (place / LAST).is_symlink() else [place / PHASES[name].folder for name in names]
        both = ((committed(folder), unreadable(folder)) for folder in folders)
        found, broken = next(filter(any, both), ([], []))
    if not found and not broken:
        wanted_phase = f" of phase {phase}" if phase else ""
        raise CheckpointError(
            f"{place} holds no committed checkpoint{wanted_phase}; give a run directory in which training has "
            "saved at least once"
        )
    if problems := [f"{MANIFEST} can't be read"] if broken else verify(found[0]):
        raise CheckpointError(
            f"{broken[0] if broken else found[0].path} is damaged ({problems[0]}), so its weights can't be trusted; "
            "export an earlier one by naming its folder"
        )
    return found[0]


def export(
    checkpoint: Committed, out: Path, *, split_adapter: bool = False, ema: bool = False
) -> dict[Path, State]:
    """Write the checkpoint's weights, or their average, with the JSON beside them, and compare what was written.

    Returns the states by path. Raises WeightsError where the file differs from the checkpoint.
    """
    if out.suffix not in FORMATS:
        raise WeightsError(f"--out {out}: the format follows the ending; use {' or '.join(FORMATS)}")
    state = assembled(checkpoint, ema=ema)
    parts = {out: state}
    if split_adapter:
        adapter = {name: tensor for name, tensor in state.items() if "clip" in name}
        parts = {
            out: {name: tensor for name, tensor in state.items() if "clip" not in name},
            out.with_name(f"{out.stem}-clip{out.suffix}"): adapter,
        }
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, part in parts.items():
        write_state(path, part)
        compare(path, checkpoint, ema=ema)
        write_sidecar(path, about(checkpoint, path, part, ema=ema))
    return parts


def assembled(checkpoint: Committed, *, ema: bool = False) -> State:
    """Every weight in fp32: trained ones from the optimizer's masters or, with `ema`, their average; the rest as is.

    Takes no more memory than the result. Raises CheckpointError where there is no average.
    """
    flat = dict(trained(checkpoint, ema=ema))
    state: State = {}
    for name, tensor in {**checkpoint.model_state(), **frozen_weights(checkpoint)}.items():
        state[name] = flat.pop(name) if name in flat else tensor.to(torch.float32, copy=True)
        forget(tensor)
    return state


def trained(checkpoint: Committed, *, ema: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 tensor) of every trained parameter, from the masters or the average."""
    if ema and not has_average(checkpoint):
        raise CheckpointError(
            f"{checkpoint.path} holds no average of the weights: it was trained with ema.decay=0. Export without "
            "--ema"
        )
    ranks = [file["parts"] for file in read_files(checkpoint)] if ema else masters(checkpoint)
    return trained_weights(checkpoint.read(MODEL_FILE), ranks, forget)


def compare(path: Path, checkpoint: Committed, *, ema: bool = False) -> None:
    """Read an export back and hold every value against the checkpoint, one tensor at a time.

    Trained weights are held against the module's own tensors, where `export` took the optimizer's; an average
    has no second source. Raises WeightsError naming the first differing tensors.
    """
    names, read = reader(path)
    averaged = set()
    wrong = []
    if ema:
        for name, tensor in trained(checkpoint, ema=True):
            averaged.add(name)
            if name in names and not torch.equal(read(name), tensor):
                wrong.append(name)
    live = checkpoint.model_state()
    for name in sorted(names - averaged):
        # In bf16 the module holds what the fp32 masters round to.
        if name not in live or not torch.equal(read(name).to(live[name].dtype), live[name]):
            wrong.append(name)
        else:
            forget(live[name])
    if wrong:
        raise WeightsError(
            f"{path} differs from {checkpoint.path} in {len(wrong)} tensors, first {', '.join(wrong[:3])}: "
            "do not use the file; export again, and check the disk if it happens twice"
        )


def reader(path: Path) -> tuple[set[str], Callable[[str], Tensor]]:
    """The names in an export, and how to read one tensor of it into memory."""
    if path.suffix == ".safetensors":
        file = safe_open(path, "pt")
        return set(file.keys()), file.get_tensor
    state: State = torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def read(name: str) -> Tensor:
        copy = state[name].clone()
        forget(state[name])
        return copy

    return set(state), read


def forget(*tensors: Tensor) -> None:
    """Give back the pages of memory-mapped tensors: they come back when read again, but count as memory till then."""
    for tensor in tensors:
        page, start = mmap.PAGESIZE, tensor.data_ptr()
        low, high = -(-start // page) * page, (start + tensor.nbytes) // page * page
        if low < high:
            _LIBC.madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), mmap.MADV_DONTNEED)


def about(checkpoint: Committed, path: Path, part: State, *, ema: bool) -> dict[str, Any]:
    """The sidecar: architecture, where it came from, what it is."""
    manifest = checkpoint.manifest
    model = manifest["model"] | ({} if any("clip" in name for name in part) else {"clip_dim": None})
    return {
        "model": asdict(GlideConfig(**model)),
        "schedule": manifest["schedule"],
        "clip": manifest["clip"],
        "phase": manifest["phase"],
        "step": checkpoint.step,
        "ema": ema,
        "samples_seen": manifest["samples_seen"],
        "lineage": manifest["lineage"],
        "checkpoint_sha256": checkpoint.fingerprint,
        "sha256": sha256(path),
        "glide_ds": glide_ds.__version__,
    }


def clip_of(about: dict[str, Any]) -> ClipConfig | None:
    """The CLIP encoder that a sidecar or manifest names."""
    return ClipConfig(**about["clip"]) if about.get("clip") else None
