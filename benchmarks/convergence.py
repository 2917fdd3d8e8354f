"""AdamW8bit against fp32 AdamW: the loss that each ends at, same seeds, same data, real engine.

    OMP_NUM_THREADS=1 python benchmarks/convergence.py base --out benchmarks/results/convergence-base.json
    OMP_NUM_THREADS=1 python benchmarks/convergence.py phase3 --out benchmarks/results/convergence-phase3.json

base: 2,000 steps of phase base from random weights, a GLIDE of 2.5 M parameters on shapes of 16 px, batch 8.
phase3: the quickstart's phases 1 and 2 once, with fp32 AdamW, then its phase 3 with each optimizer and seed.

The loss is measured on held-out shapes under fixed noise, timesteps even over all T, with CLIP on in phase 3: all
models see the same numbers, so that their ratios resolve far less than the 1 % asked for. The runs are kept below
--work; the same command continues them. So one command per seed and variant, all at once, and then one for all of
them, use a GPU that a single tiny model leaves idle.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import environment

from glide_ds.config import Config, load_config
from glide_ds.data import shapes
from glide_ds.diffusion import create_diffusion
from glide_ds.diffusion.pixels import to_signed
from glide_ds.environment import read_environment
from glide_ds.model.clip import FrozenClip
from glide_ds.model.glide import Glide
from glide_ds.tokenizer import encode
from glide_ds.training.loop import train
from glide_ds.training.setup import phase_run
from glide_ds.training.zero.group import start_process_group

TINY = Path(__file__).parents[1] / "ds_configs" / "tiny"
ARCHITECTURE = {
    "image_size": 16,
    "text_ctx": 12,
    "xf_width": 32,
    "xf_layers": 1,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "attention_ds": [2],
    "num_head_channels": 16,
}
BASE = [
    "train_batch_size=8",
    "train_micro_batch_size_per_gpu=8",
    "optimizer.params.lr=0.001",
    "scheduler.params.warmup_num_steps=100",
    "train.steps=2000",
    "model.weights=random",
    f"model.architecture={json.dumps(ARCHITECTURE)}",
]
QUIET = ["log.samples_every=0", "log.tensorboard=false", "log.every=100", "checkpoint.every=1000"]
# The optimizer, and whether norms and biases are quantised too: what the rule that spares them is worth.
VARIANTS = {
    "AdamW": ("AdamW", False),
    "AdamW8bit": ("AdamW8bit", False),
    "vectors 8-bit too": ("AdamW8bit", True),
}
CHUNK = 64


def configured(name: str, folder: Path, seed: int, optimizer: str, sets: list[str]) -> Config:
    sets = [*QUIET, *sets, f"run.dir={folder}", f"train.seed={seed}", f"optimizer.type={optimizer}"]
    return load_config(TINY / f"{name}.json", None, sets)[0]


def train_variant(
    config: Config, device: torch.device, everything_8bit: bool
) -> tuple[Glide, FrozenClip | None, float]:
    """The trained module, its encoder, and the optimizer's bytes of state per parameter."""
    with phase_run(config, device) as run:
        for group in run.engine.optimizer.param_groups:
            group["quantize"] |= everything_8bit
        train(run)
        state = run.engine.optimizer.optimizer.state
        size = sum(t.nbytes for s in state.values() for t in s.values() if isinstance(t, torch.Tensor))
        count = sum(p.numel() for p in state)
        clip = run.clip
    return run.model, clip, size / count


@torch.no_grad()
def held_out_loss(model: Glide, clip: FrozenClip | None, samples: int, schedule: str) -> float:
    """Mean eps-MSE on shapes that no training set holds, under fixed noise."""
    model.eval()
    diffusion, device = create_diffusion(schedule), next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.linspace(0, diffusion.num_timesteps - 1, samples).long()
    total = 0.0
    for first in range(0, samples, CHUNK):
        t = timesteps[first : first + CHUNK]
        drawn = [shapes.draw(shapes.HELD_OUT + first + i, model.config.image_size) for i in range(len(t))]
        x0 = to_signed(torch.stack([torch.from_numpy(image) for image, _ in drawn]))
        noise = torch.randn(x0.shape, generator=generator)
        captions = [caption for _, caption in drawn]
        tokens, mask = encode(captions, model.config.text_ctx)
        output = model(
            diffusion.q_sample(x0, t, noise).to(device),
            t.to(device),
            tokens=tokens.to(device),
            mask=mask.to(device),
            clip_embedding=clip.encode_text(captions) if clip else None,
        )
        total += float((output[:, :3].cpu() - noise).square().mean((1, 2, 3)).double().sum())
    return total / samples


def compare(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """One row per variant and seed."""
    parents = args.work / "parents"
    if args.suite == "phase3" and not (parents / "phase2" / "LAST").exists():
        for phase in ("phase1", "phase2"):
            with phase_run(configured(phase, parents, 0, "AdamW", []), device) as run:
                train(run)
    rows = []
    for seed in args.seeds:
        for name in args.variants:
            optimizer, everything_8bit = VARIANTS[name]
            folder = args.work / f"{args.suite}-{name.replace(' ', '-')}-{seed}"
            if args.suite == "phase3" and not folder.exists():
                shutil.copytree(parents / "phase2", folder / "phase2", symlinks=True)
            suite = [*BASE, f"train.steps={args.steps}"] if args.suite == "base" else []
            config = configured(args.suite, folder, seed, optimizer, suite)
            model, clip, size = train_variant(config, device, everything_8bit)
            loss = held_out_loss(model, clip, args.samples, config.model.noise_schedule)
            rows.append({"variant": name, "seed": seed, "loss": loss, "state_bytes_per_parameter": size})
            print(f"== {name}, seed {seed}: held-out loss {loss:.6f}, {size:.3f} B/parameter", flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per variant: the mean loss over the seeds and its departure from the first variant's, as fractions of that."""
    losses: dict[str, list[float]] = {}
    for row in rows:
        losses.setdefault(row["variant"], []).append(row["loss"])
    reference = losses[rows[0]["variant"]]
    return {
        name: {
            "mean_loss": statistics.mean(values),
            "departure_of_mean": statistics.mean(values) / statistics.mean(reference) - 1,
            "largest_departure": max((v / r - 1 for v, r in zip(values, reference, strict=True)), key=abs),
            "spread_over_seeds": statistics.stdev(values) / statistics.mean(values) if len(values) > 1 else 0.0,
        }
        for name, values in losses.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("suite", choices=("base", "phase3"))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS)[:2])
    parser.add_argument("--steps", type=int, default=2000, help="of suite base (default 2000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=2048, help="held-out pictures (default 2048)")
    parser.add_argument("--work", type=Path, default=Path("runs/convergence"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    read_environment()
    device = start_process_group(600)
    rows = compare(args, device)
    dist.destroy_process_group()
    found = summary(rows)
    print(f"{'':20}{'mean loss':>12}{'of mean':>10}{'largest':>10}{'seeds':>10}")
    for name, row in found.items():
        print(f"{name:20}{row['mean_loss']:12.6f}" + "".join(f"{v:10.3%}" for v in list(row.values())[1:]))
    if args.out:
        report = {"environment": environment(device.type), "suite": args.suite, "samples": args.samples}
        args.out.write_text(json.dumps({**report, "summary": found, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
