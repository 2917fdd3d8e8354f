"""The training step: images per second, operations per second, memory, by option and phase, and what options change.

    OMP_NUM_THREADS=2 python benchmarks/step.py options --out benchmarks/results/step-options-cpu.json
    python benchmarks/step.py batch --size base --micro 16 32 64 --out benchmarks/results/step-batch-h100.json

    options   the plain implementation (yardstick.py), and ours with one option after the other
    phases    phases 1 to 3 at the same batch
    overhead  a bare loop and DeepSpeed's engine around the same model and optimizer
    dials     what is recomputed: train.recompute
    batch     micro-batches, in the precisions that the device has
    parity    the losses of 50 steps, each option's beside the plain implementation's

The variants of a suite take turns, step by step, on the same batch; a ratio is the median over rounds of the ratio
within a round. MFU: the operations that the mathematics takes (products, convolutions, attention; what is
recomputed does not count), by the rate of a matrix product of the same precision measured here just before.

On a CPU freed memory stays with the process, as a GPU's allocator keeps it: glibc would give it back to the system and
fetch it page by page at the next step, which costs most where most is allocated anew (DeepSpeed's flat gradients).
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import profiling
import torch
import torch.distributed as dist
from machine import environment
from yardstick import PlainLoop

from glide_ds.config import Config, load_config
from glide_ds.diffusion import create_diffusion
from glide_ds.environment import read_environment
from glide_ds.model import create_model
from glide_ds.model.clip import FrozenClip
from glide_ds.model.reduced import can_reduce
from glide_ds.training.objective import Objective
from glide_ds.training.phases import parameter_groups
from glide_ds.training.setup import glide_config, open_source
from glide_ds.training.speed.compiling import set_compilation
from glide_ds.training.speed.cuda_graph import capture
from glide_ds.training.speed.flops import step_work
from glide_ds.training.speed.peak import matrix_peak
from glide_ds.training.speed.recompute import set_recomputation
from glide_ds.training.zero.engine import build_engine, release
from glide_ds.training.zero.group import start_process_group
from glide_ds.training.zero.optimizer import AdamW8bit

ROOT = Path(__file__).parents[1]
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"image_size": 16, "model_channels": 32, "channel_mult": [1, 2], "attention_ds": [2], "xf_width": 32,
             "xf_layers": 1, "xf_heads": 2, "text_ctx": 16, "num_head_channels": 16},
    "mid": {"image_size": 64, "model_channels": 96, "num_head_channels": 32, "xf_width": 256, "xf_layers": 8,
            "xf_heads": 8},
    "base": {},
}  # fmt: skip
PHASES = {"phase 1": "adapter_only", "phase 2": "adapter_gates", "phase 3": "full"}
PARITY_STEPS = 50


@dataclass(frozen=True)
class Variant:
    """One way to train."""

    name: str
    phase: str = "full"
    micro: int = 4
    engine: bool = True  # DeepSpeed, else a bare loop
    einsum: bool = False
    optimizer: str = "AdamW8bit"
    precision: str = "fp32"  # fp32 on a CPU, tf32 on a GPU, or bf16
    reduced: bool = False  # TF32 by fp16 kernels
    channels_last: bool = True
    compile: bool = False
    graph: bool = False  # the passes recorded as a CUDA graph
    recompute: str = "none"
    dropout: float = 0.1


def variants(suite: str, micros: list[int], gpu: bool) -> list[Variant]:
    """The variants of a suite, the one that ratios refer to first."""
    precision, micro = "tf32" if gpu else "fp32", micros[0]
    ours = Variant("ours", micro=micro, precision=precision, reduced=gpu, compile=gpu)
    plain = replace(
        ours,
        name="plain eager",
        engine=False,
        einsum=True,
        optimizer="AdamW foreach",
        reduced=False,
        channels_last=False,
        compile=False,
    )
    if suite == "phases":
        phases = [replace(ours, name=name, phase=phase) for name, phase in PHASES.items()]
        return [phases[2], *phases[:2]]
    if suite == "overhead":
        bare = replace(ours, name="bare loop", engine=False, optimizer="AdamW fused", reduced=False)
        return [bare, replace(bare, name="DeepSpeed", engine=True)]
    if suite == "dials":
        return [replace(ours, name=dial, recompute=dial) for dial in ("none", "attention", "blocks")]
    if suite == "batch":
        precisions = ["tf32", "bf16"] if gpu else ["fp32"]
        return [
            replace(ours, name=f"{p}, {m} images", micro=m, precision=p, reduced=p == "tf32")
            for p in precisions
            for m in micros
        ]
    eager = replace(ours, name="ours, eager", reduced=False, compile=False)
    options = [
        plain,
        replace(plain, name="+ fused attention", einsum=False),
        replace(plain, name="+ channels_last", einsum=False, channels_last=True),
        replace(eager, name="+ DeepSpeed, fused AdamW", optimizer="AdamW fused"),
        replace(eager, name="+ AdamW8bit"),
    ]
    if gpu or suite == "parity":
        options.append(replace(eager, name="+ compile", compile=True))
    if gpu:
        options.append(replace(ours, name="+ fp16 kernels"))
        options.append(replace(ours, name="+ CUDA graph", graph=True))
    bf16 = replace(ours, name="+ bf16", precision="bf16", reduced=False)
    options.append(bf16)
    if gpu:
        options.append(replace(bf16, name="+ bf16, CUDA graph", graph=True))
    if suite == "parity":
        options.append(replace(eager, name="blocks recomputed", recompute="blocks"))
        options = [replace(option, dropout=0.0) for option in options]
    return options


class Trainee:
    """A variant, built and ready to take steps."""

    def __init__(self, variant: Variant, size: str, device: torch.device) -> None:
        self.variant, self.device = variant, device
        self.forward: Any = None
        self.before = allocated(device)
        self.config = config = configured(variant, size)
        arithmetic = config.batch_arithmetic(1)
        self.size = size
        torch.manual_seed(0)
        self.model = model = create_model(glide_config(config)).to(device)
        open_gates(model)
        set_recomputation(model, config, arithmetic)
        model.reduce_products(variant.reduced and can_reduce(device))
        groups = parameter_groups(model, config)
        self.engine: Any
        if variant.engine:
            self.engine = build_engine(model, groups, config, arithmetic)
        else:
            if variant.precision == "bf16":
                raise ValueError("a bare loop has no master weights for bf16")
            self.engine = PlainLoop(model, bare_optimizer(variant, groups), 2.0, variant.einsum)
        set_compilation(model, config, variant.micro, device)
        clip = FrozenClip("builtin:tiny", "", device) if config.uses_clip else None
        self.objective = Objective(config, create_diffusion(config.model.noise_schedule), self.engine, clip)
        batch = open_source(config, arithmetic, 0).one(0)
        self.batch = replace(batch, clip=torch.randn(variant.micro, 64).half()).to(device)
        self.engine.train()

    def recorded(self, variant: Variant) -> Trainee:
        """The same model, engine and batch, trained by a graph of its passes."""
        twin = copy.copy(self)
        twin.variant = variant
        twin.config = configured(variant, self.size)
        capture(self.model, twin.config, twin.config.batch_arithmetic(1), self.device)
        twin.forward = self.model.__dict__.pop("forward")
        return twin

    def step(self, number: int) -> torch.Tensor:
        if self.forward is None:
            self.model.__dict__.pop("forward", None)
        else:
            self.model.__dict__["forward"] = self.forward
        losses = self.objective(self.batch, number)
        self.engine.backward(losses.total)
        self.engine.step()
        return losses.mse

    def close(self) -> None:
        if self.variant.engine:
            release(self.engine)


def configured(variant: Variant, size: str) -> Config:
    optimizer = "AdamW8bit" if variant.optimizer == "AdamW8bit" else "AdamW"
    sets = [
        f"train_batch_size={variant.micro}",
        f"train_micro_batch_size_per_gpu={variant.micro}",
        f"optimizer.type={optimizer}",
        "optimizer.params.lr=1e-4",
        "scheduler.params.warmup_num_steps=0",
        "model.preset=base",
        "model.weights=random",
        f"model.architecture={json.dumps({**SIZES[size], 'dropout': variant.dropout})}",
        f"train.phase={variant.phase}",
        f"train.channels_last={json.dumps(variant.channels_last)}",
        f"train.compile={json.dumps(variant.compile)}",
        f"train.cuda_graph={json.dumps(variant.graph)}",
        f"train.recompute={variant.recompute}",
        "train.kl_weight=0",
        "train.weighting=eps",
        "data.workers=0",
    ]
    if variant.precision == "bf16":
        sets.append("bf16.enabled=true")
    return load_config(ROOT / "ds_configs" / "tiny" / "phase3.json", None, sets)[0]


def open_gates(model: Any) -> None:
    """A published model's zeroed layers are long filled, and gates are open: nothing multiplies by zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    model.clip_gate_offset.fill_(10.0)


def bare_optimizer(variant: Variant, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if variant.optimizer == "AdamW8bit":
        return AdamW8bit(groups)
    return torch.optim.AdamW(groups, fused="fused" in variant.optimizer, foreach="foreach" in variant.optimizer)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def timed(action: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure(trainees: list[Trainee], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row per variant, from `rounds` steps of each, taken in turns after two to warm up."""
    peaks, own = {}, []
    for trainee in trainees:
        trainee.step(0)
        trainee.step(1)
        # What it holds between steps, and what a step takes on top; the others' memory is not its own.
        resting = allocated(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        trainee.step(2)
        on_top = torch.cuda.max_memory_allocated(device) - resting if device.type == "cuda" else 0
        own.append(on_top)
    times: list[list[float]] = [[] for _ in trainees]
    turns = list(zip(trainees, times, strict=True))
    for number in range(rounds):
        for trainee, taken in turns if number % 2 else turns[::-1]:  # the machine's speed drifts within a round
            taken.append(timed(lambda t=trainee, n=number: t.step(3 + n), device))
    rows = []
    for trainee, taken, on_top in zip(trainees, times, own, strict=True):
        v = trainee.variant
        if v.precision not in peaks:
            peaks[v.precision] = matrix_peak(device, torch.bfloat16 if v.precision == "bf16" else torch.float32)
        work = step_work(glide_config(trainee.config), trainee.config)
        seconds = statistics.median(taken)
        rate = v.micro * work / seconds
        first = [f / trainees[0].variant.micro for f in times[0]]
        rows.append(
            {
                **asdict(v),
                "ms": seconds * 1e3,
                "images_per_s": v.micro / seconds,
                "tflops": rate / 1e12,
                "peak_tflops": peaks[v.precision] / 1e12,
                "mfu": rate / peaks[v.precision],
                "step_gib": on_top / 2**30,  # of a graph: without what it holds all the time
                "speed_ratio": statistics.median(f / (t / v.micro) for f, t in zip(first, taken, strict=True)),
            }
        )
    return rows


def losses(trainee: Trainee) -> list[float]:
    return [float(trainee.step(number).mean()) for number in range(PARITY_STEPS)]


def parity(chosen: list[Variant], size: str, device: torch.device) -> list[dict[str, Any]]:
    """The losses of every variant's first steps, and how far they stray from the first variant's."""
    rows: list[dict[str, Any]] = []
    for variant in chosen:
        trainee = Trainee(replace(variant, graph=False), size, device)
        found = losses(trainee.recorded(variant) if variant.graph else trainee)
        trainee.close()
        reference = rows[0]["losses"] if rows else found
        departure = max(abs(a / b - 1) for a, b in zip(found, reference, strict=True))
        rows.append({**asdict(variant), "losses": found, "largest_departure": departure})
        print(f"{variant.name:28} last loss {found[-1]:.6f}, largest departure {departure:.2e}", flush=True)
    return rows


def run_variants(chosen: list[Variant], args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        # Other processes may build and compile meanwhile; what is measured, is measured when all have done so, alone.
        lock = stack.enter_context(args.lock.open("w")) if args.lock else None
        if lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
        trainees = []
        for variant in chosen:
            if variant.graph:
                continue
            print(f"building {variant.name}", flush=True)
            trainees.append(Trainee(variant, args.size, device))
            stack.callback(trainees[-1].close)
        if lock:
            for trainee in trainees:
                trainee.step(0)  # searches cuDNN's algorithms
            torch.cuda.empty_cache()  # there are others
            fcntl.flock(lock, fcntl.LOCK_EX)
        rows = measure(trainees, args.rounds, device)
        show(rows)
        if any(variant.graph for variant in chosen):
            plain = {replace(trainee.variant, name="", graph=True): trainee for trainee in trainees}
            trainees += [plain[replace(v, name="")].recorded(v) for v in chosen if v.graph]
            rows = measure(trainees, args.rounds, device)
            show(rows)
        if args.profile:
            for trainee, row in zip(trainees, rows, strict=True):
                step = partial(trainee.step, 0)
                row["profile"] = {"kernels": profiling.kernels(step), "waits": profiling.waits(step)}
                profiling.show(row["profile"])
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("options", "phases", "overhead", "dials", "batch", "parity"))
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--micro", type=int, nargs="+", default=[4], help="images (suite batch: several)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", help="variants by name; the first is what ratios refer to")
    parser.add_argument("--eager", action="store_true", help="compile nothing, on a GPU too")
    parser.add_argument("--profile", action="store_true", help="list the longest kernels of each variant (GPU)")
    parser.add_argument("--lock", type=Path, help="a file that is locked while steps are timed")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    read_environment()
    device = start_process_group(600)
    # For every variant alike: on a GPU each product is TF32 or bf16, on a CPU the switch only makes compiled blocks
    # compile anew.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = device.type == "cuda"
    torch.backends.cudnn.benchmark = True
    chosen = variants(args.suite, args.micro, device.type == "cuda")
    chosen = [v for v in chosen if not args.only or v.name in args.only]
    if args.eager:
        chosen = [replace(v, compile=False) for v in chosen]
    if args.suite == "parity":
        rows = parity(chosen, args.size, device)
    else:
        # Micro-batches of very different size would not fit beside each other.
        together = [[v] for v in chosen] if args.suite == "batch" else [chosen]
        rows = [row for group in together for row in run_variants(group, args, device)]
    dist.destroy_process_group()
    if args.out:
        report = {"environment": environment(device.type), "suite": args.suite, "size": args.size}
        args.out.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")


def show(rows: list[dict[str, Any]]) -> None:
    head = ("ms", "images/s", "x first", "TFLOP/s", "MFU", "GiB")
    print(f"{'':28}" + "".join(f"{name:>10}" for name in head))
    for row in rows:
        print(
            f"{row['name']:28}{row['ms']:10.1f}{row['images_per_s']:10.2f}{row['speed_ratio']:10.3f}"
            f"{row['tflops']:10.3f}{row['mfu']:10.1%}{row['step_gib']:10.2f}",
            flush=True,
        )


KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}  # glibc reads them once, at the start

if __name__ == "__main__":
    if not torch.cuda.is_available() and not KEPT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEPT})
    main()
