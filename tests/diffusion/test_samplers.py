"""Sampling: guidance, reproducibility, inpainting, what the model is given at each step."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glide_ds.diffusion import SAMPLERS, create_diffusion, sample
from glide_ds.diffusion.guidance import compose, guide, guide_apart
from glide_ds.errors import ConfigError, GlideError
from glide_ds.model.text import TextEncoding
from glide_ds.tokenizer import encode
from glide_ds.types import GlideConfig


class Recorder(nn.Module):
    """Stands in for Glide: predicts noise that depends on every condition, and remembers its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.config = GlideConfig(image_size=8)
        self.calls: list[dict[str, Any]] = []
        self.texts: list[tuple[Tensor, Tensor]] = []

    def encode_text(self, tokens: Tensor, mask: Tensor) -> TextEncoding:
        self.texts.append((tokens, mask))
        return TextEncoding(mask.float().mean(dim=1, keepdim=True), tokens)

    def forward(self, x: Tensor, timesteps: Tensor, **conditions: Any) -> Tensor:
        self.calls.append({"x": x, "timesteps": timesteps, "training": self.training, **conditions})
        shift = conditions["text"].pooled[:, :, None, None]
        if conditions.get("low_res") is not None:
            shift = shift + conditions["low_res"].mean(dim=(1, 2, 3), keepdim=True)
        return torch.cat([0.5 * x + shift, torch.zeros_like(x)], dim=1)


def draw(
    model: nn.Module, steps: int | str = 4, captions: tuple[str, ...] = ("a red circle",), **options: Any
) -> Tensor:
    tokens, mask = encode(captions)
    options.setdefault("generator", torch.Generator().manual_seed(0))
    diffusion = create_diffusion("squaredcos_cap_v2", respacing=steps)
    return sample(model, diffusion, tokens=tokens, mask=mask, **options)


def test_guidance_moves_epsilon_and_keeps_each_variance() -> None:
    output = torch.randn(4, 6, 2, 2)
    guided = guide(output, 3.0)
    expected = output[2:, :3] + 3 * (output[:2, :3] - output[2:, :3])
    torch.testing.assert_close(guided[:2, :3], expected)
    assert torch.equal(guided[2:, :3], guided[:2, :3])
    assert torch.equal(guided[:, 3:], output[:, 3:])


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_generator_makes_pictures_repeatable(sampler: str) -> None:
    model = Recorder()
    first, second = draw(model, sampler=sampler), draw(model, sampler=sampler)
    other = draw(model, sampler=sampler, generator=torch.Generator().manual_seed(1))
    assert first.shape == (1, 3, 8, 8)
    assert first.abs().max() <= 1
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_unconditional_rows_drop_caption_and_clip_together() -> None:
    model = Recorder()
    embedding = torch.randn(2, 24)
    draw(model, captions=("a", "b"), clip_embedding=embedding)
    ((tokens, mask),) = model.texts  # once, not once per step
    assert torch.equal(tokens[:2], encode(["a", "b"])[0])
    empty_tokens, empty_mask = encode(["", ""])
    assert torch.equal(tokens[2:], empty_tokens)
    assert torch.equal(mask[2:], empty_mask)
    for call in model.calls:
        assert torch.equal(call["x"][:2], call["x"][2:])
        assert torch.equal(call["clip_embedding"], torch.cat([embedding, embedding]))
        assert call["clip_drop"].tolist() == [False, False, True, True]


def test_clip_can_have_a_guidance_scale_of_its_own() -> None:
    """eps = u + s (c - u) + t (cc - c), checked where every pass says something else."""
    output = torch.randn(6, 6, 2, 2)
    both, caption, neither = output[:, :3].chunk(3)
    guided = guide_apart(output, 3.0, 0.5)
    torch.testing.assert_close(guided[:, :3], neither + 3 * (caption - neither) + 0.5 * (both - caption))
    assert torch.equal(guided[:, 3:], output[:2, 3:])
    torch.testing.assert_close(guide_apart(output, 3.0, 3.0)[:, :3], neither + 3 * (both - neither))

    model, embedding = Recorder(), torch.randn(2, 24)
    draw(model, captions=("a", "b"), clip_embedding=embedding, clip_guidance=1.5)
    ((_, mask),) = model.texts
    assert mask.any(1).tolist() == [True] * 4 + [False] * 2
    for call in model.calls:
        assert call["clip_drop"].tolist() == [False] * 2 + [True] * 4
        assert torch.equal(call["clip_embedding"], torch.cat([embedding] * 3))


def test_composed_prompts_each_pull_for_themselves() -> None:
    """eps = u + s (w1 (c1 - u) + w2 (c2 - u)), checked where every pass says something else."""
    output = torch.randn(6, 6, 2, 2)
    first, second, neither = output[:, :3].chunk(3)
    guided = compose(output, 3.0, (1.4, 0.6))
    expected = neither + 3 * (1.4 * (first - neither) + 0.6 * (second - neither))
    torch.testing.assert_close(guided[:, :3], expected)
    assert torch.equal(guided[:, 3:], output[:2, 3:])

    model, embedding = Recorder(), torch.randn(2, 2, 24)
    draw(model, captions=("", ""), clip_embedding=embedding, clip_weights=(1.4, 0.6))
    for call in model.calls:
        assert call["clip_drop"].tolist() == [False] * 4 + [True] * 2
        assert torch.equal(call["clip_embedding"][:4], torch.cat([embedding[:, 0], embedding[:, 1]]))


def test_a_clip_scale_of_zero_is_clip_off_and_any_other_reaches_the_model() -> None:
    off, model = Recorder(), Recorder()
    without = draw(off)
    assert torch.equal(draw(model, clip_embedding=torch.randn(1, 24), clip_scale=0.0), without)
    assert all("clip_embedding" not in call for call in model.calls)
    draw(model, clip_embedding=torch.randn(1, 24), clip_scale=0.7)
    assert model.calls[-1]["clip_scale"] == 0.7


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"clip_scale": -0.1}, "clip_scale is -0.1"),
        ({"clip_scale": float("nan")}, "clip_scale is nan"),
        ({"clip_guidance": 2.0}, "without a CLIP embedding"),
        ({"clip_guidance": float("inf"), "clip_embedding": torch.ones(1, 24)}, "clip_guidance is inf"),
    ],
)
def test_what_cannot_be_drawn_by_is_refused(options: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        draw(Recorder(), **options)


def test_guidance_one_is_a_single_pass_with_the_same_result() -> None:
    model = Recorder()
    single = draw(model, guidance=1.0)
    assert all(len(call["x"]) == 1 for call in model.calls)
    torch.testing.assert_close(draw(model, guidance=1.0 + 1e-9), single)
    assert len(model.calls[-1]["x"]) == 2
    assert not torch.allclose(draw(model, guidance=5.0), single, atol=1e-3)


def test_an_empty_caption_alone_is_a_single_pass() -> None:
    """Both passes of guidance would be the same one."""
    model = Recorder()
    unguided = draw(model, captions=("", ""), guidance=1.0)
    assert torch.equal(draw(model, captions=("", ""), guidance=3.0), unguided)
    assert len(model.calls[-1]["x"]) == 2
    draw(model, captions=("", "a"), guidance=3.0)
    assert len(model.calls[-1]["x"]) == 4
    draw(model, captions=("", ""), guidance=3.0, clip_embedding=torch.randn(2, 24))
    assert len(model.calls[-1]["x"]) == 4


def test_the_model_sees_original_timesteps_in_descending_order() -> None:
    model = Recorder()
    draw(model, steps=4)
    assert [call["timesteps"].unique().item() for call in model.calls] == [999, 666, 333, 0]


@pytest.mark.parametrize("fails", [False, True])
def test_dropout_is_off_meanwhile_and_restored(fails: bool) -> None:
    model = Recorder().train()

    def stop(steps: range) -> range:
        if fails:
            raise KeyboardInterrupt
        return steps

    if fails:
        with pytest.raises(KeyboardInterrupt):
            draw(model, progress=stop)
    else:
        draw(model, progress=stop)
        assert not any(call["training"] for call in model.calls)
    assert model.training


def test_progress_sees_every_step() -> None:
    seen: list[int] = []

    def progress(steps: range) -> Any:
        assert len(steps) == 4
        for step in steps:
            seen.append(step)
            yield step

    draw(Recorder(), progress=progress)
    assert seen == [3, 2, 1, 0]


def test_noise_can_be_given_and_scaled() -> None:
    model = Recorder()
    noise = torch.randn(1, 3, 16, 16)  # another side than the model's: noise decides
    assert draw(model, noise=noise, noise_scale=0.5).shape == noise.shape
    assert torch.equal(model.calls[0]["x"][:1], 0.5 * noise)


def test_low_res_is_rounded_to_bytes() -> None:
    model = Recorder()
    low_res = torch.rand(1, 3, 2, 2) * 2 - 1
    draw(model, low_res=low_res)
    seen = model.calls[0]["low_res"]
    assert seen.shape == (2, 3, 2, 2)
    levels = (seen[:1] + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert 0 < (seen[:1] - low_res).abs().max() <= 0.5 / 127.5 + 1e-6


def test_without_the_noisiest_steps_an_upsampler_begins_at_the_small_picture() -> None:
    low_res, noise = torch.full((1, 3, 2, 2), 0.6), torch.randn(1, 3, 8, 8)
    whole, short = Recorder(), Recorder()
    draw(whole, steps="3,3", low_res=low_res, noise=noise)
    assert torch.equal(whole.calls[0]["x"][:1], noise)
    draw(short, steps="3,0", low_res=low_res, noise=noise)
    alpha_bar = float(create_diffusion("squaredcos_cap_v2", respacing="3,0").alphas_cumprod[-1])
    began = 0.6 * alpha_bar**0.5 + (1 - alpha_bar) ** 0.5 * noise
    torch.testing.assert_close(short.calls[0]["x"][:1], began, rtol=0, atol=3e-3)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_known_pixels_stay(sampler: str) -> None:
    model = Recorder()
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    result = draw(model, sampler=sampler, inpaint_image=image, inpaint_mask=mask)
    torch.testing.assert_close(result[..., :4], image[..., :4], rtol=0, atol=1e-4)
    assert not torch.allclose(result[..., 4:], image[..., 4:], atol=0.1)
    assert model.calls[0]["inpaint_mask"].shape == (2, 1, 8, 8)


def test_eta_adds_noise_to_ddim() -> None:
    model = Recorder()
    noise = torch.randn(1, 3, 8, 8)

    def draw_with(eta: float, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return draw(model, noise=noise, sampler="ddim", eta=eta, generator=generator)

    assert torch.equal(draw_with(0.0, 1), draw_with(0.0, 2))
    assert not torch.equal(draw_with(1.0, 1), draw_with(1.0, 2))


def test_a_sampler_is_added_by_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAMPLERS, "loud", lambda diffusion, output, x_t, t, noise: 5 * noise)
    assert draw(Recorder(), sampler="loud").abs().max() == 1  # pictures end in [-1, 1] whatever it does


def test_options_without_effect_are_errors() -> None:
    with pytest.raises(GlideError, match=r"eta=0.5 has no effect on sampler 'ddpm'"):
        draw(Recorder(), eta=0.5)
    with pytest.raises(GlideError, match=r"'heun' does not exist; choose one of ddpm, ddim"):
        draw(Recorder(), sampler="heun")


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_an_exact_denoiser_reproduces_the_distribution(sampler: str) -> None:
    """Data N(0.2, 0.25^2) has a known best reverse step; its samples must have that mean and deviation."""
    diffusion = create_diffusion("squaredcos_cap_v2", respacing=100)
    mean, std = 0.2, 0.25

    class Exact(Recorder):
        def forward(self, x: Tensor, timesteps: Tensor, **_: Any) -> Tensor:
            t = torch.searchsorted(torch.tensor(diffusion.timestep_map), timesteps)
            signal = diffusion.table("sqrt_alphas_cumprod", t)
            sigma = diffusion.table("sqrt_one_minus_alphas_cumprod", t)
            total = signal**2 * std**2 + sigma**2
            eps = sigma * (x - signal * mean) / total
            doubt = diffusion.table("posterior_mean_coef1", t) ** 2 * std**2 * sigma**2 / total
            variance = diffusion.table("posterior_variance", t) + doubt
            low = diffusion.table("posterior_log_variance_clipped", t)
            v = 2 * (variance.log() - low) / (diffusion.table("log_betas", t) - low) - 1
            return torch.cat([eps, v.expand_as(x)], dim=1)

    tokens, mask = encode([""])
    pictures = sample(
        Exact(),
        diffusion,
        tokens=tokens,
        mask=mask,
        sampler=sampler,
        guidance=1.0,
        noise=torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        generator=torch.Generator().manual_seed(1),
    )
    assert pictures.mean().item() == pytest.approx(mean, abs=0.01)
    # Its noise has the least variance that fits, not the best one.
    assert pictures.std().item() == pytest.approx(std, abs=0.02 if sampler == "euler-a" else 0.01)


def test_outside_of_the_interval_nothing_is_guided_and_one_pass_is_taken() -> None:
    model = Recorder()
    draw(model, guidance_interval=(0.3, 5.0))  # of levels 0.006, 0.6, 1.7 and 20,000
    assert [len(call["x"]) for call in model.calls] == [1, 2, 2, 1]
    assert not torch.equal(draw(model, guidance_interval=(0.3, 5.0)), draw(model))
    torch.testing.assert_close(draw(model, guidance_interval=(0.0, float("inf"))), draw(model))


def test_rescaling_changes_the_picture() -> None:
    class Louder(Recorder):
        def forward(self, x: Tensor, timesteps: Tensor, **conditions: Any) -> Tensor:
            return super().forward(x, timesteps, **conditions) * (
                1 + conditions["text"].pooled[:, :, None, None]
            )

    assert not torch.equal(draw(Louder(), guidance_rescale=0.7), draw(Louder()))


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_generator_for_each_picture_makes_it_independent_of_the_others(sampler: str) -> None:
    def seeded(*seeds: int) -> Tensor:
        own = [torch.Generator().manual_seed(seed) for seed in seeds]
        return draw(Recorder(), captions=("a",) * len(seeds), sampler=sampler, generator=own)

    three = seeded(5, 6, 7)
    torch.testing.assert_close(three[1:2], seeded(6))
    torch.testing.assert_close(three.flip(0), seeded(7, 6, 5))
