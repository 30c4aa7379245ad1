"""Seeing motion: what of each latent's frame stood where in the frame of the latent before.

Convolutions in time see motion of less than their reach alone, and learn to from many clips. A small encoder is given
the comparison itself, as networks for optical flow are (RAFT, arXiv 2003.12039): products of features between two
instants, one for each offset in a neighbourhood. An option of ours, off in the paper's presets.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsae.layers.norm import PixelNorm
from fsae.streaming import FrameCache

HEAD_DIM = 32


class Matching(nn.Module):
    """x + W_2 SiLU(W_1 c), where c compares each cell with cells around it in the frame before:

        c_o(t, p) = < k(t, p), k(t-1, p + o) - k(t, p + o) >,      |o| <= reach in h and in w,

    by heads of unit keys k = W_k PN(x); cells beyond the frame's edge count as zero. Where nothing moves c is zero,
    for pictures and the clip's first frame too: these pass unchanged, as no layer here has a bias. W_2 starts at zero.

    Args:
        channels: of the features.
        heads: keys of `HEAD_DIM` channels each.
        reach: cells on each side that are compared with.
        eps: of the norm.
    """

    def __init__(self, channels: int, *, heads: int = 2, reach: int = 4, eps: float = 1e-5) -> None:
        super().__init__()
        self.heads, self.reach = heads, reach
        self.norm = PixelNorm(channels, eps, affine=False)
        self.to_key = nn.Linear(channels, heads * HEAD_DIM, bias=False)
        self.hidden = nn.Linear(heads * (2 * reach + 1) ** 2, channels, bias=False)
        self.to_out = nn.Linear(channels, channels, bias=False)
        nn.init.zeros_(self.to_out.weight)

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """`B C t h w` -> the same shape. cache: the state of a stream that x is the next chunk of."""
        key = self.to_key(self.norm(x).movedim(1, -1)).unflatten(-1, (self.heads, HEAD_DIM))
        key = F.normalize(key.float() if key.dtype in (torch.float16, torch.bfloat16) else key, dim=-1)
        key = key.permute(0, 4, 1, 5, 2, 3)  # B heads t d h w
        before = key[:, :, :1] if cache is None or self not in cache else cache[self].unflatten(1, (self.heads, -1))
        if cache is not None:
            cache[self] = key[:, :, -1:].flatten(1, 2)
        found = self._compared(key, torch.cat([before, key[:, :, :-1]], dim=2) - key)
        made = self.to_out(F.silu(self.hidden(found.to(x.dtype))))
        return x + cast(Tensor, made).movedim(-1, 1)

    def _compared(self, key: Tensor, change: Tensor) -> Tensor:
        """Keys and how the frame before differs from them, `B heads t d h w` -> c, `B t h w heads·offsets`."""
        height, width = key.shape[4:]
        side = 2 * self.reach + 1
        around = F.pad(change.flatten(0, 2), (self.reach,) * 4).unflatten(0, change.shape[:3])
        products = [
            (key * around[..., row : row + height, column : column + width]).sum(3)
            for row in range(side)
            for column in range(side)
        ]
        return torch.stack(products, dim=-1).permute(0, 2, 3, 4, 1, 5).flatten(-2)
