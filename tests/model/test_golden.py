"""Small models against the published code: forward pass, text, training losses, gradients, sampling."""

from functools import cache, partial

import numpy as np
import pytest
import torch
from golden_kit import GOLDEN, captions, check, golden_inputs, golden_model, raw
from torch import Tensor

from glide_ds.diffusion import Diffusion, create_diffusion, sample
from glide_ds.diffusion.guidance import guide
from glide_ds.diffusion.samplers import ddim_step, ddpm_step
from glide_ds.diffusion.sampling import run_steps
from glide_ds.model.text import TextEncoding
from glide_ds.model.unet import timestep_embedding

SMALL = ["small_base", "small_sr", "small_inpaint", "small_srinpaint"]
DTYPES = [torch.float32, torch.float64]
SIDE = GOLDEN["models"]["small_base"]["image_size"]
GUIDANCE = GOLDEN["guidance"]


@pytest.mark.parametrize("case", SMALL)
def test_parameters_are_filled_by_the_rule(case: str) -> None:
    state = golden_model(case, torch.float64).state_dict()
    for name, expected in GOLDEN["models"][case]["fill_check"].items():
        assert list(state[name].shape) == expected["shape"]
        assert state[name].flatten()[:2].tolist() == pytest.approx(expected["first2"], abs=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL)
def test_forward(case: str, dtype: torch.dtype) -> None:
    expected = GOLDEN["models"][case]
    model = golden_model(case, dtype)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["n_params"]
    with torch.no_grad():
        output = model(**golden_inputs(case, dtype))
    check(output, expected["f64"])
    if dtype == torch.float32:
        check(output, expected["f32"])


@pytest.mark.parametrize("case", SMALL)
def test_text_encoding(case: str) -> None:
    inputs = golden_inputs(case, torch.float64)
    text = golden_model(case, torch.float64).encode_text(inputs["tokens"], inputs["mask"])
    check(text.pooled, GOLDEN["models"][case]["xf_proj_f64"])
    check(text.tokens.transpose(1, 2).contiguous(), GOLDEN["models"][case]["xf_out_f64"])


@pytest.mark.parametrize("case", SMALL)
def test_every_block(case: str) -> None:
    model = golden_model(case, torch.float64)
    seen: dict[str, Tensor] = {}
    names = [name for name, *_ in GOLDEN["models"][case]["block_l2_f64"]]
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name in names
    ]
    with torch.no_grad():
        model(**golden_inputs(case, torch.float64))
    for hook in hooks:
        hook.remove()
    for name, shape, l2 in GOLDEN["models"][case]["block_l2_f64"]:
        assert list(seen[name].shape) == shape
        assert seen[name].norm().item() == pytest.approx(l2, rel=1e-10)


@pytest.mark.parametrize("width", [int(width) for width in GOLDEN["timestep_embedding"]])
def test_timestep_embedding(width: int) -> None:
    expected = GOLDEN["timestep_embedding"][str(width)]
    embedding = timestep_embedding(torch.tensor(expected["t"]), width)
    assert embedding.shape == (len(expected["t"]), width)
    torch.testing.assert_close(embedding[:, expected["cols"]], torch.tensor(expected["out"]), rtol=0, atol=1e-6)


def training_inputs() -> tuple[Tensor, Tensor, Tensor]:
    x0 = raw("train/x0", (4, 3, SIDE, SIDE)).tanh()
    x0[:, :, 0, 0], x0[:, :, 0, 1] = -1, 1
    return x0, torch.tensor(GOLDEN["train"]["timesteps"]), raw("train/noise", (4, 3, SIDE, SIDE))


@pytest.mark.parametrize("schedule", list(GOLDEN["train"]["schedules"]))
def test_training_losses_and_gradients(schedule: str) -> None:
    expected = GOLDEN["train"]["schedules"][schedule]
    diffusion = create_diffusion(schedule)
    model = golden_model("small_base", torch.float64)
    x0, t, noise = training_inputs()
    x_t = diffusion.q_sample(x0, t, noise)
    check(x_t, expected["q_sample"])
    tokens, mask = captions(GOLDEN["train"]["captions"])
    losses = diffusion.losses(model(x_t, diffusion.model_timesteps(t), tokens, mask), x0, x_t, t, noise)
    assert losses["mse"].tolist() == pytest.approx(expected["mse"], rel=1e-10)
    assert losses["vb"].tolist() == pytest.approx(expected["vb_bits"], rel=1e-10)
    hybrid = (losses["mse"] + losses["vb"]).tolist()
    assert hybrid == pytest.approx(expected["hybrid_mse_plus_vb"], rel=1e-10)

    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(losses["mse"].mean(), list(parameters.values()))
    norms = {name: gradient.norm().item() for name, gradient in zip(parameters, gradients, strict=True)}
    assert np.linalg.norm(list(norms.values())) == pytest.approx(
        expected["grad_total_l2_of_mean_mse"], rel=1e-10
    )
    for name, norm in expected["grad_l2"].items():
        assert norms[name] == pytest.approx(norm, rel=1e-9), name


@cache
def guidance_text() -> TextEncoding:
    with torch.no_grad():
        return golden_model("small_base", torch.float64).encode_text(*captions(GUIDANCE["captions"]))


def guided_model(diffusion: Diffusion, x: Tensor, t: Tensor) -> Tensor:
    """As the published sampler: 4 rows, of which the first half enters twice."""
    half = x[: len(x) // 2]
    with torch.no_grad():
        output = golden_model("small_base", torch.float64)(
            torch.cat([half, half]), diffusion.model_timesteps(t), text=guidance_text()
        )
    return guide(output, GUIDANCE["scale"])


def test_guidance() -> None:
    x = raw("cfg/x", (2, 3, SIDE, SIDE)).repeat(2, 1, 1, 1)
    diffusion = create_diffusion("squaredcos_cap_v2")
    check(guided_model(diffusion, x, torch.full((4,), GUIDANCE["timestep"])), GUIDANCE["out"])


@pytest.mark.parametrize("case", list(GOLDEN["sampler_steps"]["steps"]))
def test_sampler_steps(case: str) -> None:
    expected = GOLDEN["sampler_steps"]["steps"][case]
    schedule, respacing, index = case.split(":")
    diffusion = create_diffusion(schedule, respacing=respacing)
    x = raw("cfg/x", (2, 3, SIDE, SIDE)).repeat(2, 1, 1, 1)
    t = torch.full((4,), int(index.removeprefix("i=")))
    assert set(diffusion.model_timesteps(t).tolist()) == {expected["model_t"]}
    noise = raw("step/noise", x.shape)
    output = guided_model(diffusion, x, t)

    check(ddpm_step(diffusion, output, x, t, noise), expected["p_sample"])
    check(ddim_step(diffusion, output, x, t, noise), expected["ddim_eta0_full"])
    check(ddim_step(diffusion, output, x, t, noise), expected["ddim_eta0"])
    check(ddim_step(diffusion, output, x, t, noise, eta=0.7), expected["ddim_eta07"])
    check(diffusion.p_mean_variance(output, x, t).x0, expected["pred_xstart"])
    unclipped = diffusion.p_mean_variance(output, x, t, clip_x0=False)
    check(unclipped.mean, expected["mean_unclipped"])
    check(unclipped.log_variance, expected["log_variance"])


@pytest.mark.slow
@pytest.mark.parametrize(("loop", "step"), [("ddim_loop", ddim_step), ("ancestral_loop", ddpm_step)])
def test_sampling_loops(loop: str, step) -> None:
    diffusion = create_diffusion("squaredcos_cap_v2", respacing=GOLDEN[loop]["steps"])
    x = raw("loop/xT", (4, 3, SIDE, SIDE))
    x[2:] = x[:2]
    images = run_steps(
        diffusion, partial(guided_model, diffusion), x, step, lambda index: raw(f"loop/n{index}", x.shape)
    )
    check(images, GOLDEN[loop]["out"])


def test_sample_draws_the_conditional_rows_of_the_loop() -> None:
    expected = GOLDEN["ddim_loop"]["out"]
    tokens, mask = captions(GUIDANCE["captions"][:2])
    images = sample(
        golden_model("small_base", torch.float32),
        create_diffusion("squaredcos_cap_v2", respacing=GOLDEN["ddim_loop"]["steps"]),
        tokens=tokens,
        mask=mask,
        guidance=GOLDEN["ddim_loop"]["guidance"],
        sampler="ddim",
        noise=raw("loop/xT", (4, 3, SIDE, SIDE))[:2].float(),
    ).flatten()
    pairs = [(i, v) for i, v in zip(expected["idx"], expected["val"], strict=True) if i < len(images)]
    assert len(pairs) > 4
    assert images[[i for i, _ in pairs]].tolist() == pytest.approx([v for _, v in pairs], abs=1e-4)
