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

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsae.streaming import FrameCache

# Positions from which on oneDNN's way of storing tensors is worth the reordering.
ONEDNN_PAYS = 1024

TimeKind = Literal["causal", "standard", "group_causal"]


@dataclass(frozen=True)
class Kernel:
    """The kernel of a `VideoConv3d`.

    Attributes:
        size: its rows and columns, an odd number.
        taps: frames it looks at, 3, or 1 for a convolution frame by frame.
        stride: in space.
        time_stride: in time (causal only): T = 1 + 2n frames become 1 + n, output j sees 2j-2, 2j-1, 2j.
        groups: channel groups, as in `torch.nn.Conv3d`.
        bias: whether a bias is added.
    """

    size: int = 3
    taps: Literal[1, 3] = 3
    stride: int = 1
    time_stride: int = 1
    groups: int = 1
    bias: bool = True


# A linear map of the channels at each place.
POINT = Kernel(1, taps=1, bias=False)


class VideoConv3d(nn.Conv3d):
    """A convolution over `B C T H W` with "same" spatial padding and a temporal kernel of 1 or 3 taps.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        kernel: its size and strides.
        time: how frames are padded, see the top of this file.
        group: frames a group, for `group_causal`; the clip's first frame is a group of its own.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Kernel = Kernel(),
        *,
        time: TimeKind = "causal",
        group: int = 1,
    ) -> None:
        if time not in get_args(TimeKind):
            raise ValueError(f"time is {time!r}; accepted are {', '.join(get_args(TimeKind))}")
        if kernel.time_stride > 1 and time != "causal":
            raise ValueError("a temporal stride is defined for causal convolutions only")
        super().__init__(
            in_channels,
            out_channels,
            (kernel.taps, kernel.size, kernel.size),
            stride=(kernel.time_stride, kernel.stride, kernel.stride),
            padding=(0, kernel.size // 2, kernel.size // 2),
            groups=kernel.groups,
            bias=kernel.bias,
        )
        self.time = time
        self.group = group

    @property
    def current_tap(self) -> int:
        """The index of the temporal tap that sees the frame at the output's own time."""
        if self.kernel_size[0] == 1:
            return 0
        return 2 if self.time == "causal" else 1

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """`B C_in T H W` -> `B C_out T' H' W'`.

        cache: the state of a stream that x is the next chunk of; None where x is the whole clip.

        Raises:
            ValueError: a stream through a convolution that looks at later frames, or frames that are no whole groups.
        """
        if self.kernel_size[0] == 1:
            return self.convolve(x)
        if cache is not None and self.time == "standard":
            raise ValueError("a standard convolution looks at later frames and has no stream; use the whole clip")
        before = None if cache is None or self not in cache else cache[self]
        if cache is not None:
            cache[self] = self._last_frames(x, before)
        if before is None and x.shape[2] == 1:
            return self._one_frame(x)
        if self.time == "causal":
            past = [x[:, :, :1]] * 2 if before is None else [before]
            return self.convolve(torch.cat([*past, x], dim=2))
        if self.time == "standard":
            return self.convolve(torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2))
        return self._group_causal(x, before)

    def _last_frames(self, x: Tensor, before: Tensor | None) -> Tensor:
        """What the next chunk needs: one frame, or the two that a causal kernel of stride 1 looks back at."""
        if self.time == "group_causal" or self.stride[0] > 1:
            return x[:, :, -1:]
        if x.shape[2] == 1:
            return torch.cat([x if before is None else before[:, :, -1:], x], dim=2)
        return x[:, :, -2:]

    def convolve(self, padded: Tensor, weight: Tensor | None = None, step: int | None = None) -> Tensor:
        """Convolve a clip that has its neighbour frames already.

        A depthwise kernel goes tap by tap in 2-D, frames in the batch: the same sum, and several times faster to
        differentiate than any library's depthwise convolution in 3-D.

        Args:
            padded: `B C_in T H W`.
            weight: other taps in time than the layer's own.
            step: another stride in time than the layer's own.
        """
        weight = self.weight if weight is None else weight
        if self.groups == 1 or self.groups != self.in_channels:
            stride = (step or self.stride[0], *self.stride[1:])
            return conv3d(padded, weight, self.bias, stride, self.groups)
        batch, taps = padded.shape[0], weight.shape[2]
        frames = padded.shape[2] - taps + 1
        out: Tensor | None = None
        for tap in range(taps):
            window = padded[:, :, tap : tap + frames].transpose(1, 2).flatten(0, 1)
            bias = self.bias if tap == 0 else None
            part = F.conv2d(window, weight[:, :, tap], bias, padding=self.padding[1:], groups=self.groups)
            out = part if out is None else out + part
        assert out is not None
        return out.unflatten(0, (batch, frames)).transpose(1, 2)

    def _one_frame(self, x: Tensor) -> Tensor:
        """All three taps see the one frame: sum them and convolve in 2-D, at a third of the cost."""
        y = F.conv2d(x[:, :, 0], self.weight.sum(2), self.bias, self.stride[1:], self.padding[1:], groups=self.groups)
        return y.unsqueeze(2)

    def _group_causal(self, x: Tensor, before: Tensor | None) -> Tensor:
        """Groups of `group` frames, each with the frame before it and a copy of its last frame.

        Where the clip starts (before is None) frame 0 comes first and alone.
        """
        starts = before is None
        line = x if before is None else torch.cat([before, x], dim=2)
        count, rest = divmod(line.shape[2] - 1, self.group)
        if rest:
            first = "one frame and " if starts else ""
            raise ValueError(f"{x.shape[2]} frames do not split into {first}groups of {self.group}")
        if not self.training and (self.group == 1 or self.groups == 1):
            return self._group_causal_folded(x, line, starts)
        batch, channels, _, height, width = x.shape
        body = line[:, :, 1:].unflatten(2, (count, self.group))
        past = line[:, :, : -self.group : self.group].unsqueeze(3)
        windows = torch.cat([past, body, body[:, :, :, -1:]], dim=3)
        folded = windows.transpose(1, 2).reshape(batch * count, channels, self.group + 2, height, width)
        out = self.convolve(folded).unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)
        return torch.cat([self._one_frame(line[:, :, :1]), out], dim=2) if starts else out

    def _group_causal_folded(self, x: Tensor, line: Tensor, starts: bool) -> Tensor:
        """The same numbers without windows in memory, and two taps at a group's end, where two meet one frame.

        line: x, after the frame before it where there is one.
        """
        ends = early(self.weight, 2)
        if self.group == 1:
            return self.convolve(torch.cat([line[:, :, :1], line], dim=2) if starts else line, ends)
        last = self.convolve(line[:, :, self.group - 1 :], ends, self.group)
        batch, channels, _, height, width = last.shape
        out = last.new_empty(batch, channels, x.shape[2], height, width)
        body = out[:, :, 1:] if starts else out
        body[:, :, self.group - 1 :: self.group] = last
        if line.shape[2] == 1 + self.group:
            body[:, :, :-1] = self.convolve(line)
        else:
            for place in range(self.group - 1):
                body[:, :, place :: self.group] = self.convolve(line[:, :, place:], step=self.group)
        if starts:
            out[:, :, :1] = self._one_frame(line[:, :, :1])
        return out


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], groups: int = 1) -> Tensor:
    """`torch.nn.functional.conv3d`, on a CPU by oneDNN also where PyTorch would take a loop several times slower.

    Frames are padded by half a kernel's rows and columns: by one for kernels of three and of two, which then give one
    row and column more than x has.

    PyTorch asks whether the product of a single input's first four sizes is large, as if they were an image's: a few
    frames of a wide picture look small to it.
    """
    padding = (0, weight.shape[3] // 2, weight.shape[4] // 2)
    direct = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[0] == 1
        and x[0, 0].numel() >= ONEDNN_PAYS
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
    if direct:
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), groups)
    return F.conv3d(x, weight, bias, stride, padding, groups=groups)


def early(kernel: Tensor, dim: int) -> Tensor:
    """Taps (w0, w1 + w2) of a kernel of three: the last two meet the same cell or frame."""
    first, second, third = kernel.unbind(dim)
    return torch.stack([first, second + third], dim)


def late(kernel: Tensor, dim: int) -> Tensor:
    """Taps (w0 + w1, w2): the first two do."""
    first, second, third = kernel.unbind(dim)
    return torch.stack([first + second, third], dim)
