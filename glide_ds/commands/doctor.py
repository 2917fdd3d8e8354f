"""`glide-ds doctor`: one screen of what is installed and what it runs on, to be pasted into a bug report."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from glide_ds import __version__
from glide_ds.config import cache_dir
from glide_ds.masking import masked

PACKAGES = ("torch", "deepspeed", "open_clip_torch", "webdataset", "safetensors", "pydantic", "numpy")
COMMANDS = ("deepspeed", "torchrun", "srun", "nvidia-smi")
# Variables that change what a run does.
VARIABLES = (
    "CUDA_",
    "DS_",
    "GLOO_",
    "GLIDE_",
    "HF_",
    "MASTER_",
    "NCCL_",
    "OMP_",
    "SLURM_JOB",
    "TORCH",
    "XDG_CACHE",
)
WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")
SHOWN = 6  # files of weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: it looks at all there is."""


def run(_: argparse.Namespace) -> None:
    for name, text in rows():
        print(f"{name:<10}{masked(text)}", flush=True)


def rows() -> Iterator[tuple[str, str]]:
    """(name, what is found), a line each."""
    yield "glide_ds", f"{__version__} in {Path(__file__).parents[1]}"
    yield "python", f"{platform.python_version()}, {sys.executable}"
    yield "system", f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores, {_memory()}"
    yield "packages", ", ".join(f"{name} {installed(name)}" for name in PACKAGES)
    yield from _devices()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    yield "commands", ", ".join(f"{name} {shutil.which(name, path=path) or 'not found'}" for name in COMMANDS)
    places = {"here": Path.cwd(), "cache": cache_dir(), "/dev/shm": Path("/dev/shm")}
    yield "disk", "; ".join(f"{name} {_room(place)}" for name, place in places.items())
    yield (
        "weights",
        _found([*cache_dir().glob("*"), *(path for place in _clip_caches() for path in place.rglob("*"))]),
    )
    names = sorted(name for name in os.environ if name.startswith(VARIABLES))
    yield "variables", " ".join(f"{name}={os.environ[name]}" for name in names) or "none that matter"


def installed(package: str) -> str:
    """Its version, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[tuple[str, str]]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of CUDA's that can't be loaded
        yield "gpus", f"unknown: torch can't be imported ({error})"
        return
    built = (
        f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    )
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        yield (
            f"gpu {number}",
            f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}",
        )
    if not torch.cuda.is_available():
        yield "gpus", f"PyTorch sees none; {built}"
        return
    nccl = (
        ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "not there"
    )
    yield "nccl", f"{nccl}; {built}"


def _memory() -> str:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f"{pages * size / 2**30:.0f} GiB of memory"


def _room(place: Path) -> str:
    there = next(path for path in (place, *place.parents) if path.exists())
    writable = "" if os.access(there, os.W_OK) else ", can't be written"
    return f"{place}: {shutil.disk_usage(there).free / 2**30:,.1f} GiB free{writable}"


def _clip_caches() -> Iterator[Path]:
    """Where open_clip keeps what it downloads: the Hugging Face hub's cache, and its own."""
    home = Path(os.path.expanduser("~"))
    hub = Path(os.environ.get("HF_HOME") or home / ".cache" / "huggingface") / "hub"
    yield Path(os.environ.get("HF_HUB_CACHE") or hub)
    yield home / ".cache" / "clip"


def _found(paths: Sequence[Path]) -> str:
    files = sorted(path for path in paths if path.suffix in WEIGHTS and path.exists())
    told = [f"{path} ({path.stat().st_size / 2**20:,.0f} MiB)" for path in files[:SHOWN]]
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return (", ".join(told) or "none downloaded yet") + more
