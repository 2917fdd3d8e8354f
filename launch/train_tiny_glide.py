"""Train the tiny GLIDE that ships with the package, from nothing, on the built-in shapes.

    python launch/train_tiny_glide.py --steps 4000 --out glide_ds/tiny/glide.safetensors

About an hour on two CPU cores; the same command goes on where a stopped one was. The trainer proper
(launch/train.py) fine-tunes; this plain loop in bf16 makes the start that it needs on a machine with
nothing prepared. It ends by drawing held-out captions and grading them.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glide_ds.config import PRESETS
from glide_ds.data import judge, shapes
from glide_ds.diffusion import Diffusion, create_diffusion, sample
from glide_ds.model import create_model
from glide_ds.model.glide import Glide
from glide_ds.model.tensor_files import pack_rows, read_state, write_state
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


def rate(step: int, steps: int) -> float:
    """Warm-up, constant, linear cool-down."""
    return RATE * min(1.0, (step + 1) / WARMUP, (steps - step) / (COOLDOWN * steps))


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
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    grades = [judge.grade(image, text) for image, text in zip(pixels, captions, strict=True)]
    return {name: sum(getattr(g, name) for g in grades) / count for name in ("colour", "shape", "position")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path("glide_ds/tiny/glide.safetensors"))
    parser.add_argument("--state", type=Path, default=Path("runs/tiny-glide.pt"), help="to go on from")
    parser.add_argument(
        "--init", type=Path, help="a weight file; tensors that fit by name and shape are taken over"
    )
    parser.add_argument("--compile", action="store_true", help="1.5 times as fast; needs g++")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = PRESETS["tiny"]()
    model = create_model(config).to(memory_format=torch.channels_last)
    with torch.no_grad():
        model.token_embedding.weight.zero_()  # rows that no caption uses stay zero, and out of the file
        for name, tensor in read_state(args.init).items() if args.init else ():
            if model.state_dict()[name].shape == tensor.shape:
                model.state_dict()[name].copy_(tensor)
    ema = copy.deepcopy(model).requires_grad_(False)
    diffusion = create_diffusion("squaredcos_cap_v2")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    done = 0
    if args.state.exists():
        state = torch.load(args.state, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    run = torch.compile(model) if args.compile else model
    started, mean = time.monotonic(), None
    for step in range(done, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args.steps)
        loss = loss_of(run, diffusion, step, config.image_size, config.text_ctx)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(EMA_DECAY, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 20 == 0:
            each = (time.monotonic() - started) / (step + 1 - done)
            left = each * (args.steps - step - 1) / 60
            print(
                f"step {step + 1}/{args.steps}  loss {mean:.4f}  {each:.2f} s/step  {left:.0f} min left",
                flush=True,
            )
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            args.state.parent.mkdir(parents=True, exist_ok=True)
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step + 1}, args.state.with_suffix(".new"))
            args.state.with_suffix(".new").replace(args.state)
        if (step + 1) % 1000 == 0:
            print(f"  drawn in 25 steps: {grade(ema, 32, '25')}", flush=True)
    halves = {name: tensor.half() for name, tensor in ema.state_dict().items()}
    write_state(args.out, pack_rows(halves, [EMBEDDING]))
    print(f"wrote {args.out}; 64 held-out captions, 100 steps: {grade(ema, 64, '100')}")


if __name__ == "__main__":
    main()
