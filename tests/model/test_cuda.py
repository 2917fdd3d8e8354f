"""On a GPU: the published code's numbers, and the ways to train that only a GPU has, against the plain one."""

from __future__ import annotations

import copy

import pytest
import torch
from golden_kit import GOLDEN, captions, check, golden_inputs, golden_model, raw
from tiny_glide import CLIP_DIM, tiny_embeddings, tiny_inputs, tiny_model

from glide_ds.diffusion import create_diffusion
from glide_ds.model.attention import Attending
from glide_ds.model.convolution import Conv2d
from glide_ds.model.glide import Glide
from glide_ds.training.speed import compiling
from glide_ds.training.speed import cuda_graph as capturing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
SMALL = ["small_base", "small_sr", "small_inpaint", "small_srinpaint"]
SIDE = GOLDEN["models"]["small_base"]["image_size"]


@pytest.fixture(autouse=True)
def _fp32_is_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


def trained_model() -> Glide:
    """Without dropout, whose random numbers compiled code draws otherwise."""
    return copy.deepcopy(tiny_model(clip_dim=CLIP_DIM, dropout=0.0)).cuda().train()


def on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", SMALL)
def test_golden_forward(case: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(golden_model(case, dtype)).cuda()
    with torch.no_grad():
        output = model(**on_gpu(golden_inputs(case, dtype)))
    check(output.cpu(), GOLDEN["models"][case]["f64"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_golden_losses_and_gradients(layout: torch.memory_format) -> None:
    expected = GOLDEN["train"]["schedules"]["squaredcos_cap_v2"]
    diffusion = create_diffusion("squaredcos_cap_v2")
    model = copy.deepcopy(golden_model("small_base", torch.float64)).cuda()
    x0 = raw("train/x0", (4, 3, SIDE, SIDE)).tanh()
    x0[:, :, 0, 0], x0[:, :, 0, 1] = -1, 1
    x0, t, noise = x0.cuda(), torch.tensor(GOLDEN["train"]["timesteps"]).cuda(), raw("train/noise", x0.shape)
    noise = noise.cuda()
    x_t = diffusion.q_sample(x0, t, noise).contiguous(memory_format=layout)
    tokens, mask = (part.cuda() for part in captions(GOLDEN["train"]["captions"]))
    losses = diffusion.losses(model(x_t, diffusion.model_timesteps(t), tokens, mask), x0, x_t, t, noise)
    assert losses["mse"].tolist() == pytest.approx(expected["mse"], rel=1e-10)
    assert losses["vb"].tolist() == pytest.approx(expected["vb_bits"], rel=1e-10)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(losses["mse"].mean(), list(parameters.values()))
    norms = {name: gradient.norm().item() for name, gradient in zip(parameters, gradients, strict=True)}
    for name, norm in expected["grad_l2"].items():
        assert norms[name] == pytest.approx(norm, rel=1e-9), name


def test_golden_forward_at_full_size() -> None:
    model = golden_model.__wrapped__("full_base", torch.float32).cuda()
    with torch.no_grad():
        output = model(**on_gpu(golden_inputs("full_base", torch.float32)))
    check(output.cpu(), GOLDEN["models"]["full_base"]["f64"])


def outputs_and_gradients(model, inputs) -> list[torch.Tensor]:
    output = model(**inputs)
    parameters = list(model.parameters())
    loss = output.float().square().mean()
    return [output.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)]


def largest_departure(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest ||a - b|| / ||b||, of output and of all gradients that are not tiny beside the largest."""
    pairs = [(a.double(), b.double()) for a, b in zip(got, expected, strict=True) if b is not None]
    floor = 1e-4 * max(b.norm() for _, b in pairs)
    return max(((a - b).norm() / b.norm().clamp(min=floor)).item() for a, b in pairs)


@pytest.mark.parametrize(
    ("layout", "dial", "reduced"),
    [
        (torch.channels_last, "none", False),
        (torch.channels_last, "blocks", False),
        (torch.contiguous_format, "attention", False),
        (torch.channels_last, "none", True),
    ],
)
def test_compiled_blocks_compute_what_eager_ones_do(
    layout: torch.memory_format, dial: str, reduced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", compiling.FORMS)
    model = trained_model()
    inputs = on_gpu(tiny_inputs(model) | {"clip_embedding": tiny_embeddings()})
    inputs["x"] = inputs["x"].contiguous(memory_format=layout)
    model.recompute(dial)
    model.reduce_products(reduced)
    eager = outputs_and_gradients(model, inputs)
    for block in model.blocks().values():
        block.compiled = torch.compile(block.forward, dynamic=False, fullgraph=True)
    compiled = outputs_and_gradients(model, inputs)
    # A rounding to fp16 falls the other way where the last bit of fp32 differs.
    assert 0 < largest_departure(compiled, eager) < (5e-4 if reduced else 2e-5)


def test_bfloat16_follows_float32_in_outputs_and_gradients() -> None:
    model = trained_model()
    inputs = on_gpu(tiny_inputs(model) | {"clip_embedding": tiny_embeddings()})
    expected = outputs_and_gradients(model, inputs)
    got = outputs_and_gradients(copy.deepcopy(model).bfloat16(), inputs)
    assert largest_departure(got[:1], expected[:1]) < 0.03
    whole, want = (
        torch.cat([g.double().flatten() for g in part[1:] if g is not None]) for part in (got, expected)
    )
    assert (whole - want).norm() / want.norm() < 0.05


@pytest.mark.parametrize("size", [1.0, 1e-12, 1e9, 0.0])
def test_reduced_attention_is_as_exact_as_tf32_products(tf32: None, size: float) -> None:
    """Outputs and gradients against fp64, whatever the size of the gradient that arrives."""
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(tokens: int) -> torch.Tensor:
        return torch.randn(4, 6, tokens, 64, generator=generator, device="cuda")

    q, k, v, arriving = drawn(256), drawn(384), drawn(384), drawn(256) * size

    def attended(attend, dtype=torch.float32) -> list[torch.Tensor]:
        inputs = [part.to(dtype).requires_grad_() for part in (q, k, v)]
        output = attend(*inputs)
        return [output.detach(), *torch.autograd.grad(output, inputs, arriving.to(dtype))]

    def by_products(q, k, v):
        return (q @ k.mT * 64**-0.5).softmax(-1) @ v

    module = Attending()
    module.reduced = True
    exact = attended(by_products, torch.float64)
    reduced, products = attended(module.attend), attended(by_products)
    for ours, theirs, want in zip(reduced, products, exact, strict=True):
        assert ours.dtype == torch.float32
        assert ours.isfinite().all()
        if want.any():
            error, tolerated = (((part - want).norm() / want.norm()).item() for part in (ours, theirs))
            assert error < 1.5 * tolerated
        else:
            assert not ours.any()


@pytest.mark.parametrize(("kernel", "channels"), [(3, (192, 384)), (1, (384, 192))])
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e9, 0.0])
def test_a_reduced_convolution_is_as_exact_as_a_tf32_one(
    tf32: None, size: float, kernel: int, channels: tuple[int, int]
) -> None:
    """Output and gradients against fp64, whatever the size of the gradient that arrives."""
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(wide: int) -> torch.Tensor:
        tensor = torch.randn(8, wide, 64, 64, generator=generator, device="cuda")
        return tensor.contiguous(memory_format=torch.channels_last)

    conv = Conv2d(*channels, kernel).cuda()
    x, arriving = drawn(channels[0]), drawn(channels[1]) * size

    def convolved(conv: Conv2d, dtype: torch.dtype) -> list[torch.Tensor]:
        given = x.to(dtype).requires_grad_()
        output = conv(given)
        inputs = [given, conv.weight, conv.bias]
        return [output.detach(), *torch.autograd.grad(output, inputs, arriving.to(dtype))]

    exact, products = convolved(copy.deepcopy(conv).double(), torch.float64), convolved(conv, torch.float32)
    conv.reduced = True
    for ours, theirs, want in zip(convolved(conv, torch.float32), products, exact, strict=True):
        assert ours.dtype == torch.float32
        assert ours.isfinite().all()
        if want.any():
            error, tolerated = (((part - want).norm() / want.norm()).item() for part in (ours, theirs))
            assert error < 1.5 * tolerated + 1e-7
        else:
            assert not ours.any()


def test_reduced_products_in_the_model_change_it_as_tf32_does(tf32: None) -> None:
    model = trained_model()
    inputs = on_gpu(tiny_inputs(model) | {"clip_embedding": tiny_embeddings()})
    plain = outputs_and_gradients(model, inputs)
    model.reduce_products(True)
    reduced = outputs_and_gradients(model, inputs)
    assert 0 < largest_departure(reduced[:1], plain[:1]) < 1e-3
    whole, want = (torch.cat([g.flatten() for g in part[1:] if g is not None]) for part in (reduced, plain))
    assert (whole - want).norm() / want.norm() < 2e-3


def test_a_recorded_step_computes_what_a_launched_one_does() -> None:
    model = trained_model()
    first = on_gpu(tiny_inputs(model) | {"clip_embedding": tiny_embeddings()})
    second = {name: part if name == "tokens" else part.flip(0) for name, part in first.items()}
    expected = [outputs_and_gradients(model, inputs) for inputs in (first, second)]
    capturing.record(model, {name: part.clone() for name, part in first.items()}, accumulation=1)
    for inputs, want in zip((first, second, first), (*expected, expected[0]), strict=True):
        assert largest_departure(outputs_and_gradients(model, inputs), want) < 2e-5
    with torch.no_grad():
        assert torch.equal(model(**first), copy_of_eager(model)(**first))


def copy_of_eager(model: Glide) -> Glide:
    twin = trained_model()
    twin.load_state_dict(model.state_dict())
    return twin


def test_a_recorded_step_draws_new_dropout_each_time_and_the_same_for_a_seed() -> None:
    model = copy.deepcopy(tiny_model(clip_dim=CLIP_DIM, dropout=0.3)).cuda().train()
    inputs = on_gpu(tiny_inputs(model) | {"clip_embedding": tiny_embeddings()})

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(**inputs).detach().clone()

    launched = drawn(1)
    capturing.record(model, {name: part.clone() for name, part in inputs.items()}, accumulation=1)
    one, two, again = drawn(1), drawn(2), drawn(1)
    assert not torch.equal(one, two)
    assert torch.equal(one, again)
    assert torch.equal(one, launched)
