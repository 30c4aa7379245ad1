"""Layer Memory in two passes over the tokens (Triton, inference): `fsdit.layers.layer_memory` says what is computed.

    route       X_{l-1} -> H = Mod(X_{l-1}) and the router's weights w; reads one state, writes one
    retrieve    X_0 ... X_{l-1}, w -> Ĥ = Mod(Σ_j w_j·X_j); reads every state once, writes one

That is the least traffic there can be: l + 3 rows of D numbers a token, where the plain form moves some 3·l. Sums,
statistics and logits are float32. Importing this module imports triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsae.errors import UserError
from fsdit.layers.layer_memory import LayerRouter

TOKENS = 16  # of one program of `route`: the least that a matrix product of Triton's takes
CHANNELS = 128  # that it takes at a time


@triton.jit
def _route(
    x_ptr,
    shift_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    gate_ptr,
    hidden_ptr,
    out_ptr,
    N,
    D,
    states,
    x_batch,
    shift_batch,
    eps,
    GATED: tl.constexpr,
    STATES: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    batch = tl.program_id(1)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = tokens < N
    rows = x_ptr + batch.to(tl.int64) * x_batch + tokens.to(tl.int64)[:, None] * D
    channels = tl.arange(0, CHANNELS)

    total = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, D, CHANNELS):
        c = first + channels
        x = tl.load(rows + c[None, :], mask=inside[:, None] & (c[None, :] < D), other=0.0).to(tl.float32)
        total += tl.sum(x, axis=1)
    mean = total / D
    squares = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, D, CHANNELS):
        c = first + channels
        valid = inside[:, None] & (c[None, :] < D)
        x = tl.load(rows + c[None, :], mask=valid, other=0.0).to(tl.float32)
        centred = tl.where(valid, x - mean[:, None], 0.0)
        squares += tl.sum(centred * centred, axis=1)
    rstd = 1.0 / tl.sqrt(squares / D + eps)

    j = tl.arange(0, STATES)
    logits = tl.zeros((TOKENS, STATES), tl.float32)
    out_rows = hidden_ptr + (batch.to(tl.int64) * N + tokens.to(tl.int64)[:, None]) * D
    for first in range(0, D, CHANNELS):
        c = first + channels
        valid = inside[:, None] & (c[None, :] < D)
        x = tl.load(rows + c[None, :], mask=valid, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + batch * shift_batch + c, mask=c < D, other=0.0)
        scale = tl.load(scale_ptr + batch * shift_batch + c, mask=c < D, other=0.0)
        hidden = (x - mean[:, None]) * rstd[:, None] * (1.0 + scale)[None, :] + shift[None, :]
        hidden = tl.where(valid, hidden, 0.0).to(hidden_ptr.dtype.element_ty)
        tl.store(out_rows + c[None, :], hidden, mask=valid)
        w = tl.load(weight_ptr + j[None, :] * D + c[:, None], mask=(j[None, :] < states) & (c[:, None] < D), other=0.0)
        logits += tl.dot(hidden.to(tl.float32), w, input_precision="tf32x3")

    logits += tl.load(bias_ptr + j, mask=j < states, other=0.0)[None, :]
    logits = tl.where(j[None, :] < states, logits, float("-inf"))
    exponents = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    weights = exponents / tl.sum(exponents, axis=1)[:, None]
    if GATED:
        newest = tl.where(j[None, :] == states - 1, 1.0, 0.0)
        weights = newest + tl.load(gate_ptr) * (weights - newest)
    places = out_ptr + (batch.to(tl.int64) * N + tokens.to(tl.int64)[:, None]) * states + j[None, :]
    tl.store(places, weights, mask=inside[:, None] & (j[None, :] < states))


@triton.jit
def _retrieve(
    states_ptr,
    weights_ptr,
    shift_ptr,
    scale_ptr,
    out_ptr,
    N,
    D,
    states,
    plane,
    shift_batch,
    eps,
    CHANNELS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    batch = token // N
    c = tl.arange(0, CHANNELS)
    valid = c < D
    mixed = tl.zeros((CHANNELS,), tl.float32)
    row = states_ptr + token * D  # a pointer goes from plane to plane: j * plane may be more than 32 bits hold
    for j in range(states):
        weight = tl.load(weights_ptr + token * states + j)
        mixed += weight * tl.load(row + c, mask=valid, other=0.0).to(tl.float32)
        row += plane
    # As the plain form does, the sum is rounded to what a state is before it is normalised.
    mixed = mixed.to(states_ptr.dtype.element_ty).to(tl.float32)
    mean = tl.sum(mixed, axis=0) / D
    centred = tl.where(valid, mixed - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)
    shift = tl.load(shift_ptr + batch * shift_batch + c, mask=valid, other=0.0)
    scale = tl.load(scale_ptr + batch * shift_batch + c, mask=valid, other=0.0)
    memory = centred * rstd * (1.0 + scale) + shift
    tl.store(out_ptr + token * D + c, memory.to(out_ptr.dtype.element_ty), mask=valid)


def route(x: Tensor, shift: Tensor, scale: Tensor, eps: float, router: LayerRouter) -> tuple[Tensor, Tensor]:
    """H `B N D` in the dtype of x and the router's weights `B N l`, float32.

    Args:
        x: X_{l-1} `B N D`.
        shift: of Mod, `B 1 D` like `scale`.
        scale: of Mod.
        eps: of Mod's norm.
        router: its weights are taken in float32.

    Raises:
        UserError: the tensors are on the CPU, for which Triton compiles nothing.
    """
    if x.device.type == "cpu" and isinstance(_route, triton.JITFunction):
        raise UserError(
            'the memory kernel "fused" needs a GPU and the tensors are on the CPU; move the model, or take "auto"'
        )
    batch, tokens, dim = x.shape
    states = len(router.bias)
    x = x if x.stride(2) == 1 and x.stride(1) == dim else x.contiguous()
    shift, scale = _rows(shift, batch), _rows(scale, batch)
    weight, bias = router.weight.float().contiguous(), router.bias.float()
    gate = bias if router.gate is None else router.gate.float()
    hidden = torch.empty((batch, tokens, dim), dtype=x.dtype, device=x.device)
    out = torch.empty((batch, tokens, states), dtype=torch.float32, device=x.device)
    _route[(triton.cdiv(tokens, TOKENS), batch)](
        x,
        shift,
        scale,
        weight,
        bias,
        gate,
        hidden,
        out,
        tokens,
        dim,
        states,
        x.stride(0),
        dim,
        eps,
        GATED=router.gate is not None,
        STATES=max(16, triton.next_power_of_2(states)),
        TOKENS=TOKENS,
        CHANNELS=CHANNELS,
    )
    return hidden, out


def retrieve(states: Tensor, weights: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Ĥ `B N D` in the states' dtype.

    Args:
        states: the planes X_0 ... X_{l-1}, `l B N D`, each contiguous.
        weights: of the router, `B N l`.
        shift: of Mod, `B 1 D` like `scale`.
        scale: of Mod.
        eps: of Mod's norm.
    """
    count, batch, tokens, dim = states.shape
    shift, scale = _rows(shift, batch), _rows(scale, batch)
    out = torch.empty((batch, tokens, dim), dtype=states.dtype, device=states.device)
    channels = triton.next_power_of_2(dim)
    _retrieve[(batch * tokens,)](
        states,
        weights.float().contiguous(),
        shift,
        scale,
        out,
        tokens,
        dim,
        count,
        states.stride(0),
        dim,
        eps,
        CHANNELS=channels,
        num_warps=8 if channels >= 2048 else 4,
    )
    return out


def _rows(modulation: Tensor, batch: int) -> Tensor:
    """`B 1 D` or `1 1 D` -> contiguous float32 `B D`."""
    return modulation.float().expand(batch, 1, -1).reshape(batch, -1).contiguous()
