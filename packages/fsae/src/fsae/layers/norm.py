"""Pixel norm (paper §2.2.1): statistics at one position in space and time, so that no output depends on another's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fsae.tiling import frames_at_once


class PixelNorm(nn.Module):
    """Root-mean-square norm over the channels of `B C ...`, with a weight and a bias per channel.

    The epsilon stands inside the root, as in DC-AE, whose weights this norm carries; statistics are at least fp32.
    Without `affine` it is the plain norm for training from scratch.
    """

    def __init__(self, channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor, own: bool = False) -> Tensor:
        """`B C ...` -> the same shape and dtype. Once differentiable.

        own: whether x may be overwritten: to fill memory anew costs several times what the arithmetic does.
        """
        if torch.is_grad_enabled():
            made: Tensor = _Differentiable.apply(x, self.weight, self.bias, self.eps)
            return made
        return _normalised(x, self.weight, self.bias, self.eps, own)[0]


def _normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, own: bool = False
) -> tuple[Tensor, Tensor]:
    """The norm of x and 1 / rms, `B 1 ...`; without a gradient."""
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)
    wide = wide.mul_(scale) if own or wide is not x else wide * scale
    if weight is not None and bias is not None:
        wide = wide.mul_(_by_channel(weight, x)).add_(_by_channel(bias, x))
    return wide.to(x.dtype), scale


class _Differentiable(torch.autograd.Function):
    """The norm that keeps its input and 1 / rms alone. With n = x / rms and h = w g,

        dx = (h - n mean_c(h n)) / rms,      dw = sum g n,      db = sum g.

    Some frames at a time, so that the fp32 forms of all of them never stand together.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        made = torch.empty_like(x)
        scales = []
        for part, out in zip(_parts(x, x), _parts(made, x), strict=True):
            found, scale = _normalised(part, weight, bias, eps)
            out.copy_(found)
            scales.append(scale)
        ctx.save_for_backward(x, scales[0] if len(scales) == 1 else torch.cat(scales, 2), weight)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, scale, weight = ctx.saved_tensors
        made = torch.empty_like(x)
        others = [0, *range(2, x.ndim)]
        for_weight = for_bias = scale.new_zeros(())
        for part, slope, out, by in zip(*(_parts(t, x) for t in (x, gradient, made, scale)), strict=True):
            unit, wide = _wide(part) * by, _wide(slope)
            if weight is not None:
                for_weight = for_weight + (wide * unit).sum(others)
                for_bias = for_bias + wide.sum(others)
                wide = wide * _by_channel(weight, x)
            out.copy_((wide - unit * (wide * unit).mean(1, keepdim=True)) * by)
        if weight is None:
            return made, None, None, None
        return made, for_weight.to(weight.dtype), for_bias.to(weight.dtype), None


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _by_channel(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view((1, -1) + (1,) * (x.ndim - 2))


def _parts(tensor: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Frames, as many at a time as x has few enough elements in; what is no clip whole."""
    return tensor.split(frames_at_once(x, 1), dim=2) if x.ndim == 5 else (tensor,)
