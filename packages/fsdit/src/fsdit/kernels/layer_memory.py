"""Layer Memory in Triton kernels, in inference and training: `fsdit.layers.layer_memory` says what is computed.

    forward     X_0 ... X_{l-1}, w -> Ĥ = Mod(Σ_j w_j·X_j); reads every state once, writes one. Of one state: H
    backward    ∂L/∂Ĥ -> g = ∂L/∂X̂, ∂L/∂w, and those of shift and scale; X̂ is summed again, not kept
    collect     ∂L/∂X_j = what block j + 1 gave it, and Σ_l w_lj·g_l over all later layers l, in one pass

One program works on a whole token (`backward` on a few, one after the other). Sums and statistics are float32.

Autograd would have every layer write l gradients and add them to those of the layers above, in the states' dtype. A
layer leaves its one g instead, and a state collects them when its own gradient is due, which is after all layers that
read it: as a layer pulls from the states before it, a state pulls from the layers behind it. That is one read for each
pair of layer and state, one rounding of each gradient, and no more than one g a layer in memory, while the states are
let go from the last to the first.

Importing this module imports triton.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fsae.errors import UserError

Terms = dict[object, tuple[Tensor, Tensor]]
"""Of a state's gradient, by the layer that left them: its g `B N D`, and its weights of the state, `B N`."""

TOKENS = 8  # of one program of `backward`, which adds up its part of the gradients of shift and scale


@triton.jit
def _mix(states_ptr, offsets_ptr, weights_ptr, token, D, states, c, valid, MIXED: tl.constexpr):
    """Σ_j w_j·X_j of one token in float32, each state at its offset from X_0; or X_0, where nothing is mixed."""
    row = states_ptr + token * D
    if MIXED:
        mixed = tl.zeros(c.shape, tl.float32)
        for j in range(states):
            weight = tl.load(weights_ptr + token * states + j)
            offset = tl.multiple_of(tl.load(offsets_ptr + j), 16)  # holds where 16 divides D, and counts only there
            mixed += weight * tl.load(row + offset + c, mask=valid, other=0.0).to(tl.float32)
    else:
        mixed = tl.load(row + c, mask=valid, other=0.0).to(tl.float32)
    return mixed


@triton.jit
def _normalize(states_ptr, mixed, D, valid, eps):
    """The normalised sum and 1 / its deviation. As the plain form does, it is rounded to what a state is before."""
    mixed = mixed.to(states_ptr.dtype.element_ty).to(tl.float32)
    centred = tl.where(valid, mixed - tl.sum(mixed, axis=0) / D, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)
    return centred * rstd, rstd


@triton.jit(do_not_specialize=["N", "states"])
def _forward(
    states_ptr,
    offsets_ptr,
    weights_ptr,
    shift_ptr,
    scale_ptr,
    out_ptr,
    N,
    D,
    states,
    eps,
    MIXED: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch = token // N
    c = tl.arange(0, CHANNELS)
    valid = c < D
    mixed = _mix(states_ptr, offsets_ptr, weights_ptr, token, D, states, c, valid, MIXED)
    normal, _ = _normalize(states_ptr, mixed, D, valid, eps)
    shift = tl.load(shift_ptr + batch * D + c, mask=valid, other=0.0)
    scale = tl.load(scale_ptr + batch * D + c, mask=valid, other=0.0)
    memory = normal * (1.0 + scale) + shift
    tl.store(out_ptr + token * D + c, memory.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["N", "states"])
def _backward(
    states_ptr,
    offsets_ptr,
    weights_ptr,
    scale_ptr,
    grad_ptr,
    grad_mixed_ptr,
    grad_weights_ptr,
    grad_shift_ptr,
    grad_scale_ptr,
    N,
    D,
    states,
    eps,
    MIXED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * TOKENS
    c = tl.arange(0, CHANNELS)
    valid = c < D
    grad_shift = tl.zeros((CHANNELS,), tl.float32)
    grad_scale = tl.zeros((CHANNELS,), tl.float32)
    for n in range(first, min(first + TOKENS, N)):
        token = batch * N + n
        mixed = _mix(states_ptr, offsets_ptr, weights_ptr, token, D, states, c, valid, MIXED)
        normal, rstd = _normalize(states_ptr, mixed, D, valid, eps)
        grad = tl.load(grad_ptr + token * D + c, mask=valid, other=0.0).to(tl.float32)
        grad_shift += grad
        grad_scale += grad * normal
        grad *= 1.0 + tl.load(scale_ptr + batch * D + c, mask=valid, other=0.0)
        grad = rstd * (grad - tl.sum(grad, axis=0) / D - normal * (tl.sum(grad * normal, axis=0) / D))
        tl.store(grad_mixed_ptr + token * D + c, grad.to(grad_mixed_ptr.dtype.element_ty), mask=valid)
        if MIXED:
            row = states_ptr + token * D
            for i in range(states):
                j = states - 1 - i  # from the last, which the cache still holds
                offset = tl.multiple_of(tl.load(offsets_ptr + j), 16)
                state = tl.load(row + offset + c, mask=valid, other=0.0).to(tl.float32)
                tl.store(grad_weights_ptr + token * states + j, tl.sum(grad * state, axis=0))
    part = (batch * tl.num_programs(0) + tl.program_id(0)) * D
    tl.store(grad_shift_ptr + part + c, grad_shift, mask=valid)
    tl.store(grad_scale_ptr + part + c, grad_scale, mask=valid)


@triton.jit(do_not_specialize=["states"])
def _collect(
    states_ptr,
    offsets_ptr,
    weights_ptr,
    grad_ptr,
    out_ptr,
    D,
    states,
    CHANNELS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHANNELS)
    valid = c < D
    total = tl.load(grad_ptr + token * D + c, mask=valid, other=0.0).to(tl.float32)
    total += _mix(states_ptr, offsets_ptr, weights_ptr, token, D, states, c, valid, True)
    tl.store(out_ptr + token * D + c, total.to(out_ptr.dtype.element_ty), mask=valid)


class Recorded(Sequence[Tensor]):
    """X_0 ... X_{l-1} in training, each with the terms of its gradient that later layers have left for it.

    Not a tuple: what walks through a module's inputs (FSDP2, ZeRO-3) would take it apart, and give every state a
    gradient of zeros for each layer.
    """

    def __init__(self, states: tuple[Tensor, ...] = (), owed: tuple[Terms, ...] = ()) -> None:
        self.states, self.owed = states, owed

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: Any) -> Any:
        return self.states[index]


def record(states: Sequence[Tensor], x: Tensor) -> Recorded:
    """The states and x, the next of them. What goes on from x must use the new `states[-1]`."""
    before = states if isinstance(states, Recorded) else functools.reduce(record, states, Recorded())
    if before and x.dtype != before[0].dtype:
        raise ValueError(f"states of {before[0].dtype} and one of {x.dtype}; all have one dtype")
    owed: Terms = {}
    return Recorded((*before, _Record.apply(x.contiguous(), owed)), (*before.owed, owed))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """H = Mod(x) `B N D`, as `fsdit.layers.modulation.modulate`.

    Raises:
        UserError: the tensors are on the CPU, for which Triton compiles nothing.
    """
    out: Tensor = _Retrieve.apply(None, shift, scale, eps, (), x.contiguous())
    return out


def retrieve(states: Tensor | Sequence[Tensor], weights: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Ĥ `B N D` in the states' dtype, as `fsdit.layers.layer_memory.retrieve`.

    Args:
        states: X_0 ... X_{l-1}: planes `l B N D`, each contiguous, which are not differentiated; or recorded tensors.
        weights: of the router, `B N l`.
        shift: of Mod, `B 1 D` like `scale`.
        scale: of Mod.
        eps: of Mod's norm.
    """
    if isinstance(states, Tensor):
        return _run_forward(states, weights, shift, scale, eps)
    recorded = states if isinstance(states, Recorded) else functools.reduce(record, states, Recorded())
    out: Tensor = _Retrieve.apply(weights, shift, scale, eps, recorded.owed, *recorded)
    return out


class _Record(torch.autograd.Function):
    """A state as later layers use it. Its gradient adds what they have left to what came by the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owed: Terms) -> Tensor:
        ctx.owed = owed
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        terms = list(ctx.owed.values())
        ctx.owed.clear()  # another pass through the graph leaves them again
        return (_run_collect(terms, grad) if terms else grad), None


class _Retrieve(torch.autograd.Function):
    """Mod of the states' sum, or of one state without weights. The states are inputs, so that autograd waits with each
    one's gradient until all layers that read it have left their terms; gradients come to them in no other way."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor | None,
        shift: Tensor,
        scale: Tensor,
        eps: float,
        owed: Sequence[Terms],
        *states: Tensor,
    ) -> Tensor:
        ctx.eps, ctx.owed, ctx.layer = eps, owed, object()
        ctx.save_for_backward(weights, scale, *states)
        return _run_forward(states, weights, shift, scale, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, scale, *states = ctx.saved_tensors
        grad_mixed, *others = _run_backward(states, weights, scale, ctx.eps, grad)
        if weights is None:
            return *others, None, None, grad_mixed
        for j, owed in enumerate(ctx.owed):
            if ctx.needs_input_grad[5 + j]:
                owed[ctx.layer] = grad_mixed, weights[..., j]
        return *others, None, None, *(None for _ in states)


def _run_forward(
    states: Tensor | Sequence[Tensor], weights: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    batch, tokens, dim = states[0].shape
    out = torch.empty_like(states[0])
    _forward[(batch * tokens,)](
        *_sources(states, weights),
        _rows(shift, batch),
        _rows(scale, batch),
        out,
        tokens,
        dim,
        len(states),
        eps,
        MIXED=weights is not None,
        **_options(dim, 8),
    )
    return out


def _run_backward(
    states: Sequence[Tensor], weights: Tensor | None, scale: Tensor, eps: float, grad: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of X̂ `B N D` in the states' dtype, of the weights `B N l`, and of shift and scale."""
    batch, tokens, dim = states[0].shape
    programs = triton.cdiv(tokens, TOKENS)
    grad_mixed = torch.empty_like(states[0])
    grad_weights = grad_mixed if weights is None else torch.empty_like(weights, dtype=torch.float32)
    parts = torch.empty((2, batch, programs, dim), dtype=torch.float32, device=grad.device)
    _backward[(programs, batch)](
        *_sources(states, weights),
        _rows(scale, batch),
        grad.contiguous(),
        grad_mixed,
        grad_weights,
        *parts,
        tokens,
        dim,
        len(states),
        eps,
        MIXED=weights is not None,
        TOKENS=TOKENS,
        **_options(dim, 16),
    )
    grad_shift, grad_scale = (part.sum(1, keepdim=True).sum_to_size(scale.shape) for part in parts)
    return grad_mixed, None if weights is None else grad_weights, grad_shift, grad_scale


def _run_collect(terms: list[tuple[Tensor, Tensor]], grad: Tensor) -> Tensor:
    grads, weights = zip(*terms, strict=True)
    batch, tokens, dim = grad.shape
    out = torch.empty_like(grads[0])
    sources = _sources(grads, torch.stack(weights, dim=-1))
    _collect[(batch * tokens,)](*sources, grad.contiguous(), out, dim, len(terms), **_options(dim, 8))
    return out


def _sources(states: Tensor | Sequence[Tensor], weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """X_0, how many numbers from it each state begins, and the weights; without weights, X_0 stands for all."""
    first = states[0]
    if first.is_cpu and isinstance(_forward, triton.JITFunction):
        raise UserError(
            'the memory kernel "fused" needs a GPU and the tensors are on the CPU; move the model, or take "auto"'
        )
    if weights is None:
        return first, first, first
    if isinstance(states, Tensor):  # made on the device, as a CUDA graph can repeat it
        offsets = torch.arange(len(states), device=states.device) * states.stride(0)
    else:
        begins = [(state.data_ptr() - first.data_ptr()) // first.itemsize for state in states]
        offsets = torch.tensor(begins, pin_memory=first.is_cuda).to(first.device, non_blocking=True)
    return first, offsets, weights.float().contiguous()


def _rows(modulation: Tensor, batch: int) -> Tensor:
    """`B 1 D` or `1 1 D` -> contiguous float32 `B D`."""
    return modulation.float().expand(batch, 1, -1).reshape(batch, -1).contiguous()


def _options(dim: int, warps: int) -> dict[str, int]:
    """The power of two that holds a token, and warps that hold it without spilling."""
    channels = triton.next_power_of_2(dim)
    return {"CHANNELS": channels, "num_warps": warps if channels >= 2048 else 4}
