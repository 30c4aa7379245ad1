"""Seeing motion: what of each latent's frame stood where in the frame of the latent before.

Convolutions in time see motion of less than their reach alone, and learn to from many clips. A small encoder is given
the comparison itself, as networks for optical flow are (RAFT, arXiv 2003.12039): products of patches of two frames, one
for each offset in a neighbourhood. An option of ours, off in the paper's presets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsae.streaming import FrameCache

LEVELS = (1, 2, 4)
"""How much smaller than the finest each grid of patches is."""

REACH = 3
"""Cells of each grid, on each side, that a patch is compared with: at the coarsest, 12 of the finest."""

# Of a patch's length, colours in [-1, 1]: what differs less than this counts as flat.
NOISE = 0.1


class Matching(nn.Module):
    """x + W_2 (SiLU(W_1 c + u) - SiLU(u)),    u = W_0 s + b, where c compares frames and s says what could be told.

    At each cell p of small frames, a patch k is 3 x 3 of them less their mean, made of length 1. Compared with those
    of the frame before and of its own, at offsets o with |o| <= REACH in h and in w,

        s_o(t, p) = < k(t, p), k(t, p + o) >,      c_o(t, p) = < k(t, p), k(t-1, p + o) > - s_o(t, p),

    on grids of the frames at `LEVELS`, the finest of which has 2 x 2 cells for each of x's. Beyond the frame's edge
    patches count as zero. Where nothing moves c is zero, for pictures and the clip's first frame too: these pass
    unchanged. W_2 starts at zero.

    Args:
        channels: of the features.
    """

    # Channels of the small frames: 2 x 2 cells of 3 colours.
    frame_channels = 12

    def __init__(self, channels: int) -> None:
        super().__init__()
        offsets = len(LEVELS) * (2 * REACH + 1) ** 2
        self.context = nn.Linear(offsets, channels)
        self.hidden = nn.Linear(offsets, channels, bias=False)
        self.to_out = nn.Linear(channels, channels, bias=False)
        nn.init.zeros_(self.to_out.weight)

    @staticmethod
    def frames(video: Tensor, cell: int, period: int, begun: bool) -> Tensor:
        """Video `B 3 T H W` -> the last frame of each latent, small, as 2 x 2 cells on x's grid: `B 12 t h w`.

        Args:
            video: the clip, or a chunk of it.
            cell: pixels that a cell of x is wide and high.
            period: frames that a latent stands for.
            begun: whether frames came before.
        """
        last = video[:, :, period - 1 if begun else 0 :: period].transpose(1, 2)
        small = F.avg_pool2d(last.flatten(0, 1), cell // 2)
        return F.pixel_unshuffle(small, 2).unflatten(0, last.shape[:2]).transpose(1, 2)

    def forward(self, x: Tensor, frames: Tensor, cache: FrameCache | None = None) -> Tensor:
        """x `B C t h w` -> the same shape.

        Args:
            x: the features.
            frames: what `frames` made, `B 12 t h w`.
            cache: the state of a stream that both are the next chunk of.
        """
        before = frames[:, :, :1] if cache is None or self not in cache else cache[self]
        if cache is not None:
            cache[self] = frames[:, :, -1:]
        line = torch.cat([before, frames], dim=2).transpose(1, 2)
        small = F.pixel_shuffle(line.flatten(0, 1), 2)
        own, moved = [], []
        for level in LEVELS:
            at_itself, change = _compared(_patches(small, level).unflatten(0, line.shape[:2]))
            own.append(_on_grid(at_itself, x.shape[3:]))
            moved.append(_on_grid(change, x.shape[3:]))
        known = self.context(torch.cat(own, dim=2).movedim(2, -1).to(x.dtype))
        found = self.hidden(torch.cat(moved, dim=2).movedim(2, -1).to(x.dtype))
        made: Tensor = self.to_out(F.silu(found + known) - F.silu(known))
        return x + made.movedim(-1, 1)


def _patches(small: Tensor, level: int) -> Tensor:
    """Frames `N 3 2h 2w` -> patches `N 27 h' w'` on their grid made `level` times smaller, at least fp32."""
    small = small.to(torch.promote_types(small.dtype, torch.float32))
    smaller = F.avg_pool2d(small, level)
    patch = F.unfold(F.pad(smaller, (1, 1, 1, 1), mode="replicate"), 3).unflatten(2, smaller.shape[2:])
    patch = patch - patch.mean(1, keepdim=True)
    return patch * torch.rsqrt(patch.square().sum(1, keepdim=True) + NOISE**2)


def _compared(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Patches `B 1+t k h w` -> s and c, `B t offsets h w` each, of all frames but the first."""
    here, height, width = patches[:, 1:], *patches.shape[3:]
    around = F.pad(patches.flatten(0, 1), (REACH,) * 4).unflatten(0, patches.shape[:2])
    own, before = [], []
    for row in range(2 * REACH + 1):
        for column in range(2 * REACH + 1):
            there = around[..., row : row + height, column : column + width]
            own.append((here * there[:, 1:]).sum(2))
            before.append((here * there[:, :-1]).sum(2))
    s = torch.stack(own, dim=2)
    return s, torch.stack(before, dim=2) - s


def _on_grid(values: Tensor, size: torch.Size) -> Tensor:
    """Maps `B t n h' w'` on a grid finer or coarser by a whole number, as `B t n h w`."""
    flat = values.flatten(0, 1)
    ratio = flat.shape[-1] // size[1]
    if ratio > 1:
        flat = F.avg_pool2d(flat, ratio)
    elif flat.shape[2:] != size:
        flat = F.interpolate(flat, size=size, mode="nearest")
    return flat.unflatten(0, values.shape[:2])
