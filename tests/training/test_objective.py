"""What a micro-batch is trained on: draws by slot, the terms of the loss, sums over an update."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_kit import ARCHITECTURE, DOCUMENT, make_config, shake

from glide_ds.diffusion import create_diffusion
from glide_ds.diffusion.losses import reverse_kl
from glide_ds.diffusion.pixels import to_signed
from glide_ds.model import create_model
from glide_ds.model.clip import FrozenClip
from glide_ds.model.glide import Glide
from glide_ds.model.unet import Seen
from glide_ds.tokenizer import encode
from glide_ds.training.metrics import Meter
from glide_ds.training.objective import Losses, Objective, draw
from glide_ds.training.phases import hash64, phase_seed
from glide_ds.types import Batch, GlideConfig

B, SIDE, WIDTH = 4, 16, 8


class Echo:
    """A model whose output depends on everything that it is given."""

    def __init__(self) -> None:
        self.module = self
        self.weight = torch.tensor(0.3, requires_grad=True)
        self.calls: list[dict[str, Any]] = []

    def plain(self) -> Any:
        return nullcontext()

    def __call__(self, x: Tensor, t: Tensor, **inputs: Any) -> Tensor:
        self.calls.append({"x": x, "t": t, "grad": torch.is_grad_enabled(), **inputs})
        out = self.weight * x + t[:, None, None, None] / 1000
        if "clip_embedding" in inputs:
            kept = inputs["clip_embedding"].mean(1) * ~inputs["clip_drop"]
            out = out + self.weight * kept[:, None, None, None]
        return torch.cat([out, out], 1)


class Bare:
    """A plain module where Objective expects an engine."""

    def __init__(self, module: Glide) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.module(*args, **kwargs)


class Encoder:
    embed = FrozenClip.embed
    device = torch.device("cpu")

    def encode_text(self, captions: Any) -> Tensor:
        return torch.tensor([[float(len(c))] for c in captions]).expand(-1, WIDTH)

    def encode_image(self, images: Tensor) -> Tensor:
        return images.float().mean((1, 2, 3))[:, None].expand(-1, WIDTH) / 255


def batch(drop: bool = False, **extra: Any) -> Batch:
    captions = tuple(f"circle {i}" * (i + 1) for i in range(B))
    tokens, mask = encode(captions, 12)
    images = torch.randint(0, 256, (B, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(1))
    return Batch(
        sample_ids=torch.arange(B),
        slots=torch.arange(B),
        images=images.to(torch.uint8),
        tokens=tokens,
        mask=mask,
        drop_clip=torch.full((B,), drop),
        captions=captions,
        **extra,
    )


def objective(
    folder: Path, phase: str = "full", encoder: bool = True, **sections: Any
) -> tuple[Objective, Echo]:
    config = make_config(folder, phase, **sections)
    model = Echo()
    diffusion = create_diffusion(config.model.noise_schedule)
    return Objective(config, diffusion, model, Encoder() if encoder else None), model  # type: ignore[arg-type]


# --- draws ---


def test_a_slots_numbers_do_not_depend_on_who_draws_them():
    whole = draw(7, 3, list(range(8)), SIDE, 1000, 0.5, "cpu")
    for slots in ([0, 1], [6, 2, 7], [5]):
        part = draw(7, 3, slots, SIDE, 1000, 0.5, "cpu")
        for one, all_ in zip(part[:3], whole[:3], strict=True):
            assert torch.equal(one, all_[slots])


def test_seed_step_and_slot_each_change_all_numbers():
    first = draw(7, 3, [0], SIDE, 1000, 0.5, "cpu")
    for seed, step, slot in ((8, 3, 0), (7, 4, 0), (7, 3, 1)):
        other = draw(seed, step, [slot], SIDE, 1000, 0.5, "cpu")
        assert not torch.equal(first.noise, other.noise)
        assert first.timesteps != other.timesteps


def test_draws_drop_as_often_as_asked():
    slots = list(range(2000))
    drops = {rate: draw(0, 0, slots, 1, 1000, rate, "cpu").drop_clip for rate in (0.0, 0.1, 1.0)}
    assert not drops[0.0].any()
    assert drops[1.0].all()
    assert 0.07 < drops[0.1].float().mean() < 0.13


def test_timesteps_are_uniform_and_noise_is_normal():
    drawn = draw(0, 0, list(range(2000)), 4, 1000, 0.1, "cpu")
    counts = torch.bincount(drawn.timesteps // 100, minlength=10)
    assert counts.min() > 140
    assert counts.max() < 260
    assert drawn.timesteps.min() >= 0
    assert drawn.timesteps.max() < 1000
    assert drawn.noise.mean().abs() < 0.01
    assert drawn.noise.std() == pytest.approx(1, abs=0.01)


# --- stratified timesteps, offset noise, perturbed inputs ---


def stratified(step: int, slots: list[int], strata: int, timesteps: int = 1000) -> Tensor:
    return draw(7, step, slots, 1, timesteps, 0.5, "cpu", strata=strata).timesteps


@pytest.mark.parametrize("count", [1, 3, 8, 1500])
def test_each_part_of_the_schedule_has_one_timestep_of_the_global_batch(count: int):
    drawn = stratified(3, list(range(count)), count).sort().values.tolist()
    for number, timestep in enumerate(drawn):
        low, high = number * 1000 / count, (number + 1) * 1000 / count
        assert int(low) <= timestep <= min(high, 999), (number, timestep)


def test_a_stratified_timestep_is_uniform_for_every_slot_and_does_not_depend_on_who_draws_it():
    whole = torch.stack([stratified(step, list(range(4)), 4) for step in range(2000)])
    for slot in range(4):
        counts = torch.bincount(whole[:, slot] // 100, minlength=10)
        assert counts.min() > 150
        assert counts.max() < 250
    for slots in ([0, 1], [3], [2, 0]):
        assert torch.equal(stratified(5, slots, 4), whole[5][slots])


def test_stratified_timesteps_estimate_the_same_loss_with_less_variance():
    """Of a loss that falls with the timestep as a trained model's does, over batches of 16."""
    alpha_bar = torch.tensor(create_diffusion("squaredcos_cap_v2").alphas_cumprod)
    loss, slots = alpha_bar + 0.1, list(range(16))
    each = {
        strata: torch.stack(
            [
                loss[draw(1, step, slots, 1, 1000, 0.0, "cpu", strata=strata).timesteps].mean()
                for step in range(400)
            ]
        )
        for strata in (0, 16)
    }
    assert each[16].mean() == pytest.approx(float(loss.mean()), abs=0.01)
    assert each[0].mean() == pytest.approx(float(loss.mean()), abs=0.02)
    assert each[0].var() > 10 * each[16].var()


def test_what_is_asked_for_beside_them_leaves_the_other_numbers():
    plain = draw(7, 3, [0, 1], SIDE, 1000, 0.5, "cpu")
    extra = draw(7, 3, [0, 1], SIDE, 1000, 0.5, "cpu", offset=0.2, perturbation=0.1)
    assert torch.equal(plain.timesteps, extra.timesteps)
    assert torch.equal(plain.drop_clip, extra.drop_clip)
    assert plain.added is None
    assert extra.added is not None
    offset = extra.noise - plain.noise
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset))
    assert offset[:, :, 0, 0].unique().numel() == 6  # of each picture and channel
    many = draw(7, 3, list(range(300)), 4, 1000, 0.5, "cpu", offset=0.2, perturbation=0.1)
    assert many.noise.mean((2, 3)).std() == pytest.approx((1 / 16 + 0.2**2) ** 0.5, rel=0.1)
    assert many.added is not None
    assert many.added.std() == pytest.approx(0.1, rel=0.03)


def test_a_perturbed_input_is_asked_for_the_noise_without_it(tmp_path: Path):
    """Ning et al. 2023, arXiv 2301.11706, algorithm 1."""
    perturbed, model = objective(tmp_path, train={"input_perturbation": 0.1})
    plain, other = objective(tmp_path)
    losses = perturbed(batch(), 0)
    plain(batch(), 0)
    draws = draw(perturbed.seed, 0, list(range(B)), SIDE, 1000, 0.1, "cpu", perturbation=0.1)
    x_t = model.calls[0]["x"]
    assert draws.added is not None
    spread = torch.tensor(1 - perturbed.diffusion.alphas_cumprod).sqrt().float()[draws.timesteps]
    torch.testing.assert_close(x_t - other.calls[0]["x"], spread[:, None, None, None] * draws.added)
    with torch.no_grad():
        inputs = {name: model.calls[0][name] for name in ("clip_embedding", "clip_drop")}
        predicted = model(x_t, perturbed.diffusion.model_timesteps(draws.timesteps), **inputs)[:, :3]
    torch.testing.assert_close(losses.mse, (predicted - draws.noise).square().flatten(1).mean(1))


def test_what_is_drawn_ahead_is_what_the_step_would_have_drawn(tmp_path: Path):
    ahead, _ = objective(tmp_path)
    ahead(batch(), 0)
    for step in (1, 5):  # the one that was made ready, and one that was not
        fresh, _ = objective(tmp_path)
        for got, expected in zip(ahead(batch(), step), fresh(batch(), step), strict=True):
            assert (got is None and expected is None) or torch.equal(got, expected)


def test_seed_and_phase_decide_the_numbers(tmp_path: Path):
    seeds = {
        (phase, seed): phase_seed(make_config(tmp_path, phase, train={"seed": seed}))
        for phase in ("base", "adapter_only", "adapter_gates", "full")
        for seed in (0, 1)
    }
    assert len(set(seeds.values())) == len(seeds)
    # Of runs from before phases were told by their names: theirs stay.
    assert seeds["base", 0] == hash64(0, 0)
    assert seeds["full", 1] == hash64(1, 3)
    assert hash64(1, 2) != hash64(2, 1)
    assert all(0 <= hash64(i) < 2**63 for i in range(50))


def test_pictures_fill_minus_one_to_one():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1).expand(1, 2, 2, 3)
    signed = to_signed(images)
    assert signed.shape == (1, 3, 2, 2)
    assert signed[..., 0].unique().tolist() == [-1.0]
    assert signed[..., 1].unique().tolist() == [1.0]


# --- the loss ---


def test_the_total_is_what_its_terms_say(tmp_path: Path):
    plain, _ = objective(tmp_path)
    losses = plain(batch(), 0)
    assert losses.kl is None
    torch.testing.assert_close(losses.total, losses.mse.mean())

    hybrid, _ = objective(tmp_path, train={"loss": "hybrid", "vb_weight": 0.002})
    losses = hybrid(batch(), 0)
    torch.testing.assert_close(losses.total, losses.mse.mean() + 0.002 * 1000 * losses.vb.mean())

    weighted, _ = objective(tmp_path, train={"weighting": "v"})
    losses = weighted(batch(), 0)
    alpha_bar = torch.tensor(weighted.diffusion.alphas_cumprod)[losses.timesteps].float()
    weight = 1 + ((1 - alpha_bar) / alpha_bar).clamp(max=20)
    torch.testing.assert_close(losses.total, (weight * losses.mse).mean())
    assert losses.total > losses.mse.mean()

    weighted, _ = objective(tmp_path, train={"weighting": "min-snr", "min_snr_gamma": 2.0})
    losses = weighted(batch(), 0)
    snr = alpha_bar / (1 - alpha_bar)
    torch.testing.assert_close(losses.total, (snr.clamp(max=2) / snr * losses.mse).mean())
    assert losses.total < losses.mse.mean()

    with_kl, _ = objective(tmp_path, train={"kl_weight": 0.5, "kl_every": 3})
    has_kl = []
    for step in range(7):
        losses = with_kl(batch(), step)
        has_kl.append(losses.kl is not None)
        if losses.kl is not None:
            assert losses.kl > 0
            torch.testing.assert_close(losses.total, losses.mse.mean() + 0.5 * losses.kl)
    assert has_kl == [True, False, False, True, False, False, True]


def test_the_kl_is_to_the_clip_off_pass_which_gets_no_gradient(tmp_path: Path):
    with_kl, model = objective(tmp_path, train={"kl_weight": 1.0, "kl_every": 1})
    losses = with_kl(batch(), 0)
    on, off = model.calls
    assert on["grad"]
    assert not off["grad"]
    assert "clip_embedding" in on
    assert "clip_embedding" not in off
    assert torch.equal(on["x"], off["x"])
    diffusion = with_kl.diffusion
    means = [
        diffusion.p_mean_variance(model(**call), on["x"], losses.timesteps, clip_x0=False).gaussian
        for call in ({k: v for k, v in c.items() if k != "grad"} for c in (on, off))
    ]
    torch.testing.assert_close(losses.kl, reverse_kl(*means).mean().detach())
    heavier, other = objective(tmp_path, train={"kl_weight": 2.0, "kl_every": 1})
    gradients = [
        torch.autograd.grad(total, weight)[0]
        for total, weight in ((losses.total, model.weight), (heavier(batch(), 0).total, other.weight))
    ]
    assert not torch.isclose(*gradients)


def dropping(
    folder: Path, phase: str = "adapter_only", clip_drop: float = 0.1, **train: Any
) -> tuple[Objective, Glide]:
    """The objective over a real model with the published dropout, KL at every second step; its adapter adds nothing."""
    sections: dict[str, Any] = {"train": {"kl_weight": 1.0, "kl_every": 2, **train}}
    sections["clip"] = {**DOCUMENT["glide_ds"]["clip"], "drop": clip_drop}
    model_config = {"architecture": {**ARCHITECTURE, "dropout": 0.1}}
    config = make_config(folder, phase, model={**DOCUMENT["glide_ds"]["model"], **model_config}, **sections)
    torch.manual_seed(0)
    model = create_model(GlideConfig(**{**ARCHITECTURE, "dropout": 0.1}, clip_dim=WIDTH)).train()
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items() if "clip" in name}
    shake(model)
    model.load_state_dict(fresh, strict=False)
    made = Objective(config, create_diffusion(config.model.noise_schedule), Bare(model), Encoder())  # type: ignore[arg-type]
    return made, model


def test_a_sample_without_its_caption_has_no_kl(tmp_path: Path):
    """CLIP alone is to say what the pass without it can't know."""
    made, _ = objective(tmp_path, train={"kl_weight": 1.0, "kl_every": 1})
    whole = batch()
    assert whole.mask.any(1).all()
    every = made(whole, 0).kl
    assert every is not None
    emptied = torch.arange(B) % 2 == 0
    some = made(replace(whole, mask=whole.mask & ~emptied[:, None]), 0).kl
    assert some is not None
    assert 0 < some < every
    assert made(replace(whole, mask=torch.zeros_like(whole.mask)), 0).kl == 0


def test_the_alignment_asks_clip_for_what_the_caption_does_not_say(tmp_path: Path):
    made, model = dropping(tmp_path, kl_weight=0.0, align_weight=0.5, clip_drop=0.0)
    model.clip_gate_offset.fill_(20.0)
    empty_tokens, empty_mask = encode([""] * B, 12)
    emptied = torch.tensor([True, True, False, False])
    whole = batch()
    part = replace(
        whole,
        tokens=torch.where(emptied[:, None], empty_tokens, whole.tokens),
        mask=torch.where(emptied[:, None], empty_mask, whole.mask),
    )
    # A fresh adapter says nothing: right where the caption is kept, and where it is emptied all of both ways misses.
    losses = made(part, 0)
    torch.testing.assert_close(losses.alignment, torch.tensor(1.0))
    torch.testing.assert_close(losses.total, losses.mse.mean() + 0.5 * losses.alignment)
    no_clip = replace(part, drop_clip=torch.tensor([True, False, False, True]))
    torch.testing.assert_close(made(no_clip, 0).alignment, torch.tensor(0.5))
    assert made(replace(part, captions=("",) * B), 0).alignment == 0

    with torch.no_grad():
        full = model.encode_text(whole.tokens, whole.mask).pooled
        model.clip_vector.out.bias.copy_((full - model.encode_text(empty_tokens, empty_mask).pooled)[0])
    said = made(replace(part, drop_clip=~torch.tensor([True, False, False, False])), 0).alignment
    torch.testing.assert_close(
        said, torch.tensor(0.25)
    )  # by vector all the first caption says, by tokens nothing
    assert made(replace(part, captions=("",) * B), 0).alignment == 0  # no caption, no target

    model.zero_grad()
    losses = made(part, 0)
    (losses.total - losses.mse.mean()).backward(retain_graph=True)
    taught = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-9}
    assert {name.split(".")[0] for name in taught} >= {"clip_vector"}
    assert any("clip_kv" in name for name in taught)


@pytest.mark.parametrize("dial", ["none", "blocks"])
def test_tokens_that_say_what_the_caption_would_are_aligned(tmp_path: Path, dial: str):
    """One step down the alignment's gradient brings both ways nearer, and changes nothing of GLIDE's own."""
    made, model = dropping(tmp_path, kl_weight=0.0, align_weight=1.0, clip_drop=0.0)
    model.recompute(dial)
    model.clip_gate_offset.fill_(20.0)
    whole = batch()
    tokens, mask = encode([""] * B, 12)
    bare = replace(whole, tokens=tokens, mask=mask)
    trained = {n: p for n, p in model.named_parameters() if "clip" in n}
    optimizer = torch.optim.Adam(trained.values(), lr=1e-2)
    missed = []
    for _ in range(12):
        seen: Seen = []
        embedding = made.embed(bare)
        torch.manual_seed(0)
        x = to_signed(bare.images)
        model(x, torch.full((B,), 500), tokens=tokens, mask=mask, clip_embedding=embedding, seen=seen)
        loss = made.alignment(bare, seen, embedding, bare.drop_clip)
        model.zero_grad()
        loss.backward()
        assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)
        optimizer.step()
        missed.append(loss.item())
    assert missed[0] > 1.5
    assert missed[-1] < 0.5 * missed[0]


@pytest.mark.parametrize("dial", ["none", "blocks"])
def test_an_adapter_that_adds_nothing_has_no_kl_whatever_dropout_does(tmp_path: Path, dial: str):
    made, model = dropping(tmp_path)
    model.recompute(dial)
    torch.manual_seed(1)
    losses = made(batch(), 0)
    assert losses.kl == 0
    losses.total.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "clip_kv" in name:
                parameter.add_(0.1)
        model.clip_gate_offset.fill_(10.0)
    assert made(batch(), 2).kl > 0


def test_the_kl_term_moves_nobodys_dropout(tmp_path: Path):
    """What is drawn after a step with the term is what is drawn after one without."""
    after = []
    for every in (2, 3):
        made, _ = dropping(tmp_path, kl_every=every)
        torch.manual_seed(1)
        assert (made(batch(), 2).kl is not None) == (every == 2)
        after.append(torch.rand(1))
    assert torch.equal(*after)


def test_the_kl_term_compares_passes_that_are_not_compiled(tmp_path: Path):
    """A compiled pass draws masks of its own."""
    made, model = dropping(tmp_path)
    ran: list[str] = []
    for name, block in model.blocks().items():
        block.compiled = lambda *inputs, name=name, block=block: (ran.append(name), block(*inputs))[1]
    assert made(batch(), 0).kl == 0
    assert ran == []
    assert made(batch(), 1).kl is None
    assert len(ran) == len(model.blocks())


def test_without_clip_there_is_neither_embedding_nor_kl(tmp_path: Path):
    base, model = objective(tmp_path, "base", encoder=False, train={"kl_weight": 1.0, "kl_every": 1})
    assert base(batch(), 0).kl is None
    assert len(model.calls) == 1
    assert "clip_embedding" not in model.calls[0]


def test_the_schedule_reaches_the_noise(tmp_path: Path):
    noisy = []
    for schedule in ("squaredcos_cap_v2", "linear"):
        one, model = objective(tmp_path, model={"schedule": schedule})
        one(batch(), 0)
        noisy.append(model.calls[0]["x"])
    assert not torch.allclose(noisy[0], noisy[1])


def test_the_source_says_which_embedding_conditions(tmp_path: Path):
    of_text, model_t = objective(tmp_path)
    of_image, model_i = objective(tmp_path, clip={"source": "image"})
    of_text(batch(), 0)
    pictures = torch.randint(256, (B, 5, 5, 3), dtype=torch.uint8)
    of_image(batch(pictured=torch.ones(B, dtype=torch.bool), clip_images=pictures), 0)
    encoder, one = Encoder(), batch()
    assert torch.equal(model_t.calls[0]["clip_embedding"], encoder.encode_text(one.captions))
    assert torch.equal(model_i.calls[0]["clip_embedding"], encoder.encode_image(pictures))
    mixed, model_b = objective(tmp_path, clip={"source": "both"})
    pictured = torch.tensor([row % 3 == 1 for row in range(B)])
    mixed(batch(pictured=pictured, clip_images=pictures[pictured]), 0)
    wanted = torch.where(pictured[:, None], encoder.encode_image(pictures), encoder.encode_text(one.captions))
    assert torch.equal(model_b.calls[0]["clip_embedding"], wanted)
    stored, model_s = objective(tmp_path)
    rows = torch.ones(B, WIDTH, dtype=torch.float16) / 3
    stored(batch(clip=rows), 0)
    assert torch.equal(model_s.calls[0]["clip_embedding"], rows.float())


def test_clip_is_dropped_with_the_caption_and_on_its_own(tmp_path: Path):
    never, model = objective(tmp_path, clip={"drop": 0.0})
    never(batch(), 0)
    never(batch(drop=True), 0)
    assert [bool(call["clip_drop"].any()) for call in model.calls] == [False, True]
    always, model = objective(tmp_path, clip={"drop": 1.0})
    always(batch(), 0)
    assert model.calls[0]["clip_drop"].all()


def test_channels_last_changes_the_layout_and_nothing_else(tmp_path: Path):
    seen = []
    for nhwc in (False, True):
        one, model = objective(tmp_path, train={"channels_last": nhwc})
        losses = one(batch(), 0)
        seen.append((losses.total, model.calls[0]["x"]))
    torch.testing.assert_close(seen[0][0], seen[1][0])
    assert seen[1][1].is_contiguous(memory_format=torch.channels_last)
    assert not seen[0][1].is_contiguous(memory_format=torch.channels_last)


def test_the_enlarged_picture_goes_to_an_upsampler(tmp_path: Path):
    one, model = objective(tmp_path)
    low = torch.full((B, SIDE // 4, SIDE // 4, 3), 255, dtype=torch.uint8)
    one(batch(low_res=low), 0)
    assert model.calls[0]["low_res"].shape == (B, 3, 4, 4)
    assert model.calls[0]["low_res"].unique().tolist() == [1.0]


# --- sums over an update ---


def losses(mse: list[float], t: list[int], kl: float | None = None) -> Losses:
    values = torch.tensor(mse)
    return Losses(values.mean(), values, values * 2, None if kl is None else torch.tensor(kl), torch.tensor(t))


def test_the_meter_means_over_micro_batches_and_quartiles(group: torch.device):
    meter = Meter(1000, "cpu")
    meter.add(losses([1.0, 2.0], [0, 249], kl=4.0))
    meter.add(losses([3.0, 6.0], [250, 999]))
    read = meter.read()
    assert read["loss"] == 3.0
    assert read["vb"] == 6.0
    assert read["kl"] == 4.0
    assert read["loss_by_quartile"] == {"q1": 1.5, "q2": 3.0, "q4": 6.0}  # none fell into the third
    none = Meter(1000, "cpu")
    none.add(losses([1.0], [500]))
    assert not {"kl", "alignment"} & none.read().keys()
    aligned = Meter(1000, "cpu")
    for value in (1.0, 3.0):
        aligned.add(losses([1.0], [500])._replace(alignment=torch.tensor(value)))
    assert aligned.read()["alignment"] == 2.0
