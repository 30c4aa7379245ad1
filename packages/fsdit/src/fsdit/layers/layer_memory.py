"""Layer Memory: keys and values look at every earlier layer's output (paper §2.3.1, eq. 6-8).

Layer l owns a router. From its modulated input H it computes, for every token, a softmax over the l residual states
X_0 ... X_{l-1} (X_0 is the patch embedding), and their weighted sum

    R = H·W_rᵀ + b_r  (B N l),    w = softmax(R),    X̂ = Σ_j w_j · X_j,    Ĥ = Mod(X̂)

replaces X_{l-1} as the input of K and V; queries keep X_{l-1}. Weights are shared by the heads. Layer 1 has only X_0
and therefore no router. Logits, softmax and sum run in at least float32.

The states reach a layer in one of two forms. In inference they are the first l planes `l B N D` of one buffer that
every layer writes its output into. In training they are l tensors `B N D`, inputs of an autograd function of their
own: it saves no copies, and its backward recomputes what it needs from the states, so that memory grows with the depth
and not with its square, and recomputing a layer under gradient checkpointing changes nothing.

`record`, `modulate` and `retrieve` are here in plain PyTorch, and under the same names in `fsdit.kernels.layer_memory`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdit.layers.modulation import at_least_float32, full_precision, modulate

States = Tensor | Sequence[Tensor]
"""X_0 ... X_{l-1}: planes `l B N D` of a buffer, or l tensors `B N D`."""


class LayerRouter(nn.Module):
    """The router of layer l: a linear map from D to l logits, softmaxed.

    It starts with zero weights and biases (0, ..., 0, ln(l-1) + c): X_{l-1} then has the weight e^c / (e^c + 1) at
    every depth, where a bias of c alone would leak more the deeper the layer. c = 7 leaves a pretrained model as it is
    (0.9991); c = 0 ... 2 suits training from scratch.

    With a gate g, a scalar that starts at 0, the sum becomes X_{l-1} + g·(X̂ - X_{l-1}): a pretrained model is then bit
    for bit what it was, and g has a gradient from the start.

    Args:
        dim: D, the width of the tokens.
        states: l >= 2, the number of states this layer chooses from.
        bias: c.
        gate: Whether there is a gate.
    """

    def __init__(self, dim: int, states: int, bias: float, gate: bool = False) -> None:
        super().__init__()
        if states < 2:
            raise ValueError(f"a router chooses among at least 2 states, got {states}")
        self.initial_bias = bias
        self.weight = nn.Parameter(torch.empty(states, dim))
        self.bias = nn.Parameter(torch.empty(states))
        self.gate = nn.Parameter(torch.empty(1)) if gate else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero weights; biases that favour the newest state (see the class); a closed gate."""
        with torch.no_grad():
            self.weight.zero_()
            self.bias.zero_()
            self.bias[-1] = math.log(len(self.bias) - 1) + self.initial_bias
            if self.gate is not None:
                self.gate.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden `B N D` -> weights `B N l` that sum to one over l, in at least float32 even under autocast."""
        with full_precision(hidden):
            wide = at_least_float32(hidden)
            logits = F.linear(wide, self.weight.to(wide.dtype), self.bias.to(wide.dtype))
            weights = logits.softmax(dim=-1)
            if self.gate is None:
                return weights
            gate = self.gate.to(wide.dtype)
            newest = F.pad(torch.ones_like(weights[..., :1]), (len(self.bias) - 1, 0))
            return newest + gate * (weights - newest)


def record(states: Sequence[Tensor], x: Tensor) -> Sequence[Tensor]:
    """The states and x, the next of them. What goes on from x must use the new `states[-1]`."""
    return *states, x


def mix_states(states: States, weights: Tensor) -> Tensor:
    """X̂ = Σ_j w_j · X_j `B N D` for weights `B N l`, summed in at least float32 and returned in the states' dtype.

    A product per token over the planes of a buffer; a running sum over separate tensors, never a stacked copy of them.
    """
    if len(states) != weights.shape[-1]:
        raise ValueError(f"{weights.shape[-1]} router weights for {len(states)} states")
    if isinstance(states, Tensor) and states.dtype == weights.dtype:
        planes = states.flatten(1, 2).transpose(0, 1)  # (B N) l D, no copy
        with full_precision(states):
            return torch.bmm(weights.flatten(0, 1).unsqueeze(1), planes).view(states.shape[1:])
    mixed = weights[..., :1] * states[0]
    for j in range(1, len(states)):
        mixed = torch.addcmul(mixed, weights[..., j : j + 1], states[j].to(mixed.dtype))
    return mixed.type_as(states[0])


def retrieve(states: States, weights: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Ĥ = Mod(X̂) `B N D`: what a layer's keys and values are made of.

    Args:
        states: X_0 ... X_{l-1}. Planes of a buffer are not differentiated.
        weights: of the router, `B N l`.
        shift: of Mod, `B 1 D` like `scale`.
        scale: of Mod.
        eps: of Mod's norm.
    """
    if isinstance(states, Tensor):
        return modulate(mix_states(states, weights), shift, scale, eps)
    out: Tensor = _Retrieve.apply(weights, shift, scale, eps, *states)
    return out


class _Retrieve(torch.autograd.Function):
    """`retrieve` of separate tensors. With g = ∂L/∂X̂:  ∂L/∂X_j = w_j·g,  ∂L/∂w_j = <g, X_j>."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, shift: Tensor, scale: Tensor, eps: float, *states: Tensor) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(weights, scale, *states)
        return modulate(mix_states(states, weights), shift, scale, eps)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        weights, scale, *states = ctx.saved_tensors
        # X̂ is summed again rather than kept: it would be another N·D numbers a layer.
        mixed = at_least_float32(mix_states(tuple(states), weights))
        grad = at_least_float32(outputs[0])
        normal, mean, rstd = torch.native_layer_norm(mixed, mixed.shape[-1:], None, None, ctx.eps)
        needs_shift, needs_scale = ctx.needs_input_grad[1:3]
        grad_shift = grad.sum(1, keepdim=True).sum_to_size(scale.shape) if needs_shift else None
        grad_scale = (grad * normal).sum(1, keepdim=True).sum_to_size(scale.shape) if needs_scale else None
        grad = torch.ops.aten.native_layer_norm_backward(
            grad * (1 + scale), mixed, mixed.shape[-1:], mean, rstd, None, None, [True, False, False]
        )[0]
        grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_weights = torch.stack([(grad * state).sum(-1) for state in states], dim=-1).type_as(weights)
        grad_states = (
            (weights[..., j : j + 1] * grad).type_as(state) if ctx.needs_input_grad[4 + j] else None
            for j, state in enumerate(states)
        )
        return grad_weights, grad_shift, grad_scale, None, *grad_states
