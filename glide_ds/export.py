"""Consolidated fp32 weights from a ZeRO checkpoint of any phase and world size, verified by reading back."""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import glide_ds
from glide_ds.config import ClipConfig
from glide_ds.model.tensor_files import read_state, sha256, write_sidecar, write_state
from glide_ds.training.checkpoint import LAST, MANIFEST, Committed, committed, verify
from glide_ds.training.phases import PHASES
from glide_ds.types import CheckpointError, GlideConfig, WeightsError

State = dict[str, Tensor]
FORMATS = (".pt", ".safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run directory, phase folder or checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="X.pt or X.safetensors")
    parser.add_argument("--phase", choices=list(PHASES), help="default: the last phase that has a checkpoint")
    parser.add_argument("--split_adapter", action="store_true", help="the CLIP part into X-clip.pt of its own")


def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    checkpoint = find_checkpoint(args.run, args.phase)
    print(f"exporting {checkpoint.path} ({checkpoint.manifest['phase']}, step {checkpoint.step})", flush=True)
    for path, tensors in export(checkpoint, args.out, split_adapter=args.split_adapter).items():
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
    elif (place / LAST).is_symlink():
        found = committed(place)
    else:
        names = [phase] if phase else list(reversed(PHASES))
        found = [c for name in names for c in committed(place / PHASES[name].folder)]
    if not found:
        wanted_phase = f" of phase {phase}" if phase else ""
        raise CheckpointError(
            f"{place} holds no committed checkpoint{wanted_phase}; give a run directory in which training has "
            "saved at least once"
        )
    if problems := verify(found[0]):
        raise CheckpointError(
            f"{found[0].path} is damaged ({problems[0]}), so its weights can't be trusted; export an earlier "
            "one by naming its folder"
        )
    return found[0]


def export(checkpoint: Committed, out: Path, *, split_adapter: bool = False) -> dict[Path, State]:
    """Write the checkpoint's weights, with the JSON beside them, and compare what was written.

    Returns the states by path. Raises WeightsError where the file differs from the checkpoint.
    """
    if out.suffix not in FORMATS:
        raise WeightsError(f"--out {out}: the format follows the ending; use {' or '.join(FORMATS)}")
    state = {name: tensor.float() for name, tensor in checkpoint.model_state().items()}
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
        compare(path, checkpoint)
        write_sidecar(path, about(checkpoint, path, part))
    return parts


def compare(path: Path, checkpoint: Committed) -> None:
    """Read an export back and hold every value against the checkpoint, by DeepSpeed's own way to it.

    Its zero_to_fp32 gathers trained parameters from the optimizer's fp32 partitions, which `export`
    does not read. Raises WeightsError naming the first differing tensors.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):  # it prints a page
        live = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
    written = read_state(path)
    wrong = [
        name for name in written if name not in live or not torch.equal(written[name], live[name].float().cpu())
    ]
    if wrong:
        raise WeightsError(
            f"{path} differs from {checkpoint.path} in {len(wrong)} tensors, first {', '.join(wrong[:3])}: "
            "do not use the file; export again, and check the disk if it happens twice"
        )


def about(checkpoint: Committed, path: Path, part: State) -> dict[str, Any]:
    """The sidecar: architecture, where it came from, what it is."""
    manifest = checkpoint.manifest
    model = manifest["model"] | ({} if any("clip" in name for name in part) else {"clip_dim": None})
    return {
        "model": asdict(GlideConfig(**model)),
        "schedule": manifest["schedule"],
        "clip": manifest["clip"],
        "phase": manifest["phase"],
        "step": checkpoint.step,
        "samples_seen": manifest["samples_seen"],
        "lineage": manifest["lineage"],
        "checkpoint_sha256": checkpoint.fingerprint,
        "sha256": sha256(path),
        "glide_ds": glide_ds.__version__,
    }


def clip_of(about: dict[str, Any]) -> ClipConfig | None:
    """The CLIP encoder that a sidecar or manifest names."""
    return ClipConfig(**about["clip"]) if about.get("clip") else None
