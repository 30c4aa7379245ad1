"""The parameter-free shortcuts of down- and upsampling in space (paper §2.2.1), on frames `N C H W`.

dc-ae   DC-AE's space-to-channel averages and channel-to-space copies, which its weights need
even    the mean of each 2x2 pixels and a copy to each of them, for training from scratch

DC-AE's order of channels (c, i, j) treats rows and columns differently: where a step up halves the channels, a channel
fills one row of each 2x2 pixels, which a model trained from scratch keeps as scan-lines. The even shortcut treats rows
and columns alike. Both leave what is constant in space as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

ShortcutKind = Literal["dc-ae", "even"]


@dataclass(frozen=True)
class Shortcut:
    """The shortcut of one step, `in_channels` -> `out_channels`; `up` and `down` are for steps of that direction. A
    `ValueError` for an unknown kind, or channels that an even shortcut cannot carry."""

    kind: ShortcutKind
    in_channels: int
    out_channels: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(ShortcutKind):
            raise ValueError(f"shortcut is {self.kind!r}; accepted are {', '.join(get_args(ShortcutKind))}")
        small, large = sorted((self.in_channels, self.out_channels))
        if self.even and large % small:
            raise ValueError(
                f"an even shortcut from {self.in_channels} to {self.out_channels} channels needs one to be a "
                "multiple of the other"
            )

    @property
    def even(self) -> bool:
        """Whether rows and columns, and frames in time, are treated alike."""
        return self.kind == "even"

    def down(self, x: Tensor) -> Tensor:
        """`N C_in 2h 2w` -> `N C_out h w`."""
        if self.even:
            return self._channels(F.avg_pool2d(x, 2))
        return F.pixel_unshuffle(x, 2).unflatten(1, (self.out_channels, -1)).mean(2)

    def up(self, x: Tensor) -> Tensor:
        """`N C_in h w` -> `N C_out 2h 2w`."""
        if self.even:
            return F.interpolate(self._channels(x), scale_factor=2, mode="nearest")
        return F.pixel_shuffle(x.repeat_interleave(self._copies, dim=1), 2)

    def corner(self, x: Tensor, place: int) -> Tensor:
        """What `up` puts at one of the 2x2 pixels of every cell, row by row: `N C_in ...` -> `N C_out ...`."""
        if self.even:
            return self._channels(x)
        if 4 % self._copies == 0:
            return x[:, place // self._copies :: 4 // self._copies]
        return x[:, torch.arange(place, 4 * self.out_channels, 4, device=x.device) // self._copies]

    @property
    def _copies(self) -> int:
        return 4 * self.out_channels // self.in_channels

    def _channels(self, x: Tensor) -> Tensor:
        """The mean over C_in / C_out consecutive channels, or C_out / C_in copies of each."""
        if self.in_channels > self.out_channels:
            return x.unflatten(1, (self.out_channels, -1)).mean(2)
        return x.repeat_interleave(self.out_channels // self.in_channels, dim=1)
