"""`glide-ds plan`: what a run will take, before any GPU is: memory, speed, hours, network, loader cores, disk.

Counts are exact: parameters, activations and operations come from the model on the meta device. Rates are
published peaks times a utilisation; a result of benchmarks/step.py on such a device, where one is named, goes first.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from glide_ds.commands.train import add_config_arguments, at_least_one
from glide_ds.config import BatchArithmetic, Config, is_built_in, load_configs
from glide_ds.data.tars.patterns import existing
from glide_ds.errors import ConfigError, DataError, GlideError
from glide_ds.files import user_path
from glide_ds.model.glide import RECOMPUTED, Glide
from glide_ds.progress import duration
from glide_ds.training.preview import describe_batch
from glide_ds.training.run import check_pipeline
from glide_ds.training.setup import glide_config, open_source
from glide_ds.training.speed.fitting import USABLE, fit, host_memory, rank_memory
from glide_ds.training.speed.flops import count_work
from glide_ds.training.speed.memory import checkpoint_bytes, checkpoints_kept, gib, snapshots_left
from glide_ds.training.speed.meta import meta_model, weight_bytes
from glide_ds.training.speed.peak import matrix_peak
from glide_ds.training.speed.recompute import count_activations, recomputed


class Gpu(NamedTuple):
    """One device: the makers' figures, without sparsity."""

    memory_gib: float
    fp32_tflops: float  # without matrix units
    tf32_tflops: float
    bf16_tflops: float
    link_gb_s: float  # one way, to the other devices of its node


GPUS = {
    "h100": Gpu(80, 67, 494, 989, 450),
    "h200": Gpu(141, 67, 494, 989, 450),
    "b200": Gpu(180, 75, 1100, 2250, 900),
    "a100-80": Gpu(80, 19.5, 156, 312, 300),
    "a100-40": Gpu(40, 19.5, 156, 312, 300),
    "l40s": Gpu(48, 92, 183, 362, 32),
    "a6000": Gpu(48, 39, 77, 155, 32),
    "4090": Gpu(24, 83, 82, 165, 32),
    "cpu": Gpu(0, 0, 0, 0, 5),  # this machine: its memory is read and its rate measured
}
MOST_PICTURES = 2**16  # in a micro-batch; the search ends here
WIDTH = 80  # columns of the narrowest terminal that people have
UTILISATION = 0.35  # of the peak, where nothing was measured
LOADER_S = 740e-6  # of a core per picture: read, decode, trim, resize (benchmarks/loader.py)
PICTURE_BYTES = 50_000


@dataclass(frozen=True)
class Plan:
    """One phase on given machines."""

    config: Config
    arithmetic: BatchArithmetic
    gpu: str
    dial: str  # train.recompute, with auto resolved
    limit: float  # usable bytes per GPU
    memory: Mapping[str, Mapping[str, float]]  # by dial, by part
    largest: Mapping[str, int]  # micro-batch that fits, by dial; 0: none
    step_flops: float  # per GPU and update, what is computed again included
    communication: Mapping[str, float]  # bytes per GPU and update, by collective
    compute_s: float  # per update
    network_s: float
    checkpoint: float  # bytes
    snapshots: tuple[int, float]  # averages that checkpoints leave behind: how many, and bytes of each
    rate_source: str

    @property
    def step_s(self) -> float:
        return self.compute_s + self.network_s

    @property
    def images_per_s(self) -> float:
        return self.arithmetic.global_batch / self.step_s

    @property
    def hours(self) -> float:
        return self.config.train.steps * self.step_s / 3600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--nodes", type=at_least_one, default=1)
    parser.add_argument(
        "--gpus", type=at_least_one, help="per node; default: as many as this machine has, or one"
    )
    parser.add_argument("--gpu", choices=GPUS, help="default: what this machine has")
    parser.add_argument("--network", type=float, default=12.5, help="GB/s per GPU between nodes, one way")
    parser.add_argument(
        "--results",
        type=user_path,
        nargs="+",
        default=[],
        help="of benchmarks/step.py on such a device: its rate counts",
    )


def run(args: argparse.Namespace) -> None:
    """Print every phase's plan and the pipeline's sum. Raises GlideError where the configuration is wrong."""
    configs = load_configs(args.ds_config, args.config, args.set)
    check_pipeline(configs)
    gpu, gpus = args.gpu or gpu_here(), args.gpus or max(1, torch.cuda.device_count())
    plans = []
    for config in configs:
        print(f"counting phase {config.train.phase} …", flush=True)
        plans.append(make_plan(config, args.nodes, gpus, gpu, args.network, args.results))
        print("\n".join(describe(plans[-1], args.nodes)), flush=True)
    hours = sum(plan.hours for plan in plans)
    ranks = args.nodes * gpus
    print(
        f"in all    {duration(3600 * hours)}, {hours * ranks:,.0f} GPU-hours on {ranks} x {gpu}\n"
        f"Next, where it will run: glide-ds preflight --ds_config {' '.join(args.ds_config)}"
    )


def gpu_here() -> str:
    """This machine's device by its name in GPUS; the one of most memory that its name fits."""
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name()
    if (found := gpu_named(name, torch.cuda.get_device_properties(0).total_memory)) is None:
        raise ConfigError(
            f"this machine's {name} is none of those whose figures are known ({', '.join(GPUS)})",
            remedy="name the one that comes closest with --gpu",
        )
    return found


def gpu_named(name: str, memory: float) -> str | None:
    """The key in GPUS of a device that calls itself `name` and has so many bytes; None for an unknown one."""
    words = name.lower().replace("rtx", " ").split()
    fitting = [key for key in GPUS if any(word.startswith(key.split("-")[0]) for word in words)]
    return min(fitting, key=lambda key: abs(GPUS[key].memory_gib - memory / 2**30), default=None)


def make_plan(
    config: Config,
    nodes: int,
    gpus: int,
    gpu: str,
    network_gb_s: float = 12.5,
    results: Sequence[Path] = (),
) -> Plan:
    """Plan one phase. Raises ConfigError where the batch can't be split over nodes x gpus ranks."""
    arithmetic = config.batch_arithmetic(nodes * gpus)
    glide = glide_config(config)
    model = meta_model(glide, config)
    work, limit, cpu = count_work(model), usable_bytes(gpu, gpus), gpu == "cpu"
    dial: str = config.train.recompute
    if dial == "auto":
        dial = fit(model, config, arithmetic, limit, cpu=cpu).dial
    dials = dict.fromkeys([*RECOMPUTED, dial])
    memory = {name: rank_memory(model, config, arithmetic, name, cpu=cpu) for name in dials}
    largest = {name: largest_micro_batch(model, config, arithmetic, name, gpu, limit) for name in dials}
    rate, source = rate_of(config, gpu, results)
    again = sum(
        work.blocks[block] for block in recomputed(count_activations(model, cpu=cpu), config, arithmetic, dial)
    )
    if config.train.kl_weight > 0:
        again += work.forward // config.train.kl_every  # the pass without CLIP
    flops = float(work.step + again) * arithmetic.micro_batch * arithmetic.accumulation
    traffic = communication(model, config, arithmetic)
    link = GPUS[gpu].link_gb_s if nodes == 1 else network_gb_s
    return Plan(
        config,
        arithmetic,
        gpu,
        dial,
        limit,
        memory,
        largest,
        flops,
        traffic,
        flops / rate,
        sum(traffic.values()) / link / 1e9,
        checkpoint_bytes(model, config),
        snapshots_left(model, config),
        source,
    )


def largest_micro_batch(
    model: Glide,
    config: Config,
    arithmetic: BatchArithmetic,
    dial: str,
    gpu: str,
    limit: float,
) -> int:
    """The largest micro-batch that fits, whatever the global batch; 0 where not even one picture does."""

    def fits(micro: int) -> bool:
        tried = arithmetic._replace(micro_batch=micro)
        return sum(rank_memory(model, config, tried, dial, cpu=gpu == "cpu").values()) <= limit

    most = 1
    while fits(most) and most < MOST_PICTURES:
        most *= 2
    return bisect_left(range(1, most + 1), True, key=lambda micro: not fits(micro))


def usable_bytes(gpu: str, gpus: int) -> float:
    """What one GPU has for a run; of this machine's free memory, one rank's part."""
    if gpu != "cpu":
        return USABLE * GPUS[gpu].memory_gib * 2**30
    return USABLE * host_memory() / gpus


def communication(model: Any, config: Config, arithmetic: BatchArithmetic) -> dict[str, float]:
    """Bytes that one GPU sends per update under ZeRO-2 (Rajbhandari et al. 2020, section 7.1).

    Gradients are reduced in every micro-batch, weights gathered once per update: 2·Ψ without accumulation.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    once = weight_bytes(config) * trained * (arithmetic.world_size - 1) / arithmetic.world_size
    return {"gradients": once * arithmetic.accumulation, "weights": once}


def rate_of(config: Config, gpu: str, results: Sequence[Path]) -> tuple[float, str]:
    """Operations per second of one GPU in training, and where the figure comes from."""
    bf16 = weight_bytes(config) == 2
    measured = list(_measured(gpu, _measured_as(config, gpu), results))
    if measured:
        rate, path = max(measured)
        return rate, f"{rate / 1e12:,.3g} TFLOP/s, as {path} measured"
    device = GPUS[gpu]
    unit = "bf16" if bf16 else "fp32" if config.train.precision == "fp32" else "TF32"
    rates = {"bf16": device.bf16_tflops, "fp32": device.fp32_tflops, "TF32": device.tf32_tflops}
    peak = rates[unit] * 1e12
    name = f"{unit} peak of {rates[unit]:g} TFLOP/s"
    if gpu == "cpu":
        peak = matrix_peak(torch.device("cpu"), torch.bfloat16 if bf16 else torch.float32)
        name = f"{'bf16' if bf16 else 'fp32'} matrix rate measured here, {peak / 1e9:.0f} GFLOP/s"
    return peak * UTILISATION, f"{UTILISATION:.0%} of the {name}, assumed: run benchmarks/step.py there"


def _measured(gpu: str, precision: str, paths: Sequence[Path]) -> Iterator[tuple[float, Path]]:
    """(operations per second, file) of full training under DeepSpeed on such a device, by benchmarks/step.py."""
    for path in paths:
        try:
            report = json.loads(path.read_text())
            if report["suite"] == "parity":
                continue
            device = report["environment"]["device"].lower()
            rates = [
                row["tflops"] * 1e12
                for row in report["rows"]
                if row["engine"] and row["phase"] == "full" and _precision(row) == precision
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"--results {path} is no result of benchmarks/step.py ({error!r})", remedy="give another"
            ) from error
        if all(word in device for word in gpu.split("-")):
            yield from ((rate, path) for rate in rates)


def _precision(row: Mapping[str, Any]) -> str:
    return str(row["precision"]) + ("-fp16-kernels" if row.get("reduced") else "")


def _measured_as(config: Config, gpu: str) -> str:
    """How benchmarks/step.py calls the precision that the run has there."""
    if weight_bytes(config) == 2:
        return "bf16"
    return "fp32" if gpu == "cpu" else config.train.precision


# ---- what a person sees


def describe(plan: Plan, nodes: int) -> list[str]:
    """The plan of one phase, a page of plain text."""
    config, arithmetic = plan.config, plan.arithmetic
    dial, gpus = plan.dial, arithmetic.world_size // nodes
    lines = [
        f"── glide_ds plan: phase {config.train.phase} on {nodes} x {gpus} {plan.gpu} ".ljust(WIDTH, "─"),
        f"batch     {describe_batch(config, arithmetic)}",
        f"memory    GiB per GPU of {plan.limit / 2**30:.1f} usable",
        *_memory_table(plan, dial),
        f"speed     {plan.step_flops / 1e12:,.1f} TFLOP per GPU and step at {plan.rate_source}: "
        f"{plan.compute_s:.3g} s computing + {plan.network_s:.3g} s communicating (not overlapped), "
        f"{plan.images_per_s:,.1f} images/s",
        "network   per GPU and step: "
        + ", ".join(f"{name} {gib(size)}" for name, size in plan.communication.items()),
        f"time      {config.train.steps:,} steps: {duration(3600 * plan.hours)}, "
        f"{plan.hours * arithmetic.world_size:,.0f} GPU-hours",
        f"loader    {plan.images_per_s / nodes * LOADER_S:.1f} cores per node decode that fast; "
        f"data.workers={config.data.workers} gives {config.data.workers * gpus} processes",
        f"data      {_data(plan)}",
        f"disk      {checkpoints_kept(config)} x {gib(plan.checkpoint)} of checkpoints at most, "
        f"written every {duration(config.checkpoint.every * plan.step_s)}"
        + (f"; {plan.snapshots[0]} x {gib(plan.snapshots[1])} of averages" if plan.snapshots[0] else ""),
    ]
    if not plan.largest[dial]:
        lines.append(f"!!        no picture fits with train.recompute as it is ({dial})")
    return [part for line in lines for part in fitted_to(line)]


def fitted_to(line: str) -> list[str]:
    """A line in as many as a terminal of 80 columns needs; what goes on stands below the text, not the label."""
    if len(line) <= WIDTH:
        return [line]
    wrapper = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * 10)
    wrapper.break_long_words = wrapper.break_on_hyphens = False  # names of files stay in one piece
    return wrapper.wrap(line)


def _memory_table(plan: Plan, chosen: str) -> Iterator[str]:
    """A column for each of train.recompute, a line for each part."""
    dials = list(plan.memory)
    sizes = {part: [plan.memory[dial][part] for dial in dials] for part in plan.memory[chosen]}
    sizes["in all"] = [sum(memory.values()) for memory in plan.memory.values()]
    cells = {part: [f"{size / 2**30:.2f}" for size in row] for part, row in sizes.items()}
    cells["micro-batch at most"] = [str(plan.largest[dial] or "none") for dial in dials]
    heads = [f"→ {dial}" if dial == chosen else dial for dial in dials]
    for part, row in {"train.recompute =": heads, **cells}.items():
        yield f"{'':10}{part:<20}" + "".join(f"{cell:>12}" for cell in row)


def _data(plan: Plan) -> str:
    config, arithmetic = plan.config, plan.arithmetic
    wanted = config.train.steps * arithmetic.global_batch
    text = f"{wanted:,} pictures in all"
    try:
        facts = open_source(config, arithmetic, 0).facts()
    except GlideError as error:
        sets = [part.shards for part in config.data.mix_parts]
        here = any(is_built_in(shards) or existing(shards)[0] for shards in sets)
        if isinstance(error, DataError) and here:
            raise  # they are here, and the run would end with this
        return (
            f"{text}, some {wanted * PICTURE_BYTES / 1e12:.2f} TB to read; the shards can't be opened here "
            f"({error.faults[0].fact})"
        )
    if facts["samples"] is None:
        return f"{text}, of {facts['shards']:,} streams; how many samples they hold shows as they are read"
    return f"{text}: {wanted / facts['samples']:.2f} epochs of {facts['samples']:,}"
