"""Layer Memory: keys and values look at every earlier layer's output (paper §2.3.1, eq. 6-8).

Layer l owns a router. From its modulated input H it computes, for every token, a softmax over the l residual states
X_0 ... X_{l-1} (X_0 is the patch embedding), and their weighted sum

    R = H·W_rᵀ + b_r  (B N l),    w = softmax(R),    X̂ = Σ_j w_j · X_j

replaces X_{l-1} as the input of K and V; queries keep X_{l-1}. Weights are shared by the heads. Layer 1 has only X_0
and therefore no router. Logits, softmax and sum run in at least float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdit.layers.modulation import at_least_float32


class LayerRouter(nn.Module):
    """The router of layer l: a linear map from D to l logits, softmaxed.

    It starts with zero weights and biases (0, ..., 0, ln(l-1) + c): X_{l-1} then has the weight e^c / (e^c + 1) at
    every depth, where a bias of c alone would leak more the deeper the layer. c = 7 leaves a pretrained model as it is
    (0.9991); c = 0 ... 2 suits training from scratch.

    Args:
        dim: D, the width of the tokens.
        states: l >= 2, the number of states this layer chooses from.
        bias: c.
    """

    def __init__(self, dim: int, states: int, bias: float) -> None:
        super().__init__()
        if states < 2:
            raise ValueError(f"a router chooses among at least 2 states, got {states}")
        self.initial_bias = bias
        self.weight = nn.Parameter(torch.empty(states, dim))
        self.bias = nn.Parameter(torch.empty(states))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero weights; biases that favour the newest state (see the class)."""
        with torch.no_grad():
            self.weight.zero_()
            self.bias.zero_()
            self.bias[-1] = math.log(len(self.bias) - 1) + self.initial_bias

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden ``B N D`` -> weights ``B N l`` that sum to one over l, in at least float32 even under autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            wide = at_least_float32(hidden)
            logits = F.linear(wide, self.weight.to(wide.dtype), self.bias.to(wide.dtype))
            return logits.softmax(dim=-1)


def mix_states(states: Sequence[Tensor], weights: Tensor) -> Tensor:
    """X̂ = Σ_j w_j · X_j for states X_j ``B N D`` and weights ``B N l``; returned in the states' dtype.

    A running sum over the list, never a stacked copy of it: stacking in each layer would cost memory and traffic that
    grow with the square of the depth, and autograd would keep every copy.
    """
    if len(states) != weights.shape[-1]:
        raise ValueError(f"{weights.shape[-1]} router weights for {len(states)} states")
    mixed: Tensor | None = None
    for state, weight in zip(states, weights.split(1, dim=-1), strict=True):
        mixed = weight * state if mixed is None else mixed + weight * state
    if mixed is None:
        raise ValueError("no states to mix")
    return mixed.type_as(states[-1])
