"""Pixel norm (paper §2.2.1): statistics at one position in space and time, so that no output depends on another's."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
        """`B C ...` -> the same shape and dtype.

        own: whether x may be overwritten: to fill memory anew costs several times what the arithmetic does.
        """
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        scale = torch.rsqrt(wide.square().mean(1, keepdim=True) + self.eps)
        alone = not torch.is_grad_enabled()  # Nothing else will look at what is made here: work in place.
        wide = wide.mul_(scale) if alone and (own or wide is not x) else wide * scale
        if self.weight is None or self.bias is None:
            return wide.to(x.dtype)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        weight, bias = self.weight.view(shape), self.bias.view(shape)
        return (wide.mul_(weight).add_(bias) if alone else wide * weight + bias).to(x.dtype)
