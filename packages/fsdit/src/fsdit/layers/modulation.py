"""Adaptive layer norm: a LayerNorm whose shift and scale come from the time embedding (architecture of Wan2.1).

    Mod(x) = LN(x) * (1 + scale) + shift

Shapes: x `B N D`; shift, scale and gate `B 1 D`. Statistics, modulation and gated sums run in at least float32
and come back in the dtype of `x`: a bfloat16 model so keeps its residual stream, and with it the layer memory, small.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Autocast switched off; the meta device has none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or untouched where it is already wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Mod(x) for x `B N D` with shift and scale `B 1 D`."""
    normal = F.layer_norm(at_least_float32(x), x.shape[-1:], eps=eps)
    if torch.is_grad_enabled():
        return torch.addcmul(shift, normal, 1 + scale).type_as(x)
    return normal.mul_(1 + scale).add_(shift).type_as(x)  # in place, where no backward needs the normalised x


def add_gated(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + gate * branch, summed in at least float32 and returned in the dtype of `x`."""
    return torch.addcmul(at_least_float32(x), at_least_float32(branch), gate).type_as(x)


class WideLayerNorm(nn.LayerNorm):
    """An affine LayerNorm over the last axis that computes in at least float32 whatever its input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.layer_norm(wide, self.normalized_shape, weight, bias, self.eps).type_as(x)


class FullWidthRMSNorm(nn.RMSNorm):
    """x / rms(x) · weight over the last axis, which is the whole width of queries or keys and not a head's (Wan2.1)."""

    def forward(self, x: Tensor) -> Tensor:
        """x `... D`. PyTorch has a kernel for this on GPUs; on a CPU it makes six passes, where one reduction and two
        products do."""
        plain = x.is_cpu and x.dtype == self.weight.dtype and x.itemsize >= 4
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not plain:
            return super().forward(x)
        assert self.eps is not None
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        return (x * squares.div_(x.shape[-1]).add_(self.eps).rsqrt_()).mul_(self.weight)
