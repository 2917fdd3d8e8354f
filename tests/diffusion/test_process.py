"""The forward process, its inverse and the training losses."""

import pytest
import torch
from torch import Tensor

from glide_ds.diffusion import create_diffusion
from glide_ds.diffusion.losses import gaussian_kl


def batch(size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(size, 3, 8, 8, generator=generator) * 2 - 1
    noise = torch.randn(size, 3, 8, 8, generator=generator)
    return x0, torch.tensor([0, 1, 500, 998][:size]), noise


@pytest.mark.parametrize("respacing", [None, "50"])
def test_noise_and_image_imply_each_other(respacing: str | None) -> None:
    diffusion = create_diffusion("squaredcos_cap_v2", respacing=respacing)
    x0, t, noise = (value.double() for value in batch())
    t = t.long() * (diffusion.num_timesteps - 2) // 998
    x_t = diffusion.q_sample(x0, t, noise)
    torch.testing.assert_close(diffusion.predict_x0(noise, x_t, t), x0)
    torch.testing.assert_close(diffusion.predict_eps(x0, x_t, t), noise)


def test_the_model_is_given_original_timesteps() -> None:
    diffusion = create_diffusion("linear", respacing="10")
    t = torch.tensor([9, 0, 3])
    assert diffusion.model_timesteps(t).tolist() == [999, 0, 333]


def test_the_posterior_is_bayes_rule() -> None:
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0)."""
    diffusion = create_diffusion("linear")
    x0, _, noise = (value.double() for value in batch(2))
    t = torch.tensor([1, 700])
    x_t = diffusion.q_sample(x0, t, noise)
    alpha = 1 - diffusion.table("betas", t, torch.float64)
    previous = diffusion.table("alphas_cumprod_prev", t, torch.float64)
    precision = alpha / (1 - alpha) + 1 / (1 - previous)
    mean = (alpha.sqrt() / (1 - alpha) * x_t + previous.sqrt() / (1 - previous) * x0) / precision
    posterior = diffusion.posterior(x0, x_t, t)
    torch.testing.assert_close(posterior.mean, mean)
    torch.testing.assert_close(posterior.log_variance.exp(), (1 / precision).expand_as(x0))


def test_variance_channels_move_between_posterior_and_beta() -> None:
    diffusion = create_diffusion("linear")
    x0, t, noise = batch()
    x_t = diffusion.q_sample(x0, t, noise)
    for v, table in [(-1.0, "posterior_log_variance_clipped"), (1.0, "log_betas")]:
        output = torch.cat([noise, torch.full_like(noise, v)], dim=1)
        log_variance = diffusion.p_mean_variance(output, x_t, t).log_variance
        torch.testing.assert_close(log_variance, diffusion.table(table, t).expand_as(x0))


def test_clipping_is_an_option() -> None:
    diffusion = create_diffusion("linear")
    x0, t, noise = batch()
    output = torch.cat([torch.zeros_like(noise), noise], dim=1)
    assert diffusion.p_mean_variance(output, 3 * x0, t).x0.abs().max() == 1
    assert diffusion.p_mean_variance(output, 3 * x0, t, clip_x0=False).x0.abs().max() > 1


def test_the_perfect_prediction_has_no_loss() -> None:
    diffusion = create_diffusion("squaredcos_cap_v2")
    x0, t, noise = batch()
    x_t = diffusion.q_sample(x0, t, noise)
    losses = diffusion.losses(torch.cat([noise, -torch.ones_like(noise)], dim=1), x0, x_t, t, noise)
    assert losses["mse"].shape == losses["vb"].shape == (4,)
    assert losses["mse"].tolist() == [0] * 4
    assert losses["vb"][1:].abs().max() < 1e-4  # the posterior itself; at t = 0 a likelihood remains
    assert losses["vb"][0] > 0.1


def test_epsilon_learns_from_mse_and_variance_from_the_bound() -> None:
    diffusion = create_diffusion("squaredcos_cap_v2")
    x0, t, noise = batch()
    x_t = diffusion.q_sample(x0, t, noise)
    output = torch.zeros(4, 6, 8, 8, requires_grad=True)
    losses = diffusion.losses(output, x0, x_t, t, noise)
    (mse,) = torch.autograd.grad(losses["mse"].sum(), output, retain_graph=True)
    (vb,) = torch.autograd.grad(losses["vb"].sum(), output)
    assert mse[:, :3].all()
    assert not mse[:, 3:].any()
    assert not vb[:, :3].any()
    assert vb[:, 3:].flatten(1).any(dim=1).all()


def test_losses_are_float32_for_a_bfloat16_model() -> None:
    diffusion = create_diffusion("linear")
    x0, t, noise = batch()
    output, half = torch.cat([noise, noise], dim=1).bfloat16() + 0.1, noise.bfloat16()
    x_t = diffusion.q_sample(x0, t, half)
    losses = diffusion.losses(output, x0, x_t, t, half)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    wide = diffusion.losses(output.float(), x0, x_t, t, half.float())
    torch.testing.assert_close(losses, wide, rtol=0, atol=0)


def test_half_precision_images_are_noised_in_float32() -> None:
    diffusion = create_diffusion("linear")
    x0, t, noise = batch()
    assert diffusion.q_sample(x0.bfloat16(), t, noise.bfloat16()).dtype == torch.float32


def test_tables_are_made_once_per_precision() -> None:
    diffusion = create_diffusion("linear")
    x0, t, noise = batch()
    for _ in range(3):
        diffusion.q_sample(x0, t, noise)
    assert len(diffusion._on_device) == 2
    diffusion.q_sample(x0.double(), t, noise.double())
    assert len(diffusion._on_device) == 4


def test_two_reverse_steps_can_be_compared() -> None:
    """The term that keeps a CLIP-on model near its CLIP-off self needs p as a Gaussian."""
    diffusion = create_diffusion("linear")
    x0, t, noise = batch()
    x_t = diffusion.q_sample(x0, t, noise)
    p = diffusion.p_mean_variance(torch.cat([noise, noise], dim=1), x_t, t, clip_x0=False).gaussian
    assert gaussian_kl(p, p).abs().max() == 0
