"""Residual down- and upsampling (paper §2.2.1): a strided or interpolating convolution plus a parameter-free shortcut.

In space the shortcuts are those of `fsae.layers.shortcuts`. Where a step also halves or doubles time, frames pair as
(0,0), (1,2), (3,4), ...: the shortcut averages each pair before the spatial part and copies each frame after it: a
time-space-to-channel shuffle with time as the fastest sub-channel. An image or a static clip passes exactly as through
the 2-D autoencoder. The even kind keeps the later frame of each pair and, on the way back, puts its mean with the frame
before in front of it: what moves is neither blurred, nor stands still for two frames to jump then.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsae.layers.config import BlockStyle
from fsae.layers.conv import Kernel, VideoConv3d
from fsae.layers.folding import can_fold, fold, kept_frames
from fsae.layers.shortcuts import Shortcut, ShortcutKind
from fsae.streaming import FrameCache

# Cells of a frame from which on the multiplications saved outweigh the summing of weights, even for one frame.
FOLDING_PAYS = 1024


class Downsample(nn.Module):
    """`B C_in T H W` -> `B C_out T' H/2 W/2`, with T = 1 + 2n -> T' = 1 + n where `halve_time`."""

    def __init__(
        self, in_channels: int, out_channels: int, *, halve_time: bool, shortcut: ShortcutKind = "dc-ae"
    ) -> None:
        super().__init__()
        if 4 * in_channels % out_channels:
            raise ValueError(f"{out_channels} channels do not divide 4 x {in_channels}; the shortcut needs it")
        self.halve_time = halve_time
        self.in_space = Shortcut(shortcut, in_channels, out_channels)
        self.conv = VideoConv3d(in_channels, out_channels, Kernel(stride=2, time_stride=2 if halve_time else 1))

    def shortcut(self, x: Tensor, begun: bool = False) -> Tensor:
        """Pairs of frames averaged, or their later one kept, then the shortcut in space.

        begun: whether frames came before x; the clip's first frame is a pair with itself.
        """
        if self.halve_time and self.in_space.even:
            x = x[:, :, 1 if begun else 0 :: 2]
        elif self.halve_time:
            line = x if begun else torch.cat([x[:, :, :1], x], dim=2)
            x = line.unflatten(2, (-1, 2)).mean(3)
        return _by_frame(self.in_space.down, x)

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        begun = cache is not None and self.conv in cache
        return self.conv(x, cache) + self.shortcut(x, begun)


class Upsample(nn.Module):
    """`B C_in t h w` -> `B C_out T 2h 2w`, with t = 1 + n -> T = 1 + 2n where `double_time`.

    Attributes:
        folded: whether the convolution is folded (see `fsae.layers.folding`), which gives the same numbers for less
            work. None folds where it pays: outside of training, on frames of some size.
    """

    def __init__(self, in_channels: int, out_channels: int, style: BlockStyle, *, double_time: bool) -> None:
        super().__init__()
        if 4 * out_channels % in_channels:
            raise ValueError(f"{in_channels} channels do not divide 4 x {out_channels}; the shortcut needs it")
        self.double_time = double_time
        self.in_space = Shortcut(style.shortcut, in_channels, out_channels)
        self.conv = VideoConv3d(in_channels, out_channels, time=style.time, group=style.group)
        self.folded: bool | None = None

    def _double_frames(self, x: Tensor, begun: bool) -> Tensor:
        """Each frame twice, less the clip's first: the inverse of pairing (0,0), (1,2), (3,4), ..."""
        if not self.double_time:
            return x
        return x.repeat_interleave(2, dim=2)[:, :, 0 if begun else 1 :]

    @property
    def _looks_back(self) -> bool:
        """Whether the shortcut needs the frame before a chunk."""
        return self.in_space.even and self.double_time

    def shortcut(self, x: Tensor, begun: bool = False, before: Tensor | None = None) -> Tensor:
        """The shortcut in space, then each frame twice: copied, or after its mean with the frame before it.

        begun: whether frames came before x.
        before: the last of these, `B C_in 1 h w`, where the shortcut looks at it.
        """
        if not self._looks_back:
            return self._double_frames(_by_frame(self.in_space.up, x), begun)
        line = _by_frame(self.in_space.up, x if before is None else torch.cat([before, x], dim=2))
        between = (line[:, :, :-1] + line[:, :, 1:]) / 2
        pairs = torch.stack([between, line[:, :, 1:]], dim=3).flatten(2, 3)
        return torch.cat([line[:, :, :1], pairs], dim=2) if before is None else pairs

    def _folds(self, cells: int) -> bool:
        if not can_fold(self.conv, self.double_time):
            return False
        return self.folded if self.folded is not None else not self.training and cells >= FOLDING_PAYS

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        # The number of frames must not decide, as it may differ between the chunks of a stream.
        folds = self._folds(x.shape[0] * x.shape[3] * x.shape[4])
        count = kept_frames(self.conv, self.double_time) if folds else int(self._looks_back)
        before = None if cache is None or self not in cache else cache[self]
        begun = before is not None or (cache is not None and self.conv in cache)
        if cache is not None and count:
            line = torch.cat([x[:, :, :1]] * count if before is None else [before], dim=2)
            cache[self] = torch.cat([line, x[:, :, -count:]], dim=2)[:, :, -count:]
        if folds:
            return fold(self.conv, x, before, self.double_time, self.in_space)
        near = F.interpolate(self._double_frames(x, begun), scale_factor=(1, 2, 2), mode="nearest")
        return self.conv(near, cache) + self.shortcut(x, begun, before)


def _by_frame(shortcut: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of frames `N C h w` on those of a clip `B C T h w`."""
    return shortcut(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
