"""Variance of a batch's loss with stratified and with uniform timesteps, at fixed weights and on the same pictures.

    python benchmarks/stratified.py --parts /tmp/parts.pt --batches 400 --out benchmarks/results/stratified-cpu.json

Batch n of either kind has the same pictures and captions; timesteps and noise are those that training would draw for
update n. The loss of a sample is weighed afterwards, so that all weightings are of the same passes.

`expected_ratio` is of all samples together: their variance over that within the parts of the schedule. Samples are
drawn independently, so the ratio of batches tends to it, and it needs far fewer of them: at timestep 0 the loss is 25
times its mean, and a few samples there decide what some hundred batches show.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from machine import environment
from torch import Tensor

from glide_ds.commands.load import load_model
from glide_ds.data import shapes
from glide_ds.diffusion import create_diffusion
from glide_ds.diffusion.losses import min_snr_weight, v_weight
from glide_ds.diffusion.pixels import to_signed
from glide_ds.tokenizer import encode
from glide_ds.training.objective import draw

T = 1000
RESAMPLES = 2000
POOLED = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--parts", type=Path, required=True, help="losses are kept here: the same command goes on"
    )
    parser.add_argument("--limit_s", type=float, default=500, help="then stop; the same command goes on")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found = measured(args)
    if len(found) < args.batches:
        print(f"{len(found)} of {args.batches} batches; the same command goes on")
        return
    report = {"environment": environment("cpu"), "batches": args.batches, "batch": args.batch}
    report |= {name: compared(found, weight) for name, weight in weights().items()}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


@torch.no_grad()
def measured(args: argparse.Namespace) -> Tensor:
    """(timestep, mse) of every sample, float64 [batches, 2, batch, 2]: of uniform, then of stratified timesteps."""
    done = torch.load(args.parts, weights_only=True) if args.parts.exists() else []
    loaded = load_model(args.model, torch.device("cpu"))
    diffusion = create_diffusion(loaded.schedule)
    side, start = loaded.model.config.image_size, time.monotonic()
    while len(done) < args.batches and time.monotonic() - start < args.limit_s:
        images, captions = pictures(len(done), args.batch, side)
        x0 = to_signed(images)
        tokens, mask = encode(captions, loaded.model.config.text_ctx)
        rows = []
        for strata in (0, args.batch):
            drawn = draw(0, len(done), range(args.batch), side, T, 0.0, "cpu", strata=strata)
            x_t = diffusion.q_sample(x0, drawn.timesteps, drawn.noise)
            output = loaded.model(x_t, drawn.timesteps, tokens=tokens, mask=mask)
            mse = (output[:, :3] - drawn.noise).double().square().flatten(1).mean(1)
            rows.append(torch.stack([drawn.timesteps.double(), mse], 1))
        done.append(torch.stack(rows))
        torch.save(done, args.parts)
    return torch.stack(done)


def pictures(number: int, count: int, side: int) -> tuple[Tensor, list[str]]:
    """Batch `number` of the training set, uint8 [count, side, side, 3]."""
    drawn = [shapes.draw(index, side) for index in range(number * count, (number + 1) * count)]
    return torch.from_numpy(np.stack([picture for picture, _ in drawn])), [caption for _, caption in drawn]


def compared(found: Tensor, weight: Tensor) -> dict[str, float | list[float]]:
    """Means and variances of the batches' losses; the ratio's interval is a bootstrap's over batches."""
    losses = found[..., 1] * weight[found[..., 0].long()]
    batches = losses.mean(2)  # [batches, 2]
    picked = torch.randint(len(batches), (RESAMPLES, len(batches)), generator=torch.Generator().manual_seed(0))
    ratios = batches[picked].var(1)
    ratios = ratios[:, 0] / ratios[:, 1]
    pooled = [float(of_samples(found, losses, generator=None))]
    generator = torch.Generator().manual_seed(0)
    pooled += sorted(float(of_samples(found, losses, generator)) for _ in range(POOLED))
    return {
        "mean_uniform": float(batches[:, 0].mean()),
        "mean_stratified": float(batches[:, 1].mean()),
        "standard_error_of_their_difference": float(
            (batches[:, 1] - batches[:, 0]).std() / len(batches) ** 0.5
        ),
        "variance_ratio": float(batches[:, 0].var() / batches[:, 1].var()),
        "ratio_90_percent": [float(ratios.quantile(share)) for share in (0.05, 0.95)],
        "expected_ratio": pooled[0],
        "expected_90_percent": [pooled[1 + POOLED // 20], pooled[-POOLED // 20]],
    }


def of_samples(found: Tensor, losses: Tensor, generator: torch.Generator | None) -> Tensor:
    """The variance of all samples' losses over that within the parts; of a bootstrap's with a generator."""
    strata = found.shape[2]
    parts, flat = (found[..., 0] * strata / T).long().flatten(), losses.flatten()
    if generator is not None:
        picked = torch.randint(len(flat), (len(flat),), generator=generator)
        parts, flat = parts[picked], flat[picked]
    return flat.var() / torch.stack([flat[parts == part].var() for part in range(strata)]).mean()


def weights() -> dict[str, Tensor]:
    alpha_bar = torch.tensor(create_diffusion("squaredcos_cap_v2").alphas_cumprod)
    return {
        "eps": torch.ones(T, dtype=torch.float64),
        "min-snr": min_snr_weight(alpha_bar, 5.0).double(),
        "v": v_weight(alpha_bar).double(),
    }


if __name__ == "__main__":
    main()
