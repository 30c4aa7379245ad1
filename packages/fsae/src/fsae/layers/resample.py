"""Residual down- and upsampling (paper §2.2.1): a strided or interpolating convolution plus a parameter-free shortcut.

The shortcuts are DC-AE's space-to-channel averages and channel-to-space copies. Where a step also halves or doubles
time, frames pair as (0,0), (1,2), (3,4), ...: the shortcut averages each pair before the spatial part, and copies each
frame after it. That is a time-space-to-channel shuffle with time as the fastest sub-channel, the order under which an
image or a static clip passes exactly as through the 2-D autoencoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsae.layers.conv import TimeKind, VideoConv3d


class Downsample(nn.Module):
    """`B C_in T H W` -> `B C_out T' H/2 W/2`, with T = 1 + 2n -> T' = 1 + n where `halve_time`."""

    def __init__(self, in_channels: int, out_channels: int, *, halve_time: bool) -> None:
        super().__init__()
        if 4 * in_channels % out_channels:
            raise ValueError(f"{out_channels} channels do not divide 4 x {in_channels}; the shortcut needs it")
        self.halve_time = halve_time
        self.average = 4 * in_channels // out_channels
        self.conv = VideoConv3d(in_channels, out_channels, stride=2, time_stride=2 if halve_time else 1)

    def shortcut(self, x: Tensor) -> Tensor:
        """Pairs of frames averaged, 2x2 pixels to channels, then the mean over consecutive channels."""
        if self.halve_time:
            pairs = torch.cat([x[:, :, :1], x], dim=2).unflatten(2, (-1, 2))
            x = pairs.mean(3)
        batch, _, frames = x.shape[:3]
        x = F.pixel_unshuffle(x.transpose(1, 2).flatten(0, 1), 2)
        x = x.unflatten(1, (-1, self.average)).mean(2)
        return x.unflatten(0, (batch, frames)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shortcut(x)


class Upsample(nn.Module):
    """`B C_in t h w` -> `B C_out T 2h 2w`, with t = 1 + n -> T = 1 + 2n where `double_time`."""

    def __init__(
        self, in_channels: int, out_channels: int, *, double_time: bool, time: TimeKind, group: int = 1
    ) -> None:
        super().__init__()
        if 4 * out_channels % in_channels:
            raise ValueError(f"{in_channels} channels do not divide 4 x {out_channels}; the shortcut needs it")
        self.double_time = double_time
        self.copies = 4 * out_channels // in_channels
        self.conv = VideoConv3d(in_channels, out_channels, time=time, group=group)

    def _double_frames(self, x: Tensor) -> Tensor:
        """Each frame twice, less the first: the inverse of pairing (0,0), (1,2), (3,4), ..."""
        return x.repeat_interleave(2, dim=2)[:, :, 1:] if self.double_time else x

    def shortcut(self, x: Tensor) -> Tensor:
        """Channels copied, channels to 2x2 pixels, then each frame copied."""
        batch, _, frames = x.shape[:3]
        x = x.transpose(1, 2).flatten(0, 1).repeat_interleave(self.copies, dim=1)
        x = F.pixel_shuffle(x, 2).unflatten(0, (batch, frames)).transpose(1, 2)
        return self._double_frames(x)

    def forward(self, x: Tensor) -> Tensor:
        near = F.interpolate(self._double_frames(x), scale_factor=(1, 2, 2), mode="nearest")
        return self.conv(near) + self.shortcut(x)
