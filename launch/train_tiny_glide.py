"""Train the tiny GLIDE that ships with the package, from nothing, on the built-in shapes.

    python launch/train_tiny_glide.py --steps 4000 --out glide_ds/tiny/glide.safetensors

About an hour on two CPU cores; the same command goes on where a stopped one was. The trainer proper
(launch/train.py) fine-tunes; this plain loop in bf16 makes the start that it needs on a machine with
nothing prepared. It ends by drawing held-out captions and grading them.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glide_ds.commands.load import user_path
from glide_ds.config import PRESETS
from glide_ds.data import judge, shapes
from glide_ds.diffusion import Diffusion, create_diffusion, sample
from glide_ds.diffusion.pixels import to_bytes
from glide_ds.files import replacing
from glide_ds.model import create_model
from glide_ds.model.glide import Glide
from glide_ds.model.tensor_files import pack_rows, read_state, write_state
from glide_ds.progress import Progress
from glide_ds.tokenizer import encode

EMBEDDING = "token_embedding.weight"
BATCH = 32
RATE = 1e-3
WARMUP = 100  # steps
COOLDOWN = 0.25  # share of the steps over which the learning rate falls to zero
EMA_DECAY = 0.999
DROP_CAPTION = 0.12
VB_WEIGHT = 0.001  # times T, as Improved DDPM's hybrid loss
MAX_WEIGHT = 50.0


def rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, constant, linear cool-down."""
    return peak * min(1.0, (step + 1) / WARMUP, (steps - step) / (COOLDOWN * steps))


def draw_batch(step: int, size: int, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """x0 [B, 3, S, S] in [-1, 1], tokens and mask [B, T] of batch `step`."""
    images, captions = zip(*(shapes.draw(step * BATCH + i, size) for i in range(BATCH)), strict=True)
    dropped = np.random.default_rng(step).random(BATCH) < DROP_CAPTION
    tokens, mask = encode(["" if drop else text for drop, text in zip(dropped, captions, strict=True)], context)
    x0 = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x0.contiguous(memory_format=torch.channels_last), tokens, mask


def loss_of(model: Any, diffusion: Diffusion, step: int, size: int, context: int) -> Tensor:
    """The hybrid loss of batch `step`: every number in it follows from the step."""
    x0, tokens, mask = draw_batch(step, size, context)
    generator = torch.Generator().manual_seed(step)
    # One draw per 1/B of the time axis: less variance between steps than independent draws.
    strata = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
    t = (strata * diffusion.num_timesteps).long().clamp(max=diffusion.num_timesteps - 1)
    noise = torch.randn(x0.shape, generator=generator)
    x_t = diffusion.q_sample(x0, t, noise)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x_t, diffusion.model_timesteps(t), tokens=tokens, mask=mask)
    losses = diffusion.losses(output.float(), x0, x_t, t, noise)
    # Plain eps-MSE hardly weighs the noisy timesteps, where colours and layout are decided: after 1,600
    # steps of it shapes were crisp and colours random. 1 + 1/SNR weighs as v-prediction does
    # (Salimans & Ho 2022, arXiv 2202.00512, section 4); the cap keeps single steps from dominating.
    alpha_bar = diffusion.table("alphas_cumprod", t).flatten()
    weight = 1 + ((1 - alpha_bar) / alpha_bar).clamp(max=MAX_WEIGHT)
    return (weight * losses["mse"]).mean() + VB_WEIGHT * diffusion.num_timesteps * losses["vb"].mean()


def grade(model: Glide, count: int, respacing: str, first: int = shapes.HELD_OUT) -> dict[str, float]:
    """Shares of held-out captions drawn with the right colours, shapes and positions."""
    config = model.config
    captions = [shapes.caption(shapes.scene(first + i)) for i in range(count)]
    tokens, mask = encode(captions, config.text_ctx)
    with torch.autocast("cpu", torch.bfloat16):
        images = sample(
            model,
            create_diffusion("squaredcos_cap_v2", respacing=respacing),
            tokens=tokens,
            mask=mask,
            generator=torch.Generator().manual_seed(0),
        )
    pixels = to_bytes(images).numpy()
    grades = [judge.grade(image, text) for image, text in zip(pixels, captions, strict=True)]
    return {name: sum(getattr(g, name) for g in grades) / count for name in ("colour", "shape", "position")}


class Training:
    """The model, its running mean and the optimizer, which a stopped run goes on with."""

    def __init__(self, init: Path | None, peak: float = RATE, first: int = 0) -> None:
        torch.manual_seed(0)
        self.model = create_model(PRESETS["tiny"]()).to(memory_format=torch.channels_last)
        with torch.no_grad():
            self.model.token_embedding.weight.zero_()  # rows that no caption uses stay zero, and out of the file
            for name, tensor in read_state(init).items() if init else ():
                if self.model.state_dict()[name].shape == tensor.shape:
                    self.model.state_dict()[name].copy_(tensor)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.done, self.peak, self.first = 0, peak, first

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name in ("model", "ema", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.done = state["step"]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer")}
        with replacing(path) as partial:
            torch.save(state | {"step": self.done}, partial)

    def update(self, steps: int, diffusion: Diffusion, run: Any) -> float:
        """One update of `steps`; returns its loss."""
        config = self.model.config
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.done, steps, self.peak)
        loss = loss_of(run, diffusion, self.first + self.done, config.image_size, config.text_ctx)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1
        with torch.no_grad():
            decay = min(EMA_DECAY, self.done / (self.done + 9))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--out", type=user_path, default=Path("glide_ds/tiny/glide.safetensors"))
    parser.add_argument("--state", type=user_path, default=Path("runs/tiny-glide.pt"), help="to go on from")
    parser.add_argument(
        "--init", type=user_path, help="a weight file; tensors that fit by name and shape are taken over"
    )
    parser.add_argument("--rate", type=float, default=RATE, help="the highest learning rate")
    parser.add_argument(
        "--first", type=int, default=0, help="the batch to begin with: how many --init has seen"
    )
    parser.add_argument("--compile", action="store_true", help="1.5 times as fast; needs g++")
    args = parser.parse_args()

    training = Training(args.init, args.rate, args.first)
    if args.state.exists():
        training.load(args.state)
    diffusion = create_diffusion("squaredcos_cap_v2")
    run = torch.compile(training.model) if args.compile else training.model
    mean = None
    with Progress("training", args.steps, "steps", done=training.done) as progress:
        while training.done < args.steps:
            loss = training.update(args.steps, diffusion, run)
            mean = loss if mean is None else 0.98 * mean + 0.02 * loss
            progress.advance(note=f"loss {mean:.4f}")
            if training.done % 200 == 0 or training.done == args.steps:
                training.save(args.state)
            if training.done % 1000 == 0:
                progress.line(f"  drawn in 25 steps: {grade(training.ema, 32, '25')}")
    halves = {name: tensor.half() for name, tensor in training.ema.state_dict().items()}
    write_state(args.out, pack_rows(halves, [EMBEDDING]))
    print(f"wrote {args.out}; 64 held-out captions, 100 steps: {grade(training.ema, 64, '100')}")


if __name__ == "__main__":
    main()
