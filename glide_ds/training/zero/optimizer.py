"""AdamW whose two moments take one byte each: 2.03 bytes of state per parameter instead of 8.

Block-wise dynamic quantisation (Dettmers et al. 2021, arXiv 2110.02861): each block of 256 consecutive
elements keeps one fp32 scale, its largest magnitude, and per element the code of x / scale.

The map. Level i of `top` covers [8^(i-1-top), 8^(i-top)) with 2^i equal cells; a code stands for its cell's
midpoint. The first code is 0, the last is 1. So the resolution is finest where most of the update is made,
and magnitudes down to 8^-top of the block's largest survive. The paper's levels are powers of ten; powers of
eight are exponent arithmetic, exact and the same on every device. The signed map (top 6 and a sign) is
symmetric and holds -1 and +1, so a block's largest element is exact and quantising again changes nothing.

The second moment is kept as its root, which the update needs anyway: the dynamic range doubles, and an
element whose first moment survives does not find its second moment rounded to zero.

One definition, two implementations: torch operations (any device, the reference) and a Triton kernel (CUDA), which
passes over memory once.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from glide_ds.errors import CheckpointError, ConfigError

BLOCK = 256  # elements that share a scale
MIN_SIZE = 4096  # tensors with fewer elements keep fp32 moments: nothing to save, and often the sensitive ones
SIGNED_TOP, UNSIGNED_TOP = 6, 7  # levels of the two maps: 2^(top+1) magnitudes, 128 and 256
TINY = torch.finfo(torch.float32).tiny  # the smallest scale, so that a block of zeros divides nothing by zero
NUDGE = 1 + 2**-22  # lifts x / scale of the largest element to at least 1 whatever the rounding
CHUNK = 512 * BLOCK  # elements per pass of the torch implementation: its temporaries stay in cache

log = logging.getLogger(__name__)


class Coefficients(NamedTuple):
    """The scalars of one AdamW step, in the order in which the kernels take them."""

    beta1: float
    gain1: float  # 1 - beta1, negative to maximise
    beta2: float
    gain2: float  # 1 - beta2
    decay: float  # 1 - lr * weight_decay
    rate: float  # lr / (1 - beta1^t)
    unbias: float  # 1 / sqrt(1 - beta2^t)
    eps: float

    @classmethod
    def at(cls, group: dict[str, Any], step: float) -> Coefficients:
        """Of update number `step`, counted from 1 (Loshchilov & Hutter 2019, algorithm 2)."""
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        return cls(
            beta1=beta1,
            gain1=beta1 - 1 if group["maximize"] else 1 - beta1,
            beta2=beta2,
            gain2=1 - beta2,
            decay=1 - lr * group["weight_decay"],
            rate=lr / (1 - beta1**step),
            unbias=(1 - beta2**step) ** -0.5,
            eps=group["eps"],
        )


class Moments(NamedTuple):
    """The quantised state of one tensor of N elements in ceil(N / 256) blocks."""

    avg: Tensor  # uint8 [N], bit 7 is the sign
    avg_scale: Tensor  # float32 [blocks]
    root: Tensor  # uint8 [N], of sqrt(exp_avg_sq)
    root_scale: Tensor  # float32 [blocks]


MOMENT_KEYS = ("exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale")


@functools.cache
def code_map(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The 256 values in [-1, 1] or [0, 1] that the codes stand for: float32 [256]."""
    top = SIGNED_TOP if signed else UNSIGNED_TOP
    levels = [torch.arange(2**i, dtype=torch.float64) for i in range(1, top + 1)]
    cells = [8.0 ** (i - top) * (1 + 7 * (f + 0.5) / 2**i) / 8 for i, f in enumerate(levels, start=1)]
    magnitudes = torch.cat([torch.zeros(1), *cells, torch.ones(1)]).float()
    return (torch.cat([magnitudes, -magnitudes]) if signed else magnitudes).to(device)


def _encode(x: Tensor, top: int) -> Tensor:
    """Index of the cell that holds x in [0, 1]: int32. Levels are found in the float's exponent field."""
    bits = x.view(torch.int32)
    depth = ((126 - (bits >> 23)) * 43) >> 7  # floor(exponent / 3): how many levels below the highest
    unit = (bits + depth * (3 << 23)).view(torch.float32) * (8 / 7) + 6 / 7  # the level's range onto [1, 2)
    index = (unit.view(torch.int32) + ((top - depth) << 23)).view(torch.float32).to(torch.int32) - 1
    return torch.where(depth >= top, 0, index)


def quantize(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantise block by block.

    Args:
        x: float32 of N elements, any shape; non-negative unless `signed`.

    Returns:
        codes uint8 [N] and scales float32 [ceil(N / 256)].
    """
    flat = x.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    magnitudes = blocks.abs()
    scale = magnitudes.amax(1).clamp_min(TINY)
    codes = _encode(magnitudes * (NUDGE / scale)[:, None], SIGNED_TOP if signed else UNSIGNED_TOP)
    if signed:
        codes = codes | ((blocks.view(torch.int32) >> 24) & 128)
    return codes.to(torch.uint8).view(-1)[: flat.numel()], scale


def dequantize(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The values that `codes` (uint8 [N]) and `scale` (float32 [ceil(N / 256)]) stand for: float32 [N]."""
    values = code_map(signed, codes.device).index_select(0, codes.int())
    whole = codes.numel() // BLOCK
    values[: whole * BLOCK].view(whole, BLOCK).mul_(scale[:whole, None])
    values[whole * BLOCK :].mul_(scale[whole:])
    return values


def _step_torch(p: Tensor, g: Tensor, state: Moments, c: Coefficients) -> None:
    """One step on flat fp32 tensors by torch operations, a chunk at a time to bound the temporaries."""
    for start in range(0, p.numel(), CHUNK):
        part, blocks = slice(start, start + CHUNK), slice(start // BLOCK, (start + CHUNK) // BLOCK)
        grad = g[part]
        avg = dequantize(state.avg[part], state.avg_scale[blocks], signed=True)
        root = dequantize(state.root[part], state.root_scale[blocks], signed=False)
        avg.mul_(c.beta1).add_(grad, alpha=c.gain1)
        root.square_().mul_(c.beta2).addcmul_(grad, grad, value=c.gain2).sqrt_()
        p[part].mul_(c.decay).addcdiv_(avg, root * c.unbias + c.eps, value=-c.rate)
        state.avg[part], state.avg_scale[blocks] = quantize(avg, signed=True)
        state.root[part], state.root_scale[blocks] = quantize(root, signed=False)


def _step_triton(p: Tensor, g: Tensor, state: Moments, c: Coefficients) -> None:
    from glide_ds.training.zero.adamw8bit_triton import step_kernel

    rows = 8  # blocks per program, one warp each
    with torch.cuda.device_of(p):
        grid = (-(-p.numel() // (BLOCK * rows)),)
        step_kernel[grid](p.numel(), p, g, *state, *c, rows=rows, num_warps=rows)


@functools.cache
def _implementation(device_type: str) -> Callable[[Tensor, Tensor, Moments, Coefficients], None]:
    """The faster of the two that runs on this kind of device."""
    if device_type == "cuda" and importlib.util.find_spec("triton"):
        return _step_triton
    log.warning(
        "AdamW8bit has no kernel for %r here: its steps run as torch operations, 20 times as slow", device_type
    )
    return _step_torch


class AdamW8bit(Optimizer):
    """AdamW with block-wise 8-bit moments; takes the place of `torch.optim.AdamW`.

    The arguments are AdamW's. The update is computed in fp32 from the moments before they are rounded.
    Tensors of fewer than MIN_SIZE elements, and all of a group with `quantize=False`, keep unquantised moments
    and are stepped by torch's own AdamW. ZeRO lays a group's tensors end to end, so that norms and biases keep
    theirs only where they are a group of their own (phases.parameter_groups).
    State per tensor: `step` and either `exp_avg`, `exp_avg_sq` (the tensor's shape) or the four MOMENT_KEYS;
    there is no counter beside it, so groups may be stepped one by one and on flat partitions, as ZeRO does.

    `load_state_dict` takes 8-bit state back bit for bit, and fp32 state (`state_dict_to_fp32`, or any AdamW's),
    which it quantises. fp32 moments put straight into `.state`, as DeepSpeed's universal checkpoint does, are
    quantised at the next step. Quantising what was dequantised gives the same codes while blocks stay aligned.

    Raises:
        ConfigError: an argument is out of range, or a gradient is sparse.
        CheckpointError: loaded state does not fit the parameters.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        quantize: bool = True,
    ) -> None:
        limits = {"lr": (lr, None), "betas[0]": (betas[0], 1), "betas[1]": (betas[1], 1)}
        limits |= {"eps": (eps, None), "weight_decay": (weight_decay, None)}
        for name, (value, end) in limits.items():
            if not (value >= 0 and (end is None or value < end)):
                allowed = "at least 0" if end is None else f"in [0, {end})"
                raise ConfigError(f"AdamW8bit's {name} is {value}", remedy=f"it must be {allowed}")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "maximize": maximize, "quantize": quantize})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            stepped = [p for p in group["params"] if p.grad is not None]
            for p in stepped:
                self._prepare(p, group)
            for p in stepped:
                if _quantized(p, group):
                    self._step_8bit(p, group)
            if rest := [p for p in stepped if not _quantized(p, group)]:
                self._step_fp32(rest, group)
        return loss

    def _prepare(self, p: Tensor, group: dict[str, Any]) -> None:
        """Create the state at the first step; quantise moments that were put there as fp32."""
        if p.grad is not None and p.grad.is_sparse:
            raise ConfigError(
                "AdamW8bit takes no sparse gradients", remedy="build the embedding with sparse=False"
            )
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
        if not _quantized(p, group):
            for key in ("exp_avg", "exp_avg_sq"):
                if key not in state:
                    state[key] = torch.zeros_like(p)
        elif "exp_avg" in state:
            _pack(state)
        elif MOMENT_KEYS[0] not in state:
            blocks = -(-p.numel() // BLOCK)
            for codes, scale in (MOMENT_KEYS[:2], MOMENT_KEYS[2:]):
                state[codes] = torch.zeros(p.numel(), dtype=torch.uint8, device=p.device)
                state[scale] = torch.zeros(blocks, dtype=torch.float32, device=p.device)

    def _step_8bit(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        state["step"] += 1
        # The parameter itself where it is contiguous fp32, as ZeRO's partitions are, else a copy.
        flat = p.detach().reshape(-1).float()
        moments = Moments(*(state[key] for key in MOMENT_KEYS))
        grad = p.grad.reshape(-1).float()  # type: ignore[union-attr]
        _implementation(p.device.type)(flat, grad, moments, Coefficients.at(group, state["step"].item()))
        if flat.data_ptr() != p.data_ptr():
            p.copy_(flat.view(p.shape))

    def _step_fp32(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def state_dict_fp32(self) -> dict[str, Any]:
        """`state_dict()` with the moments as AdamW's fp32 `exp_avg` and `exp_avg_sq`."""
        return state_dict_to_fp32(self.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict()` or `state_dict_fp32()`; the tensors are copied.

        What is quantised follows from this optimizer's groups, not from those that were saved.
        """
        quantize = [group["quantize"] for group in self.param_groups]
        # torch's own would cast every tensor to the parameter's type, the codes to float.
        super().load_state_dict({**state_dict, "state": {}})
        for group, saved, own in zip(self.param_groups, state_dict["param_groups"], quantize, strict=True):
            group["quantize"] = own
            for name, p in zip(saved["params"], group["params"], strict=True):
                if name in state_dict["state"]:
                    self.state[p] = _fitted(state_dict["state"][name], p, _quantized(p, group))


class AdamW(torch.optim.AdamW):
    """torch's own. Its `step` would import the compiler, 4 s, only to stay out of graphs that nobody compiles."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def _quantized(p: Tensor, group: dict[str, Any]) -> bool:
    return bool(group["quantize"]) and p.numel() >= MIN_SIZE


def _pack(state: dict[str, Any]) -> None:
    """Replace fp32 moments, in place, by their codes and scales."""
    avg, sq = state.pop("exp_avg"), state.pop("exp_avg_sq")
    packed = (*quantize(avg.float(), signed=True), *quantize(sq.float().sqrt(), signed=False))
    state.update(zip(MOMENT_KEYS, packed, strict=True))


def _unpack(state: dict[str, Any]) -> dict[str, Any]:
    """The same state with codes and scales replaced by fp32 moments, flat."""
    if MOMENT_KEYS[0] not in state:
        return state
    rest = {key: value for key, value in state.items() if key not in MOMENT_KEYS}
    moments = Moments(*(state[key] for key in MOMENT_KEYS))
    avg = dequantize(moments.avg, moments.avg_scale, signed=True)
    root = dequantize(moments.root, moments.root_scale, signed=False)
    return {**rest, "exp_avg": avg, "exp_avg_sq": root.square()}


def state_dict_to_fp32(state_dict: dict[str, Any]) -> dict[str, Any]:
    """An `AdamW8bit.state_dict()`, live or from a file, with flat fp32 `exp_avg` and `exp_avg_sq`.

    What a change of world size needs: DeepSpeed's converter to universal checkpoints knows these names only.
    Put the result in place of `optimizer_state_dict.base_optimizer_state` of each `*_optim_states.pt` first.
    """
    return {**state_dict, "state": {name: _unpack(state) for name, state in state_dict["state"].items()}}


def _fitted(saved: dict[str, Any], p: Tensor, quantized: bool) -> dict[str, Any]:
    """A copy of saved state on the parameter's device, 8-bit or fp32."""
    blocks = -(-p.numel() // BLOCK)
    sizes = dict(
        zip(MOMENT_KEYS, (p.numel(), blocks) * 2, strict=True), exp_avg=p.numel(), exp_avg_sq=p.numel()
    )
    moments = {key: value for key, value in saved.items() if key in sizes}
    if "step" not in saved or set(moments) not in ({*MOMENT_KEYS}, {"exp_avg", "exp_avg_sq"}):
        raise CheckpointError(
            f"the optimizer state holds {sorted(saved)}: it is not AdamW's or AdamW8bit's",
            remedy="load the one this optimizer wrote, or start the optimizer afresh",
        )
    for key, value in moments.items():
        if value.numel() != sizes[key]:
            raise CheckpointError(
                f"the optimizer state's {key} has {value.numel()} elements where a parameter of "
                f"{p.numel()} needs {sizes[key]}",
                "it belongs to another model or world size",
                "convert it with state_dict_to_fp32 and DeepSpeed's universal checkpoint, or start the "
                "optimizer afresh",
            )
    state = {key: value.detach().to(p.device, copy=True) for key, value in moments.items()}
    if not quantized:
        state = {key: value.to(p.dtype).view(p.shape) for key, value in _unpack(state).items()}
    elif "exp_avg" in state:
        _pack(state)
    return {"step": torch.tensor(float(saved["step"])), **state}


class Kind(NamedTuple):
    """An optimizer that a configuration may name (config lists the names)."""

    make: Callable[..., Optimizer]  # from parameter groups, lr, betas, eps
    state_bytes: float  # per trained parameter


KINDS = {
    "AdamW": Kind(functools.partial(AdamW, fused=True), 8.0),
    "AdamW8bit": Kind(AdamW8bit, 2.1),
}
