"""Train the tiny GLIDE that ships with the package, from nothing, on the built-in shapes.

    python launch/train_tiny_glide.py --steps 4000 --out glide_ds/tiny/glide.safetensors

An hour or two on two CPU cores; the same command goes on where a stopped one was. The trainer proper
(launch/train.py) fine-tunes; this plain loop in bf16 makes the start that it needs on a machine with
nothing prepared. It ends by drawing held-out captions and grading them.

The picture's loss alone leaves so small a model with a bag of words: after 7,800 steps it drew both named kinds in
both named colours, paired at random, and "above" said nothing to it. So the caption is taught what each of its words
belongs to (Reading), first for itself and then beside the picture, and attention where to look for it (looking).
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
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
from glide_ds.model.text import TextEncoding
from glide_ds.model.unet import AttentionBlock
from glide_ds.progress import Progress
from glide_ds.tokenizer import encode

EMBEDDING = "token_embedding.weight"
OPPOSITE = {
    "above": "below",
    "below": "above",
    "to the left of": "to the right of",
    "to the right of": "to the left of",
}
BATCH = 32
RATE = 1e-3
WARMUP = 100  # steps
COOLDOWN = 0.25  # share of the steps over which the learning rate falls to zero
EMA_DECAY = 0.999
DROP_CAPTION = 0.12
VB_WEIGHT = 0.001  # times T, as Improved DDPM's hybrid loss
MAX_WEIGHT = 50.0
SKEW = 1.4  # t = T (1 - (1 - u)^SKEW) of a uniform u: noisy timesteps, where the layout is decided, are met more often
PAIRS = 0.8  # share of scenes with two objects; half of the set's have
READ_WEIGHT, LOOK_WEIGHT = 0.02, 0.05
READ_BATCH, KEEP_WEIGHT = 96, 3.0  # of the steps that teach the text encoder for itself
PATCHES = 8  # to a side, of every attention block


def rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, constant, linear cool-down."""
    return peak * min(1.0, (step + 1) / WARMUP, (steps - step) / (COOLDOWN * steps))


class Batch(NamedTuple):
    scenes: list[shapes.Scene]
    captions: list[str]  # as given: "" where it is dropped
    x0: Tensor  # [B, 3, S, S] in [-1, 1]
    tokens: Tensor  # int64 [B, T]
    mask: Tensor  # bool [B, T]


def draw_batch(step: int, size: int, context: int) -> Batch:
    """Batch `step`: every number in it follows from the step."""
    rng = np.random.default_rng(step)
    indices: list[int] = []
    for index in count(step * 8 * BATCH):
        if len(indices) == BATCH:
            break
        pair = len(shapes.scene(index).shapes) == 2
        if rng.random() < (1.0 if pair else (1 - PAIRS) / PAIRS):
            indices.append(index)
    images, captions = zip(*(shapes.draw(index, size) for index in indices), strict=True)
    dropped = rng.random(BATCH) < DROP_CAPTION
    given = ["" if drop else text for drop, text in zip(dropped, captions, strict=True)]
    tokens, mask = encode(given, context)
    x0 = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    scenes = [shapes.scene(index) for index in indices]
    return Batch(scenes, given, x0.contiguous(memory_format=torch.channels_last), tokens, mask)


def words_of(tokens: int, place: int) -> range:
    """Where size, colour and kind of a caption's first or last object are, among so many tokens."""
    return range(1, 4) if place == 0 else range(tokens - 3, tokens)


class Reading(nn.Module):
    """Reads off each word of an object, as the text encoder gives it, all that the caption says of the object."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.choices = (
            shapes.COLOURS,
            shapes.KINDS,
            shapes.SIZES,
            (*shapes.RELATIONS, None),
            (*shapes.COLOURS, None),
        )
        self.heads = nn.ModuleList(nn.Linear(width, len(list(choice))) for choice in self.choices)

    def forward(self, encoded: Tensor, captions: list[str], mask: Tensor) -> Tensor:
        """The sum of the questions' cross-entropies for encoded captions [B, T, W]; empty ones are left out."""
        asked: list[tuple[int, int]] = []
        answers: list[list[int]] = []
        for row, (caption, tokens) in enumerate(zip(captions, mask.sum(1).tolist(), strict=True)):
            if not caption:
                continue
            told = shapes.parse_caption(caption)
            for place, thing in enumerate(told.objects):
                relation = told.relation if place == 0 or told.relation is None else OPPOSITE[told.relation]
                other = told.objects[1 - place].colour if len(told.objects) == 2 else None
                said = (thing.colour, thing.kind, thing.size, relation, other)
                answer = [list(choice).index(word) for choice, word in zip(self.choices, said, strict=True)]
                asked += [(row, column) for column in words_of(tokens, place)]
                answers += [answer] * 3
        rows, columns = torch.tensor(asked).unbind(1)
        words, targets = encoded[rows, columns].float(), torch.tensor(answers)
        losses = [F.cross_entropy(head(words), targets[:, i]) for i, head in enumerate(self.heads)]
        return torch.stack(losses).sum()


def looking(asked: list[tuple[Tensor, Tensor]], batch: Batch) -> Tensor:
    """How far patches inside one of two objects are from attending to that one's words: a mean cross-entropy.

    asked: queries [B, H, P^2, D] and keys [B, H, T + P^2, D], the caption's first, of each attention block.
    """
    length = batch.tokens.shape[1]
    own = torch.zeros(len(batch.scenes), 2, length, dtype=torch.bool)
    inside = torch.zeros(len(batch.scenes), 2, PATCHES, PATCHES)
    centre = (np.arange(PATCHES) + 0.5) / PATCHES
    for row, (scene, tokens) in enumerate(zip(batch.scenes, batch.mask.sum(1).tolist(), strict=True)):
        if len(scene.shapes) == 2 and batch.captions[row]:
            for place, thing in enumerate(scene.shapes):
                own[row, place, list(words_of(tokens, place))] = True
                across, down = (abs(centre - at) < thing.diameter / 2 + 0.02 for at in (thing.x, thing.y))
                inside[row, place] = torch.from_numpy(np.outer(down, across))
    first, second = inside.flatten(2).unbind(1)
    losses = []
    for q, k in asked:
        score = (q.float() @ k[:, :, :length].float().mT * q.shape[-1] ** -0.5).mean(1)  # [B, P^2, T]
        to_first, to_second = (score.masked_fill(~own[:, place, None], -1e4).logsumexp(-1) for place in (0, 1))
        wrong = first * F.softplus(to_second - to_first) + second * F.softplus(to_first - to_second)
        losses.append(wrong.sum() / (first + second).sum())
    return torch.stack(losses).mean()


def picture_loss(model: Any, diffusion: Diffusion, step: int, batch: Batch, text: TextEncoding) -> Tensor:
    """The hybrid loss of a batch, whose noise follows from the step."""
    generator = torch.Generator().manual_seed(step)
    # One draw per 1/B of the time axis: less variance between steps than independent draws.
    strata = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
    t = ((1 - (1 - strata) ** SKEW) * diffusion.num_timesteps).long().clamp(max=diffusion.num_timesteps - 1)
    noise = torch.randn(batch.x0.shape, generator=generator)
    x_t = diffusion.q_sample(batch.x0, t, noise)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x_t, diffusion.model_timesteps(t), text=text)
    losses = diffusion.losses(output.float(), batch.x0, x_t, t, noise)
    # Plain eps-MSE hardly weighs the noisy timesteps, where colours and layout are decided: after 1,600
    # steps of it shapes were crisp and colours random. 1 + 1/SNR weighs as v-prediction does
    # (Salimans & Ho 2022, arXiv 2202.00512, section 4); the cap keeps single steps from dominating.
    alpha_bar = diffusion.table("alphas_cumprod", t).flatten()
    weight = 1 + ((1 - alpha_bar) / alpha_bar).clamp(max=MAX_WEIGHT)
    return (weight * losses["mse"]).mean() + VB_WEIGHT * diffusion.num_timesteps * losses["vb"].mean()


def grade(model: Glide, number: int, respacing: str, first: int = shapes.HELD_OUT) -> dict[str, float]:
    """Shares of held-out captions drawn with the right colours, shapes and positions."""
    config = model.config
    captions = [shapes.caption(shapes.scene(first + i)) for i in range(number)]
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
    return {name: sum(getattr(g, name) for g in grades) / number for name in ("colour", "shape", "position")}


PARTS = ("model", "ema", "reading", "optimizer")


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
        self.reading = Reading(self.model.config.xf_width)
        self.optimizer = torch.optim.AdamW(
            [*self.model.parameters(), *self.reading.parameters()],
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=True,
        )
        self.done, self.peak, self.first = 0, peak, first
        self.asked: list[tuple[Tensor, Tensor]] = []
        for block in self.model.modules():
            if isinstance(block, AttentionBlock):
                block.attend = self._listening(block.attend)  # type: ignore[method-assign]

    def _listening(self, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def listening(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.asked.append((q, k))
            return attend(q, k, v)

        return listening

    def read(self, steps: int, *, keep: bool) -> None:
        """Teach the text encoder for itself; `keep` holds it to what it said before, which the UNet reads."""
        names = ("transformer.", "final_ln.", "token_embedding.", "positional_embedding", "padding_embedding")
        text = [p for name, p in self.model.named_parameters() if name.startswith(names)]
        groups = [{"params": text, "lr": 1e-3}, {"params": list(self.reading.parameters()), "lr": 3e-3}]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
        context, before = self.model.config.text_ctx, copy.deepcopy(self.model)
        with Progress("reading captions", steps, "steps") as progress:
            for step in range(steps):
                indices = range(step * READ_BATCH, (step + 1) * READ_BATCH)
                captions = [shapes.caption(shapes.scene(index)) for index in indices]
                tokens, mask = encode(captions, context)
                encoding = self.model.encode_text(tokens, mask)
                loss = self.reading(encoding.tokens, captions, mask)
                if keep:
                    with torch.no_grad():
                        said = before.encode_text(tokens, mask)
                    for new, old in zip(encoding, said, strict=True):
                        loss = loss + KEEP_WEIGHT * (new - old).square().mean() / old.var()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                falling.step()
                progress.advance(note=f"loss {loss.item():.3f}")
        self.ema.load_state_dict(self.model.state_dict())

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.done = state["step"]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: getattr(self, name).state_dict() for name in PARTS}
        with replacing(path) as partial:
            torch.save(state | {"step": self.done}, partial)

    def update(self, steps: int, diffusion: Diffusion, run: Any) -> float:
        """One update of `steps`; returns its loss."""
        config = self.model.config
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.done, steps, self.peak)
        step = self.first + self.done
        batch = draw_batch(step, config.image_size, config.text_ctx)
        self.asked.clear()
        with torch.autocast("cpu", torch.bfloat16):
            text = self.model.encode_text(batch.tokens, batch.mask)
        loss = picture_loss(run, diffusion, step, batch, text)
        taught = READ_WEIGHT * self.reading(text.tokens, batch.captions, batch.mask)
        taught = taught + LOOK_WEIGHT * looking(self.asked, batch)
        self.optimizer.zero_grad()
        (loss + taught).backward()
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
    parser.add_argument(
        "--read", type=int, default=500, help="steps that teach the text encoder for itself, before all others"
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
    elif args.read:
        training.read(args.read, keep=args.init is not None)
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
