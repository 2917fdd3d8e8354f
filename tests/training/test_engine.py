"""The engine: what it trains, how it clips, what it leaves behind. Also guards DeepSpeed's internals in use."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from train_kit import make_config, opened, shake, state_of

from glide_ds.config import Config
from glide_ds.model import create_model
from glide_ds.model.glide import Glide
from glide_ds.training.loop import train
from glide_ds.training.objective import Losses, Objective
from glide_ds.training.phases import parameter_groups, role_of
from glide_ds.training.setup import PhaseRun, phase_run
from glide_ds.training.zero.engine import ZERO_ATTRIBUTES, lr_ratio

pytestmark = pytest.mark.usefixtures("group")


class Bare:
    """A plain module where Objective expects an engine."""

    def __init__(self, module: Glide) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.module(*args, **kwargs)


def bare_twin(run: PhaseRun) -> Glide:
    model = create_model(run.model.config).to(next(run.model.parameters()).dtype)
    model.load_state_dict(run.model.state_dict())
    model.recompute(run.config.train.recompute)
    return model.train()


def loss_of(run: PhaseRun, engine: Any, step: int = 0) -> Losses:
    return Objective(run.config, run.diffusion, engine, run.clip)(next(run.source.batches(step)), step)


def update(run: PhaseRun, step: int = 0) -> None:
    run.engine.train()
    run.engine.backward(loss_of(run, run.engine, step).total)
    run.engine.step()


def watch_gradients(run: PhaseRun, seen: Callable[[str, Tensor], None]) -> None:
    """Call `seen` with every parameter's reduced gradient [N] at every update, after clipping; on one rank."""
    zero, names = run.engine.optimizer, {id(p): name for name, p in run.model.named_parameters()}
    clip = zero.unscale_and_clip_grads

    def spied(flat: list[Tensor], norm: Tensor) -> None:
        clip(flat, norm)
        (gradient,) = flat
        (group,) = (i for i, p in enumerate(zero.single_partition_of_fp32_groups) if p.grad is gradient)
        parameters, used = zero.params_in_partition[group], 0
        for parameter in parameters:
            seen(names[id(parameter)], gradient[used : used + parameter.numel()])
            used += parameter.numel()

    zero.unscale_and_clip_grads = spied


def clipped_gradients(run: PhaseRun) -> dict[str, Tensor]:
    gradients: dict[str, Tensor] = {}
    watch_gradients(run, lambda name, gradient: gradients.update({name: gradient.clone()}))
    update(run)
    return gradients


# --- what trains ---


def shake_pretrained(model: nn.Module) -> None:
    """GLIDE as after training; the adapter as it is born. A random GLIDE's zero output layer, once frozen,
    would keep every gradient from the adapter for ever."""
    fresh = {name: p.clone() for name, p in model.state_dict().items() if "clip" in name}
    shake(model)
    model.load_state_dict(fresh, strict=False)


@pytest.mark.parametrize(
    "dial", [pytest.param("blocks", marks=pytest.mark.slow), "none"], ids=["recomputing", "keeping"]
)
@pytest.mark.parametrize(
    ("phase", "scope"),
    [
        ("base", "all"),
        ("base", "unet"),
        ("base", "text"),
        ("adapter_only", "all"),
        ("adapter_gates", "all"),
        ("full", "all"),
    ],
)
def test_within_three_steps_all_that_trains_has_a_gradient_and_all_else_stays(
    tmp_path: Path, phase: str, scope: str, dial: str
):
    # Values of a new DualAttention are zero, so its keys, the adapter and the gates wait for the second step.
    config = make_config(
        tmp_path,
        phase,
        train={"scope": scope, "steps": 3, "recompute": dial},
        clip={"drop": 0.3},  # the null embedding learns from dropped samples only
    )
    moved: set[str] = set()
    with opened(config, shake_pretrained) as run:
        before = state_of(run.model)
        trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
        watch_gradients(run, lambda name, gradient: moved.add(name) if gradient.any() else None)
        train(run)
        frozen = [(name, p) for name, p in run.model.named_parameters() if name not in trained]
        assert moved == trained
        for name, parameter in frozen:
            assert parameter.grad is None, name
            assert torch.equal(parameter, before[name]), name
        for name in trained:
            assert not torch.equal(run.model.get_parameter(name), before[name]), name


def test_recomputing_changes_no_gradient(tmp_path: Path):
    gradients = []
    for dial in ("blocks", "none"):
        config = make_config(tmp_path / dial, train={"recompute": dial})
        with opened(config, shake) as run:
            gradients.append(clipped_gradients(run))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_a_fresh_adapter_changes_no_loss(tmp_path: Path, offset: float):
    config = make_config(tmp_path, "adapter_only")
    with opened(config, shake_pretrained) as run:
        run.model.clip_gate_offset.fill_(offset)
        plain = create_model(replace(run.model.config, clip_dim=None))
        plain.load_state_dict({k: v for k, v in run.model.state_dict().items() if "clip" not in k})
        without = Objective(config, run.diffusion, Bare(plain.train()), None)
        batch = next(run.source.batches(0))
        assert torch.equal(loss_of(run, run.engine).mse, without(batch, 0).mse)


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
def test_fp32_weights_of_a_lone_rank_are_their_own_masters(tmp_path: Path, precision: dict[str, Any]):
    """And nothing else keeps a copy of them: each parameter's storage is the optimizer's."""
    with opened(make_config(tmp_path, "full", **precision), shake) as run:
        update(run)
        zero = run.engine.optimizer
        masters = {master.untyped_storage().data_ptr() for master in zero.single_partition_of_fp32_groups}
        for parameter in run.model.parameters():
            assert (parameter.untyped_storage().data_ptr() in masters) is (not precision)
            assert parameter._hp_mapping.hp_fragment.untyped_storage().data_ptr() in masters
            assert torch.equal(parameter._hp_mapping.hp_fragment.to(parameter.dtype), parameter.view(-1))


# --- bare against wrapped ---


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
def test_bare_and_wrapped_losses_and_gradients_agree(tmp_path: Path, precision: dict[str, Any]):
    config = make_config(
        tmp_path,
        train={"kl_weight": 0.5, "kl_every": 1, "loss": "hybrid", "adapter_clipping": 0.0},
        gradient_clipping=0.0,
        **precision,
    )
    with opened(config, shake) as run:
        run.model.clip_gate_offset.fill_(10.0)
        bare = bare_twin(run)
        run.engine.train()
        wrapped, plain = loss_of(run, run.engine), loss_of(run, Bare(bare))
        assert plain.kl is not None
        assert wrapped.kl is not None
        for one, other in zip(wrapped, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
        plain.total.backward()
        gradients = clipped_gradients(run)
        assert gradients.keys() == {name for name, _ in bare.named_parameters()}
        for name, parameter in bare.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(
                gradients[name],
                parameter.grad.view(-1).float(),
                rtol=1e-5,
                atol=1e-7,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.parametrize("bf16", [False, True])
def test_a_lone_rank_is_not_called_for_each_gradient_that_lies_where_it_belongs(tmp_path: Path, bf16: bool):
    """863 calls of Python in each backward pass of the base model, while the GPU waits."""
    for micro in (4, 2):
        config = make_config(
            tmp_path / str(micro),
            bf16={"enabled": bf16},
            train_batch_size=4,
            train_micro_batch_size_per_gpu=micro,
        )
        with opened(config) as run:
            assert bool(run.engine.optimizer._grad_acc_hooks) == (bf16 and micro == 2)


def test_bf16_gradients_add_up_in_fp32(tmp_path: Path):
    config = make_config(
        tmp_path,
        train={"adapter_clipping": 0.0},
        gradient_clipping=0.0,
        bf16={"enabled": True},
        train_micro_batch_size_per_gpu=2,
    )
    with opened(config, shake) as run:
        bare = bare_twin(run)
        gradients: dict[str, Tensor] = {}
        total: dict[str, Tensor] = {}
        watch_gradients(run, lambda name, gradient: gradients.update({name: gradient.clone()}))
        run.engine.train()
        for step in range(2):
            run.engine.backward(loss_of(run, run.engine, step).total)
            run.engine.step()
            (loss_of(run, Bare(bare), step).total / 2).backward()
            for name, parameter in bare.named_parameters():
                assert parameter.grad is not None
                gradient = parameter.grad.float().view(-1)
                total[name] = total[name] + gradient if step else gradient
            bare.zero_grad()
        for name, gradient in gradients.items():
            assert torch.equal(gradient, total[name]), name


def test_the_engine_trains_as_plain_torch_does(tmp_path: Path):
    # A bias before a GroupNorm has no gradient but rounding errors, which Adam would make steps of: hence eps.
    adam = {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.98], "eps": 1e-4, "weight_decay": 0.1}}
    config = make_config(
        tmp_path, train={"adapter_clipping": 0.01, "steps": 3}, gradient_clipping=0.1, optimizer=adam
    )
    with opened(config, shake) as run:
        bare = bare_twin(run)
        optimizer = torch.optim.AdamW(parameter_groups(bare, config), lr=1e-3, betas=(0.9, 0.98), eps=1e-4)
        rates = [group["lr"] for group in optimizer.param_groups]
        for step in range(2):
            update(run, step)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * lr_ratio(step, config)
            optimizer.zero_grad()
            loss_of(run, Bare(bare), step).total.backward()
            for side, threshold in ((("adapter", "gates"), 0.01), (("unet", "text"), 0.1)):
                of_side = [p for name, p in bare.named_parameters() if role_of(name) in side]
                nn.utils.clip_grad_norm_(of_side, threshold)
            optimizer.step()
        for name, parameter in bare.named_parameters():
            torch.testing.assert_close(
                run.model.get_parameter(name),
                parameter,
                rtol=1e-5,
                atol=1e-6,
                msg=lambda m, n=name: f"{n}: {m}",
            )


# --- clipping ---


@pytest.mark.parametrize(("adapter", "main"), [(1e-3, 1e-2), (1e-3, 0.0), (0.0, 1e-2), (1e6, 1e6)])
def test_each_side_is_clipped_to_its_own_norm(tmp_path: Path, adapter: float, main: float):
    config = make_config(tmp_path, train={"adapter_clipping": adapter}, gradient_clipping=main)
    with opened(config, shake) as run:
        run.model.clip_gate_offset.fill_(10.0)
        bare = bare_twin(run)
        loss_of(run, Bare(bare)).total.backward()
        norms = {}
        for side, threshold in ((("adapter", "gates"), adapter), (("unet", "text"), main)):
            of_side = [(role_of(name), p) for name, p in bare.named_parameters() if role_of(name) in side]
            for role in side:
                of_role = [p.grad for r, p in of_side if r == role and p.grad is not None]
                norms[role] = torch.stack([g.norm() for g in of_role]).norm()
            if threshold:
                nn.utils.clip_grad_norm_([p for _, p in of_side], threshold)
        gradients = clipped_gradients(run)
        for name, parameter in bare.named_parameters():
            assert parameter.grad is not None
            difference = (gradients[name] - parameter.grad.view(-1)).norm()
            assert difference <= 1e-6 * max(1e-3, float(parameter.grad.norm())), name
        assert run.engine.role_clipping.norms.keys() == norms.keys()
        for role, norm in norms.items():
            torch.testing.assert_close(run.engine.role_clipping.norms[role], norm, rtol=1e-5, atol=0)


def test_a_gradient_that_is_not_finite_in_one_role_skips_the_step_for_all(tmp_path: Path):
    with opened(make_config(tmp_path), shake) as run:
        update(run)
        before = state_of(run.model)
        run.engine.train()
        gate = run.model.clip_adapter.clip_gate
        run.engine.backward(loss_of(run, run.engine, 1).total + (gate * math.inf).sum())
        run.engine.step()
        assert torch.isinf(run.engine.role_clipping.norms["gates"])
        assert torch.isfinite(run.engine.role_clipping.norms["unet"])
        after = state_of(run.model)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        update(run, 2)  # and training goes on
        changed = state_of(run.model)
        assert all(bool(tensor.isfinite().all()) for tensor in changed.values())
        assert not torch.equal(changed["out.2.weight"], before["out.2.weight"])


# --- the learning rate ---


def scheduled(tmp_path: Path, scheduler: dict[str, Any], steps: int) -> Config:
    return make_config(tmp_path, scheduler=scheduler, train={"steps": steps})


def test_the_cosine_is_deepspeeds(tmp_path: Path):
    from deepspeed.runtime.lr_schedules import WarmupCosineLR

    params = {"warmup_num_steps": 5, "cos_min_ratio": 0.1, "total_num_steps": 20}
    config = scheduled(tmp_path, {"type": "WarmupCosineLR", "params": params}, 20)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = WarmupCosineLR(optimizer, **params)
    for step in range(5, 20):
        theirs.last_batch_iteration = step - 1  # it counts the updates done, from -1 on
        if step > 5:
            assert lr_ratio(step, config) == pytest.approx(theirs.get_lr_ratio())
    assert lr_ratio(5, config) == 1.0
    assert lr_ratio(20, config) == lr_ratio(99, config) == pytest.approx(0.1)


def test_the_warm_up_is_torchs_linear_one(tmp_path: Path):
    params = {"warmup_num_steps": 8, "warmup_min_ratio": 0.2}
    config = scheduled(tmp_path, {"type": "WarmupLR", "params": {"warmup_num_steps": 8}}, 20)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 8, total_iters=7)
    for step in range(12):
        assert lr_ratio(step, config) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    low = scheduled(tmp_path, {"type": "WarmupCosineLR", "params": params}, 20)
    assert lr_ratio(0, low) == pytest.approx(0.2 + 0.8 / 8)
    assert lr_ratio(7, low) == pytest.approx(1.0)
    assert lr_ratio(14, low) == pytest.approx(0.5, abs=1e-4)  # half-way; total_num_steps is train.steps


# --- one engine after another ---


ENGINE_PARTS = ("DeepSpeedEngine", "DeepSpeedZeroOptimizer", "RoleClipping", "AdamW", "LambdaLR")


def census() -> tuple[int, int, int]:
    """(parts of engines, tensors, bytes of their distinct storages) that the garbage collector knows of."""
    gc.collect()
    parts, tensors, storages = 0, 0, {}
    for thing in gc.get_objects():
        kind = type(thing)  # isinstance would wake lazy objects
        parts += kind.__name__ in ENGINE_PARTS
        if issubclass(kind, Tensor) and thing.device.type == "cpu":
            tensors += 1
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return parts, tensors, sum(storages.values())


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def transitions(tmp_path: Path) -> Iterator[Config]:
    order = ("adapter_only", "adapter_gates", "full")
    for round_ in range(3):
        for phase in order:
            yield make_config(tmp_path / str(round_), phase)


@pytest.mark.slow
def test_nine_phase_changes_leave_no_engine_hook_or_tensor_behind(tmp_path: Path, group: torch.device):
    model: nn.Module | None = None
    engines_before, baseline = census()[0], (0, 0, 0)
    for number, config in enumerate(transitions(tmp_path)):
        with phase_run(config, group, model) as run:
            assert model is None or run.model is model  # the module itself goes on
            update(run)
            model = run.model
        del run
        now = census()
        assert now[0] == engines_before
        assert hooks(model) == 0
        for name, parameter in model.named_parameters():
            assert not [a for a in ZERO_ATTRIBUTES if hasattr(parameter, a)], name
            assert not [a for a in vars(parameter) if a.startswith(("_", "ds_"))], name
            assert parameter.grad is None
            assert parameter.requires_grad
            assert parameter.untyped_storage().nbytes() == parameter.nbytes, name  # out of ZeRO's flat buffer
        if number == 0:
            baseline = now
        assert now == baseline


def test_every_process_group_waits_no_longer_than_the_run_allows(tmp_path: Path):
    config = make_config(tmp_path, run={"dir": str(tmp_path / "run"), "timeout_s": 33.0})
    with opened(config) as run:
        groups = {run.engine.data_parallel_group, run.engine.optimizer.dp_process_group, dist.group.WORLD}
        waits = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
        assert waits == [timedelta(seconds=33)] * len(groups)
