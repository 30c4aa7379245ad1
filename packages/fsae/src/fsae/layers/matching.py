"""Seeing motion: what of each latent's frame stood where in the frame of the latent before.

Convolutions in time see motion of less than their reach alone, and learn to from many clips. A small encoder is given
the comparison itself, as networks for optical flow are (RAFT, arXiv 2003.12039): how well two frames agree at each
offset in a neighbourhood, and the mean offset that this votes for. An option of ours, off in the paper's presets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsae.layers.conv import Kernel, VideoConv3d
from fsae.streaming import FrameCache

LEVELS = (1, 2, 4)
"""How much smaller than the finest each grid is."""

WINDOWS = (7, 13)
"""Cells of a grid, across, whose votes are taken together: small ones follow detail, large ones err less."""

REACH = 4
"""Cells of each grid, on each side, that a cell is compared with: at the coarsest, 16 of the finest."""

SHARPNESS = 40.0
"""How far the best offset outweighs others."""

DETAIL, LIGHT = 7, 9
"""Windows about a cell: what is compared is its difference from the mean of one, over the deviation in the other."""

# A deviation, colours in [-1, 1], that counts as flat.
NOISE = 0.02


class Matching(nn.Module):
    """What latents say of motion: g = SiLU(W_1 c + u) - SiLU(u), u = W_0 s + b, where c says what moved and s how sure
    that is; the means of g over 2 x 2 places a latent, each beside its neighbours and the frame's mean; a linear layer.

    Of small frames, k(t, p) are the colours at cell p, less their mean nearby and over their deviation nearby. How they
    agree with those of a frame t' at offsets o, |o| <= REACH in h and in w, is the mean over a window about p of

        a_o(p) = < k(t, p), k(t', p + o) >.

    Offsets weighed by softmax(SHARPNESS a) have a mean m and a spread r. Those of the frame with itself, t' = t, are
    taken from those with the frame before: c = (m_before - m_itself, r_before - r_itself) and s = r_itself, for each of
    `LEVELS` and `WINDOWS`. Beyond the frame's edge k counts as zero.

    Where nothing moves c is zero and so is the result, for pictures and the clip's first frame too. The last layer
    starts at zero.

    Args:
        latent_channels: of the latents that the result is added to.
        places: small frames' cells, in pairs, that half a latent is wide and high.
        width: channels of g.
    """

    # Channels of the small frames: 2 x 2 cells of 3 colours.
    frame_channels = 12

    def __init__(self, latent_channels: int, places: int, width: int = 64) -> None:
        super().__init__()
        ways = len(LEVELS) * len(WINDOWS)
        self.places = places
        self.sure = nn.Linear(ways, width)
        self.moved = nn.Linear(3 * ways, width, bias=False)
        self.near = VideoConv3d(2 * width, width, Kernel(taps=1, bias=False))
        self.to_latents = nn.Linear(4 * width, latent_channels, bias=False)
        nn.init.zeros_(self.to_latents.weight)

    @staticmethod
    def frames(video: Tensor, cell: int, period: int, begun: bool) -> Tensor:
        """Video `B 3 T H W` -> the last frame of each latent, small, as 2 x 2 of its cells each: `B 12 t h w`.

        Args:
            video: the clip, or a chunk of it.
            cell: pixels that 2 x 2 cells are wide and high.
            period: frames that a latent stands for.
            begun: whether frames came before.
        """
        last = video[:, :, period - 1 if begun else 0 :: period].transpose(1, 2)
        small = F.avg_pool2d(last.flatten(0, 1), cell // 2)
        return F.pixel_unshuffle(small, 2).unflatten(0, last.shape[:2]).transpose(1, 2)

    def forward(self, frames: Tensor, cache: FrameCache | None = None) -> Tensor:
        """Small frames, as `frames` makes them -> what is to be added to the latents, `B c t h' w'`.

        cache: the state of a stream that they are the next chunk of.
        """
        before = frames[:, :, :1] if cache is None or self not in cache else cache[self]
        if cache is not None:
            cache[self] = frames[:, :, -1:]
        moved, sure = self._seen(torch.cat([before, frames], dim=2))
        known = self.sure(sure.to(self.sure.weight.dtype))
        cells = F.silu(self.moved(moved.to(self.moved.weight.dtype)) + known) - F.silu(known)
        places = F.avg_pool2d(cells.permute(0, 3, 1, 2), self.places)
        around = torch.cat([places, places.mean((2, 3), keepdim=True).expand_as(places)], dim=1)
        places = places + F.silu(self.near(around.unsqueeze(2)))[:, :, 0]
        latents: Tensor = self.to_latents(F.pixel_unshuffle(places, 2).movedim(1, -1))
        return latents.unflatten(0, (len(frames), -1)).permute(0, 4, 1, 2, 3)

    @staticmethod
    @torch.no_grad()
    def _seen(frames: Tensor) -> tuple[Tensor, Tensor]:
        """Small frames `B 12 1+t h w` -> c and s of all but the first, `B·t h w channels`: nothing to be learned."""
        # Autocast would have halves, which are too coarse for differences of agreements.
        with torch.autocast(frames.device.type, enabled=False):
            line = frames.transpose(1, 2).to(torch.promote_types(frames.dtype, torch.float32))
            small = F.pixel_shuffle(line.flatten(0, 1), 2)
            moved, sure = [], []
            for level in LEVELS:
                keys = _keys(F.avg_pool2d(small, level)).unflatten(0, line.shape[:2])
                itself, before = _agreement(keys[:, 1:], keys[:, 1:]), _agreement(keys[:, 1:], keys[:, :-1])
                for window in WINDOWS:
                    own = _vote(nearby(itself, window))
                    moved.append(_on_grid(_vote(nearby(before, window)) - own, line.shape[3:]))
                    sure.append(_on_grid(own[:, 2:], line.shape[3:]))
            return torch.cat(moved, dim=1).movedim(1, -1), torch.cat(sure, dim=1).movedim(1, -1)


def _keys(small: Tensor) -> Tensor:
    """Frames `N 3 h w` -> k, of the same shape."""
    detail = small - nearby(small, DETAIL)
    return detail * torch.rsqrt(nearby(detail.square().sum(1, keepdim=True), LIGHT) + NOISE**2)


def nearby(x: Tensor, window: int) -> Tensor:
    """Means of maps `N C h w` over windows about each cell, as far as they lie in the frame; rows, then columns."""
    rows = F.avg_pool2d(x, (window, 1), 1, (window // 2, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, window), 1, (0, window // 2), count_include_pad=False)


def _agreement(here: Tensor, there: Tensor) -> Tensor:
    """k of frames and of those they are compared with, `B t 3 h w` each -> products `B·t offsets h w`."""
    height, width = here.shape[3:]
    here, around = here.flatten(0, 1), F.pad(there.flatten(0, 1), (REACH,) * 4)
    side = range(2 * REACH + 1)
    found = [(here * around[..., r : r + height, c : c + width]).sum(1) for r in side for c in side]
    return torch.stack(found, dim=1)


def _vote(agreement: Tensor) -> Tensor:
    """`N offsets h w` -> the offsets' mean, row before column, and spread, `N 3 h w`, as shares of `REACH`."""
    weights = torch.softmax(SHARPNESS * agreement, dim=1)
    place = torch.linspace(-1, 1, 2 * REACH + 1, device=weights.device, dtype=weights.dtype)
    offsets = torch.cartesian_prod(place, place)
    mean = torch.einsum("nohw,ok->nkhw", weights, offsets)
    spread = torch.einsum("nohw,o->nhw", weights, offsets.square().sum(1)) - mean.square().sum(1)
    return torch.cat([mean, spread.unsqueeze(1)], dim=1)


def _on_grid(values: Tensor, grid: torch.Size) -> Tensor:
    """Maps `N n h' w'` on a grid finer or coarser by a whole number, on that of pairs of cells."""
    ratio = values.shape[-1] // grid[1]
    return F.avg_pool2d(values, ratio) if ratio else F.interpolate(values, size=grid, mode="nearest")
