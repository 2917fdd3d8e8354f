"""AdamW8bit: the map, the three implementations against each other, the optimizer, and ZeRO-2 over gloo."""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glide_ds.errors import CheckpointError, ConfigError
from glide_ds.training.zero import optimizer as module
from glide_ds.training.zero.optimizer import MIN_SIZE, MOMENT_KEYS, AdamW8bit, Coefficients, Moments

RAGGED = 20 * 256 + 77
GROUP = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "maximize": False}
ROOT = str(Path(__file__).parents[2])
HAS_TRITON = importlib.util.find_spec("triton") is not None


def leaf(size: int | tuple[int, ...] = RAGGED, seed: int = 0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(seed)))


def gradient(p: Tensor, seed: int) -> Tensor:
    """Magnitudes over six decades, as gradients have them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(p.shape, generator=generator) * 10 ** (-6 * torch.rand(p.shape, generator=generator))


def train(optimizer: torch.optim.Optimizer, p: Tensor, steps: range) -> Tensor:
    for step in steps:
        p.grad = gradient(p, step)
        optimizer.step()
    return p.detach().clone()


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("fused", [True, False])
def test_fp32_adamw_is_torchs_own_to_the_bit(fused: bool):
    ours, theirs = (leaf(), leaf())
    options = {"lr": 1e-2, "betas": (0.9, 0.98), "weight_decay": 0.1, "fused": fused}
    stepped = train(module.AdamW([ours], **options), ours, range(5))
    assert torch.equal(stepped, train(torch.optim.AdamW([theirs], **options), theirs, range(5)))


# --- the map ---


def test_maps_hold_zero_and_the_ends_and_signed_is_symmetric():
    signed, unsigned = module.code_map(True), module.code_map(False)
    assert signed[:128].diff().gt(0).all()
    assert unsigned.diff().gt(0).all()
    assert torch.equal(signed[128:], -signed[:128])
    assert [signed[0], signed[127], signed[255], unsigned[0], unsigned[255]] == [0, 1, -1, 0, 1]


@pytest.mark.parametrize("signed", [True, False])
def test_error_is_at_most_half_a_cell_of_the_level(signed: bool):
    x = gradient(torch.empty(64 * 256), 0)
    x = x if signed else x.abs()
    restored = module.dequantize(*module.quantize(x, signed), signed)
    largest = x.view(-1, 256).abs().amax(1, keepdim=True)
    relative, error = (x.view(-1, 256) / largest).abs(), ((x - restored).view(-1, 256) / largest).abs()
    top = 6 if signed else 7
    level = (top - torch.floor(-torch.log2(relative) / 3)).clamp(0, top)
    half_cell = torch.where(level > 0, 7 / 8 * 8 ** (level - top) / 2**level / 2, 8.0**-top)
    assert (error <= half_cell * 1.001).all()
    assert (error.view(-1) > 0).any()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [1, 255, 256, 257, 40 * 256 + 3])
def test_quantising_again_changes_nothing(signed: bool, size: int):
    x = gradient(torch.empty(size), 1)
    codes, scale = module.quantize(x if signed else x.abs(), signed)
    again, scale_again = module.quantize(module.dequantize(codes, scale, signed), signed)
    assert torch.equal(codes, again)
    assert torch.equal(scale, scale_again)


def test_zeros_stay_zeros():
    codes, scale = module.quantize(torch.zeros(300), signed=True)
    assert (codes == 0).all()
    assert (module.dequantize(codes, scale, signed=True) == 0).all()


# --- the kernels against the reference ---


def random_state(size: int, device: str = "cpu") -> tuple[Tensor, Tensor, Moments]:
    """Every code of both maps in use; one block of zeros."""
    generator = torch.Generator().manual_seed(3)
    blocks = -(-size // 256)
    codes = [torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.rand(blocks, generator=generator) * 1e-2 for _ in range(2)]
    p, g = torch.randn(size, generator=generator), gradient(torch.empty(size), 2)
    g[256:512] = 0
    codes[0][256:512] = codes[1][256:512] = 0
    state = Moments(codes[0], scales[0], codes[1], scales[1])
    return p.to(device), g.to(device), Moments(*(t.to(device) for t in state))


def assert_same_step(step: Any, size: int, device: str = "cpu") -> None:
    c = Coefficients.at(GROUP, 5)
    p, g, state = random_state(size)
    module._step_torch(p, g, state, c)
    p_other, g_other, other = random_state(size, device)
    step(p_other, g_other, other, c)
    torch.testing.assert_close(p_other.cpu(), p, rtol=2e-6, atol=2e-6)
    for name in ("avg", "root"):
        scale, codes = getattr(state, f"{name}_scale"), getattr(state, name).int()
        torch.testing.assert_close(getattr(other, f"{name}_scale").cpu(), scale, rtol=1e-6, atol=0)
        off = (getattr(other, name).cpu().int() - codes).abs()
        assert off.max() <= 1
        assert (off > 0).float().mean() < 1e-3


def test_without_a_kernel_it_says_how_slow_it_is(caplog):
    module._implementation.cache_clear()
    with caplog.at_level(logging.WARNING):
        optimizer = AdamW8bit([torch.nn.Parameter(torch.ones(8192))])
        optimizer.param_groups[0]["params"][0].grad = torch.ones(8192)
        optimizer.step()
    assert "no kernel for 'cpu' here" in caplog.text


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.slow
def test_triton_kernel_in_the_interpreter_steps_like_the_reference():
    """In a process of its own: Triton reads the switch when it is imported, and others import it too."""
    done = subprocess.run(
        [sys.executable, __file__, "interpret"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("size", [RAGGED, 4096 * 256])
def test_cuda_steps_like_the_reference(size: int):
    assert_same_step(module._implementation("cuda"), size, "cuda")


# --- the optimizer ---


def test_small_tensors_step_exactly_as_adamw():
    p, q = leaf(MIN_SIZE - 1), leaf(MIN_SIZE - 1)
    ours, theirs = train(AdamW8bit([p]), p, range(5)), train(torch.optim.AdamW([q]), q, range(5))
    assert torch.equal(ours, theirs)


def test_a_group_may_keep_fp32_moments_and_then_steps_as_adamw():
    """What norms and biases are given: ZeRO makes one large tensor of them."""
    p, q = leaf(), leaf()
    optimizer = AdamW8bit([{"params": [p], "quantize": False}])
    assert torch.equal(train(optimizer, p, range(5)), train(torch.optim.AdamW([q]), q, range(5)))
    assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("quantize", [True, False])
def test_loading_takes_the_form_of_this_optimizers_groups(quantize: bool):
    p, q = leaf(), leaf()
    before, after = AdamW8bit([p], quantize=not quantize), AdamW8bit([q], quantize=quantize)
    train(before, p, range(3))
    after.load_state_dict(before.state_dict())
    assert (MOMENT_KEYS[0] in after.state[q]) == quantize
    expected, actual = (o.state_dict_fp32()["state"][0]["exp_avg"].flatten() for o in (before, after))
    assert (actual - expected).norm() / expected.norm() < 0.02
    train(after, q, range(3, 4))  # and goes on
    assert (MOMENT_KEYS[0] in after.state[q]) == quantize


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"weight_decay": 0.5, "betas": (0.8, 0.99)}])
def test_first_step_equals_adamw(options: dict[str, Any]):
    p, q = leaf(), leaf()
    ours = train(AdamW8bit([p], lr=0.1, **options), p, range(1))
    theirs = train(torch.optim.AdamW([q], lr=0.1, **options), q, range(1))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_stays_near_adamw():
    """Each gradient anew over six decades: the case in which a second moment kept as it is goes astray."""
    p, q = leaf(), leaf()
    start = p.detach().clone()
    ours = train(AdamW8bit([p]), p, range(50)) - start
    theirs = train(torch.optim.AdamW([q]), q, range(50)) - start
    assert (ours - theirs).norm() / theirs.norm() < 0.06


def test_state_takes_two_bytes_and_a_scale():
    p = leaf(10_000)
    optimizer = AdamW8bit([p])
    train(optimizer, p, range(1))
    bytes_used = sum(t.numel() * t.element_size() for t in optimizer.state[p].values())
    assert bytes_used / p.numel() <= 2.1


@pytest.mark.parametrize("size", [RAGGED, 100])
def test_resume_is_bit_exact(size: int):
    p = leaf(size)
    optimizer = AdamW8bit([p])
    train(optimizer, p, range(3))
    q = torch.nn.Parameter(p.detach().clone())
    resumed = AdamW8bit([q])
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    expected, actual = train(optimizer, p, range(3, 6)), train(resumed, q, range(3, 6))
    assert torch.equal(actual, expected)
    for key, value in optimizer.state[p].items():
        assert value.dtype == resumed.state[q][key].dtype
        assert torch.equal(value, resumed.state[q][key])


def test_loading_copies():
    p, q = leaf(), leaf()
    optimizer, other = AdamW8bit([p]), AdamW8bit([q])
    train(optimizer, p, range(1))
    other.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict()["state"])
    train(other, q, range(2))
    assert all(torch.equal(before[0][k], v) for k, v in optimizer.state[p].items())


def test_fp32_round_trip_is_exact_and_keeps_adamws_names():
    p, q = leaf(), leaf()
    optimizer, other = AdamW8bit([p]), AdamW8bit([q])
    train(optimizer, p, range(3))
    fp32 = through_file(optimizer.state_dict_fp32())
    assert set(fp32["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert fp32["state"][0]["exp_avg_sq"].shape == p.shape
    other.load_state_dict(fp32)
    assert all(torch.equal(optimizer.state[p][k], other.state[q][k]) for k in ("step", *MOMENT_KEYS))


def test_fp32_state_equals_adamws_within_the_maps_error():
    p, q = leaf(), leaf()
    optimizer, reference = AdamW8bit([p]), torch.optim.AdamW([q])
    train(optimizer, p, range(1))
    train(reference, q, range(1))
    for key in ("exp_avg", "exp_avg_sq"):
        expected, actual = reference.state[q][key], optimizer.state_dict_fp32()["state"][0][key]
        assert (actual - expected).norm() / expected.norm() < 0.02


def test_takes_over_from_adamw():
    p, q = leaf(), leaf()
    reference = torch.optim.AdamW([q])
    train(reference, q, range(3))
    optimizer = AdamW8bit([p])
    optimizer.load_state_dict(reference.state_dict())
    assert set(optimizer.state[p]) == {"step", *MOMENT_KEYS}
    assert optimizer.state[p]["step"] == 3


def test_moments_put_into_state_are_quantised_at_the_next_step():
    """DeepSpeed's universal checkpoint writes to `.state` and never calls load_state_dict."""
    p, q = leaf(), leaf()
    optimizer, other = AdamW8bit([p]), AdamW8bit([q])
    train(optimizer, p, range(3))
    q.data.copy_(p.data)
    other.state[q].update(copy.deepcopy(optimizer.state_dict_fp32()["state"][0]))
    assert torch.equal(train(optimizer, p, range(3, 5)), train(other, q, range(3, 5)))
    assert "exp_avg" not in other.state[q]


def test_padding_without_gradient_stays_finite_and_zero():
    p = torch.nn.Parameter(torch.zeros(RAGGED))
    optimizer = AdamW8bit([p])
    for _ in range(3):
        p.grad = torch.zeros(RAGGED)
        p.grad[:1000] = 1
        optimizer.step()
    assert (p[1000:] == 0).all()
    assert (p[:1000] != 0).all()


def test_nan_gradient_shows():
    p = leaf()
    optimizer = AdamW8bit([p])
    p.grad = torch.ones(RAGGED)
    p.grad[5] = torch.nan
    optimizer.step()
    assert p[5].isnan()
    assert optimizer.state[p]["exp_avg_scale"][0].isnan()


@pytest.mark.parametrize("change", ["channels_last", "bfloat16"])
def test_parameters_that_are_not_flat_fp32(change: str):
    p = leaf((32, 16, 3, 3))
    data = (
        p.detach().to(memory_format=torch.channels_last) if change == "channels_last" else p.detach().bfloat16()
    )
    q = torch.nn.Parameter(data)
    optimizer, other = AdamW8bit([p], lr=0.1), AdamW8bit([q], lr=0.1)
    for step in range(2):
        p.grad = gradient(p, step)
        q.grad = p.grad.to(q.dtype)
        optimizer.step()
        other.step()
    tolerance = 0 if change == "channels_last" else 0.05
    torch.testing.assert_close(q.detach().float(), p.detach(), rtol=tolerance, atol=tolerance)


def test_steps_count_per_parameter():
    p, q = leaf(seed=1), leaf(seed=2)
    optimizer = AdamW8bit([{"params": [p]}, {"params": [q]}])
    train(optimizer, p, range(3))
    train(optimizer, q, range(1))  # p keeps its last gradient and is stepped too
    assert [optimizer.state[t]["step"].item() for t in (p, q)] == [4, 1]


def test_closure_and_learning_rate_schedule():
    p = leaf()
    optimizer = AdamW8bit([p], lr=1.0, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    assert optimizer.step(closure) == before.square().sum()
    moved = p.detach().clone()
    assert not torch.equal(moved, before)
    scheduler.step()
    optimizer.step(closure)
    assert torch.equal(p, moved)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (0.9, 1.0)}, "betas[1] is 1.0"),
        ({"eps": float("nan")}, "eps is nan"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], named: str):
    with pytest.raises(ConfigError) as error:
        AdamW8bit([leaf()], **options)
    assert named in str(error.value)


def test_state_of_another_world_size_is_refused():
    p = leaf()
    optimizer = AdamW8bit([p])
    train(optimizer, p, range(1))
    with pytest.raises(CheckpointError, match="5197 elements where a parameter of 10000"):
        AdamW8bit([leaf(10_000)]).load_state_dict(optimizer.state_dict())


def test_state_of_another_optimizer_is_refused():
    p = leaf()
    sgd = torch.optim.SGD([p], momentum=0.9)
    train(sgd, p, range(1))
    groups = AdamW8bit([p]).state_dict()["param_groups"]
    with pytest.raises(CheckpointError, match="momentum_buffer"):
        AdamW8bit([leaf()]).load_state_dict({"state": sgd.state_dict()["state"], "param_groups": groups})


def test_sparse_gradients_are_refused():
    p = leaf((100, 64))
    p.grad = torch.zeros(100, 64).to_sparse()
    with pytest.raises(ConfigError, match="sparse"):
        AdamW8bit([p]).step()


def student() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(32, 385), torch.nn.GELU(), torch.nn.Linear(385, 8))


def regression_batch(step: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """A smooth function with noise: new samples at each step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 32, generator=generator)
    return x, (2 * x[:, :8]).sin() + x[:, 8:16] + 0.3 * torch.randn(size, 8, generator=generator)


def regression_loss(model: torch.nn.Module, step: int, size: int = 64) -> Tensor:
    x, y = regression_batch(step, size)
    return (model(x) - y).square().mean()


def regress(make: Any, seed: int, steps: int = 150) -> float:
    """Loss on held-out samples after training on new ones."""
    torch.manual_seed(seed)
    model = student()
    optimizer = make(model.parameters(), lr=2e-3)
    for step in range(steps):
        optimizer.zero_grad()
        regression_loss(model, step).backward()
        optimizer.step()
    with torch.no_grad():
        return regression_loss(model, 10**6, 4096).item()


def test_trains_as_well_as_adamw():
    ours, theirs = ([regress(make, seed) for seed in range(2)] for make in (AdamW8bit, torch.optim.AdamW))
    assert sum(ours) == pytest.approx(sum(theirs), rel=0.01)
    assert sum(ours) < 2 * 0.8  # it learned: 1.6 is the variance


# --- DeepSpeed ZeRO-2, real processes ---


def run_ranks(world_size: int, action: str, folder: Path) -> None:
    """Run this file as `world_size` gloo processes; fail with their output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    shared |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": ROOT}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, action, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]


def engine_of(model: torch.nn.Module, universal: bool = False) -> Any:
    import deepspeed

    config = {
        "train_batch_size": 64,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000},
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": universal},
    }
    return deepspeed.initialize(model=model, optimizer=AdamW8bit(model.parameters(), lr=2e-3), config=config)[0]


def train_engine(engine: Any, steps: range) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for step in steps:
        x, y = (t.chunk(world_size)[rank] for t in regression_batch(step))
        engine.backward((engine(x) - y).square().mean())
        engine.step()


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def fresh_student() -> torch.nn.Module:
    torch.manual_seed(0)
    return student()


def check_resume(folder: Path) -> None:
    """Under the engine: 8-bit state, learns as AdamW does, saves and continues bit for bit."""
    import deepspeed

    engine = engine_of(fresh_student())
    train_engine(engine, range(300))
    flat = engine.optimizer.single_partition_of_fp32_groups[0]
    assert engine.optimizer.optimizer.state[flat]["exp_avg_codes"].dtype == torch.uint8
    with torch.no_grad():
        loss = regression_loss(engine.module, 10**6, 4096).item()
    assert loss == pytest.approx(regress(torch.optim.AdamW, seed=0), rel=0.01)
    engine.save_checkpoint(str(folder), tag="a")
    train_engine(engine, range(300, 303))

    torch.manual_seed(1)
    other = engine_of(student())
    other.load_checkpoint(str(folder), tag="a")
    train_engine(other, range(300, 303))
    assert torch.equal(weights(other.module), weights(engine.module))
    deepspeed.comm.destroy_process_group()


def check_save(folder: Path) -> None:
    """Write a checkpoint after 20 steps, and the weights after 25."""
    engine = engine_of(fresh_student())
    train_engine(engine, range(20))
    engine.save_checkpoint(str(folder / "native"), tag="a")
    train_engine(engine, range(20, 25))
    if engine.global_rank == 0:
        torch.save(weights(engine.module), folder / "after25.pt")


def check_universal(folder: Path) -> None:
    """Go on from the universal checkpoint of another world size: the weights after 25 steps are the same."""
    engine = engine_of(fresh_student(), universal=True)
    start = weights(engine.module)
    engine.load_checkpoint(str(folder / "universal"), tag="a")
    engine.save_checkpoint(str(folder / "native"), tag="a")
    train_engine(engine, range(20, 25))
    flat = engine.optimizer.single_partition_of_fp32_groups[0]
    assert engine.optimizer.optimizer.state[flat]["exp_avg_codes"].dtype == torch.uint8
    expected = torch.load(folder / "after25.pt", weights_only=True)
    assert (weights(engine.module) - expected).norm() / (expected - start).norm() < 0.005


def convert(folder: Path) -> None:
    """From the native checkpoint to the universal one, by way of fp32 moments."""
    for file in (folder / "native" / "a").glob("*_optim_states.pt"):
        saved = torch.load(file, weights_only=False)
        inner = saved["optimizer_state_dict"]
        inner["base_optimizer_state"] = module.state_dict_to_fp32(inner["base_optimizer_state"])
        torch.save(saved, file)
    shutil.rmtree(folder / "universal", ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += [
        "--input_folder",
        str(folder / "native" / "a"),
        "--output_folder",
        str(folder / "universal" / "a"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.rmtree(folder / "native")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_zero2_trains_and_resumes_bit_exactly(world_size: int, tmp_path: Path):
    run_ranks(world_size, "resume", tmp_path)


@pytest.mark.slow
def test_zero2_from_two_ranks_to_one_and_back(tmp_path: Path):
    run_ranks(2, "save", tmp_path)
    convert(tmp_path)
    run_ranks(1, "universal", tmp_path)
    convert(tmp_path)
    run_ranks(2, "universal", tmp_path)


def main(action: str, *folder: str) -> None:
    if action == "interpret":
        assert_same_step(module._step_triton, RAGGED)
        return
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its build takes half a minute
    {"resume": check_resume, "save": check_save, "universal": check_universal}[action](Path(*folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
