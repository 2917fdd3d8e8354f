"""Consolidated fp32 weights from a ZeRO checkpoint of any phase and world size, verified by reading back."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

import glide_ds
from glide_ds.commands.load import ema_length, find_checkpoint, trained
from glide_ds.config.phases import PHASES
from glide_ds.errors import WeightsError
from glide_ds.files import probe, sha256, user_path
from glide_ds.model.tensor_files import State, beside, write_sidecar, write_state
from glide_ds.training.checkpoint.commit import Committed
from glide_ds.training.zero.power import fit
from glide_ds.training.zero.stored import model_state
from glide_ds.types import GlideConfig

FORMATS = (".pt", ".safetensors")
AT_ONCE = 64  # tensors compared before the files are opened anew


class Written(NamedTuple):
    """What one file of an export holds."""

    names: tuple[str, ...]
    values: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=user_path, help="run directory, phase folder or checkpoint folder")
    parser.add_argument("--out", type=user_path, required=True, help="X.pt or X.safetensors")
    parser.add_argument("--phase", choices=list(PHASES), help="default: the last phase that has a checkpoint")
    average = parser.add_mutually_exclusive_group()
    average.add_argument("--ema", action="store_true", help="the average of the weights (ema.decay)")
    average.add_argument(
        "--ema_length",
        type=ema_length,
        metavar="SHARE",
        help="the average over about that share of the training, such as 0.05, put together (ema.snapshot_every)",
    )
    parser.add_argument("--split_adapter", action="store_true", help="the CLIP part into X-clip.pt of its own")


def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    check_out(args.out)
    checkpoint = find_checkpoint(args.run, args.phase)
    print(f"exporting {checkpoint.path} ({checkpoint.manifest['phase']}, step {checkpoint.step})", flush=True)
    if args.ema_length:
        print(
            f"the average of length {args.ema_length:g} is made {fit(checkpoint, args.ema_length)}", flush=True
        )
    ema = args.ema_length or args.ema
    for path, part in export(checkpoint, args.out, split_adapter=args.split_adapter, ema=ema).items():
        print(
            f"wrote {path}: {len(part.names)} tensors, {part.values:,} values, verified against the checkpoint"
        )
    print(
        f'done in {time.monotonic() - started:.1f} s. Next: glide-ds sample {args.out} --prompt "…" --out picture.png, '
        f"or glide-ds evaluate {args.out}"
    )


def check_out(out: Path) -> None:
    """Raises WeightsError before anything is read where that file could not be written."""
    if out.suffix not in FORMATS:
        raise WeightsError(f"--out {out} names no format", remedy=f"end it in {' or '.join(FORMATS)}")
    try:
        probe(out.parent)
    except OSError as error:
        raise WeightsError(
            f"--out {out}: {out.parent} can't be written ({error.strerror})",
            remedy="name another place, or mend its permissions",
        ) from error


def export(
    checkpoint: Committed, out: Path, *, split_adapter: bool = False, ema: bool | float = False
) -> dict[Path, Written]:
    """Write the checkpoint's weights, or their average, with the JSON beside them, and compare what was written.

    Takes twice the weights' memory. Returns what was written by path. Raises WeightsError where a file differs from
    the checkpoint.
    """
    check_out(out)
    written: dict[Path, Written] = {}
    try:
        for path, part in _write(out, assembled(checkpoint, ema=ema), split_adapter):
            written[path] = part
        for path, part in written.items():  # the weights written are gone from memory by now
            compare(path, checkpoint, ema=ema)
            write_sidecar(path, about(checkpoint, path, part.names, ema=ema))
    except WeightsError:
        for path in written:  # beside another's sidecar, or without one, it would pass for what it is not
            for left in (path, beside(path)):
                left.unlink(missing_ok=True)
                print(f"removed {left}, for the export is not whole", flush=True)
        raise
    return written


def _write(out: Path, state: State, split_adapter: bool) -> Iterator[tuple[Path, Written]]:
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
        yield path, Written(tuple(part), sum(tensor.numel() for tensor in part.values()))


def assembled(checkpoint: Committed, *, ema: bool | float = False) -> State:
    """Every weight in fp32: trained ones from the optimizer's masters or, with `ema`, their average; the rest as is.

    Raises CheckpointError where there is no average.
    """
    flat = dict(trained(checkpoint, ema=ema))
    return {
        name: flat[name] if name in flat else tensor.to(torch.float32, copy=True)
        for name, tensor in model_state(checkpoint).items()
    }


def compare(path: Path, checkpoint: Committed, *, ema: bool | float = False) -> None:
    """Read an export back and hold every value against the checkpoint, one tensor at a time.

    Trained weights are held against the module's own tensors, where `export` took the optimizer's; an average
    has no second source. Raises WeightsError naming the first differing tensors.
    """
    names, read = reader(path)
    averaged = set()
    wrong = []
    if ema:
        for name, tensor in trained(checkpoint, ema=ema):
            averaged.add(name)
            if name in names and not torch.equal(read(name), tensor):
                wrong.append(name)
    others = sorted(names - averaged)
    for first in range(0, len(others), AT_ONCE):
        live, (_, read) = (
            model_state(checkpoint),
            reader(path),
        )  # anew, for pages read count as memory till closed
        for name in others[first : first + AT_ONCE]:
            # In bf16 the module holds what the fp32 masters round to.
            if name not in live or not torch.equal(read(name).to(live[name].dtype), live[name]):
                wrong.append(name)
    if wrong:
        raise WeightsError(
            f"{path} differs from {checkpoint.path} in {len(wrong)} tensors, first {', '.join(wrong[:3])}",
            "it must not be used",
            "export again, and check the disk if it happens twice",
        )


def reader(path: Path) -> tuple[set[str], Callable[[str], Tensor]]:
    """The names in an export, and how to read one tensor of it."""
    if path.suffix == ".safetensors":
        file = safe_open(path, "pt")
        return set(file.keys()), file.get_tensor
    state: State = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return set(state), state.__getitem__


def _moved(clip: dict[str, Any] | None, folder: Path) -> dict[str, Any] | None:
    """The encoder, its weights named from the export's folder where they lie in it: so both can be moved together."""
    if clip is None:
        return None
    near = folder.resolve()
    places = {name: user_path(clip[name]).resolve() for name in ("model", "weights")}
    inside = {name: path for name, path in places.items() if path.is_file() and path.is_relative_to(near)}
    return clip | {name: str(path.relative_to(near)) for name, path in inside.items()}


def about(checkpoint: Committed, path: Path, names: tuple[str, ...], *, ema: bool | float) -> dict[str, Any]:
    """The sidecar: architecture, where it came from, what it is."""
    manifest = checkpoint.manifest
    model = manifest["model"] | ({} if any("clip" in name for name in names) else {"clip_dim": None})
    return {
        "model": asdict(GlideConfig(**model)),
        "schedule": manifest["schedule"],
        "clip": _moved(manifest["clip"], path.parent),
        "pictures": manifest.get("pictures", {}),
        "phase": manifest["phase"],
        "step": checkpoint.step,
        "ema": ema,
        "samples_seen": manifest["samples_seen"],
        "lineage": manifest["lineage"],
        "checkpoint_sha256": checkpoint.fingerprint,
        "sha256": sha256(path),
        "glide_ds": glide_ds.__version__,
    }
