"""Convolutions over video (paper §2.2.1 and §2.2.3): causal, non-causal and group-causal time, zero-padded space.

One class holds the three kinds because they share weights: a kernel of three temporal taps sees, at frame t,

    causal         t-2, t-1, t      the encoder, and the decoder before its fine-tuning
    standard       t-1, t, t+1      the Standard decoder: the whole clip is one window
    group_causal   t-1, t, t+1      the Lite decoder: t+1 exists only inside a group of frames, elsewhere it is t again

Missing frames are copies of the nearest frame there is. A kernel whose temporal taps sum to a 2-D kernel is therefore
exactly that 2-D convolution on one image and on a static clip, which is what makes joint image and video training
possible.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TimeKind = Literal["causal", "standard", "group_causal"]


class VideoConv3d(nn.Conv3d):
    """A convolution over `B C T H W` with "same" spatial padding and a temporal kernel of 1 or 3 taps.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        kernel_size: the spatial kernel (odd).
        time_kernel: 3, or 1 for a convolution that looks at one frame.
        time: how frames are padded, see the top of this file.
        group: frames a group, for `group_causal`; the clip's first frame is a group of its own.
        stride: the spatial stride.
        time_stride: the temporal stride (causal only): T = 1 + 2n frames become 1 + n, output j sees 2j-2, 2j-1, 2j.
        groups: channel groups, as in `torch.nn.Conv3d`.
        bias: whether a bias is added.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        time_kernel: Literal[1, 3] = 3,
        time: TimeKind = "causal",
        group: int = 1,
        stride: int = 1,
        time_stride: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        if time not in get_args(TimeKind):
            raise ValueError(f"time is {time!r}; accepted are {', '.join(get_args(TimeKind))}")
        if time_stride > 1 and time != "causal":
            raise ValueError("a temporal stride is defined for causal convolutions only")
        super().__init__(
            in_channels,
            out_channels,
            (time_kernel, kernel_size, kernel_size),
            stride=(time_stride, stride, stride),
            padding=(0, kernel_size // 2, kernel_size // 2),
            groups=groups,
            bias=bias,
        )
        self.time = time
        self.group = group

    @property
    def current_tap(self) -> int:
        """The index of the temporal tap that sees the frame at the output's own time."""
        if self.kernel_size[0] == 1:
            return 0
        return 2 if self.time == "causal" else 1

    def forward(self, x: Tensor) -> Tensor:
        """`B C_in T H W` -> `B C_out T' H' W'`."""
        if self.kernel_size[0] == 1:
            return self._convolve(x)
        if x.shape[2] == 1:
            return self._one_frame(x)
        if self.time == "causal":
            first = x[:, :, :1]
            return self._convolve(torch.cat([first, first, x], dim=2))
        if self.time == "standard":
            return self._convolve(torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2))
        return self._group_causal(x)

    def _convolve(self, padded: Tensor) -> Tensor:
        """Convolve a clip that has its neighbour frames already.

        A depthwise kernel goes tap by tap in 2-D, frames in the batch: the same sum, and several times faster to
        differentiate than any library's depthwise convolution in 3-D.
        """
        if self.groups == 1 or self.groups != self.in_channels:
            return super().forward(padded)
        batch, taps = padded.shape[0], self.kernel_size[0]
        frames = padded.shape[2] - taps + 1
        out: Tensor | None = None
        for tap in range(taps):
            window = padded[:, :, tap : tap + frames].transpose(1, 2).flatten(0, 1)
            bias = self.bias if tap == 0 else None
            part = F.conv2d(window, self.weight[:, :, tap], bias, padding=self.padding[1:], groups=self.groups)
            out = part if out is None else out + part
        assert out is not None
        return out.unflatten(0, (batch, frames)).transpose(1, 2)

    def _one_frame(self, x: Tensor) -> Tensor:
        """All three taps see the one frame: sum them and convolve in 2-D, at a third of the cost."""
        y = F.conv2d(x[:, :, 0], self.weight.sum(2), self.bias, self.stride[1:], self.padding[1:], groups=self.groups)
        return y.unsqueeze(2)

    def _group_causal(self, x: Tensor) -> Tensor:
        """Frame 0 alone, then groups of `group` frames, each with the frame before it and a copy of its last frame."""
        batch, channels, frames, height, width = x.shape
        if (frames - 1) % self.group:
            raise ValueError(f"{frames} frames do not split into one frame and groups of {self.group}")
        count = (frames - 1) // self.group
        first = self._one_frame(x[:, :, :1])
        body = x[:, :, 1:].unflatten(2, (count, self.group))
        before = torch.cat([x[:, :, :1], body[:, :, :-1, -1]], dim=2).unsqueeze(3)
        windows = torch.cat([before, body, body[:, :, :, -1:]], dim=3)
        folded = windows.transpose(1, 2).reshape(batch * count, channels, self.group + 2, height, width)
        out = self._convolve(folded).unflatten(0, (batch, count))
        return torch.cat([first, out.transpose(1, 2).flatten(2, 3)], dim=2)
