"""Upsample folding: nearest x2 and a kernel of three taps are two kernels of two taps, one for each copy (exact).

Along one axis an upsampled line holds each cell twice, ... a a b b c c ..., so that two of three taps meet one cell:

    first copy of b     w0 a + (w1 + w2) b          `early` taps on (a, b)
    second copy of b    (w0 + w1) b + w2 c          `late` taps on (b, c)

A spatial up-convolution then costs (2/3)² of its multiplications, one that doubles time as well (2/3)³, and the
upsampled tensor, the largest of a decoder, is never made. Zeros around the frame stay zeros: what lies outside the
upsampled frame lies outside the small one. In time the copies of the nearest frame that stand for missing ones follow
the same algebra, per kind of time (see `fsae.layers.conv`); where all three taps meet one frame, their sum is one tap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fsae.layers.conv import VideoConv3d, conv3d, early, late
from fsae.layers.shortcuts import Shortcut


@dataclass(frozen=True)
class TimePhase:
    """Output frames that share a kernel in time.

    Attributes:
        kernel: `C_out C_in taps 3 3`.
        source: the frames it runs over, `B C_in n h w`, complete in time.
        stride: its step in time.
        own: the source frame that the shortcut gives each output frame, `B C_in m h w`.
        frames: where the m output frames stand.
    """

    kernel: Tensor
    source: Tensor
    stride: int
    own: Tensor
    frames: slice


def can_fold(conv: VideoConv3d, double_time: bool) -> bool:
    """Whether `time_phases` knows the case: a group of frames must be the copies of whole frames, or one frame."""
    return conv.time != "group_causal" or (conv.group % 2 == 0 if double_time else conv.group == 1)


def kept_frames(conv: VideoConv3d, double_time: bool) -> int:
    """Frames before a chunk, at the small rate, that a folded up-convolution needs."""
    return 2 if conv.time == "causal" and not double_time else 1


def time_phases(
    conv: VideoConv3d, x: Tensor, before: Tensor | None, double_time: bool, even: bool = False
) -> Iterator[TimePhase]:
    """The phases in time of `conv` over x `B C t h w`, upsampled.

    before: the `kept_frames` before x; None where x starts the clip.
    even: whether the shortcut's first copy of a frame is its mean with the one before it.
    """
    if before is None and x.shape[2] == 1:
        yield TimePhase(conv.weight.sum(2, keepdim=True), x, 1, x, slice(None))
    elif double_time:
        yield from _doubled(conv, x, before, even)
    elif conv.time == "causal":
        past = [x[:, :, :1]] * 2 if before is None else [before]
        yield TimePhase(conv.weight, torch.cat([*past, x], 2), 1, x, slice(None))
    elif conv.time == "standard":
        yield TimePhase(conv.weight, torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2), 1, x, slice(None))
    else:
        past = [x[:, :, :1] if before is None else before]
        yield TimePhase(early(conv.weight, 2), torch.cat([*past, x], 2), 1, x, slice(None))


def _doubled(conv: VideoConv3d, x: Tensor, before: Tensor | None, even: bool) -> Iterator[TimePhase]:
    """Each frame twice, the clip's first frame once: as if its first copy had been dropped."""
    line = x if before is None else torch.cat([before, x], 2)
    own, weight = (line[:, :, :-1] + line[:, :, 1:]) / 2 if even else line[:, :, 1:], conv.weight
    # Output frame 2j - 1 - skip is the first copy of frame j of the line, 2j - skip the second.
    skip = 0 if before is None else 1
    firsts, seconds = slice(1 - skip, None, 2), slice(skip, None, 2)
    if conv.time == "causal":
        yield TimePhase(late(weight, 2), line, 1, own, firsts)
        past = torch.cat([line[:, :, :1], line], 2) if before is None else line
        yield TimePhase(early(weight, 2), past, 1, x, seconds)
        return
    yield TimePhase(early(weight, 2), line, 1, own, firsts)
    if conv.time == "standard":
        yield TimePhase(late(weight, 2), torch.cat([line, line[:, :, -1:]], 2), 1, x, seconds)
        return
    half = conv.group // 2
    for place in range(1, half):
        # Second copies inside a group look ahead at the group's next frame ...
        frames = slice(2 * place - skip, None, conv.group)
        yield TimePhase(late(weight, 2), line[:, :, place:], half, line[:, :, place::half], frames)
    # ... and those at its end at themselves.
    ends = line[:, :, half * skip :: half]
    yield TimePhase(weight.sum(2, keepdim=True), ends, 1, ends, slice((conv.group - 1) * skip, None, conv.group))


def fold(conv: VideoConv3d, x: Tensor, before: Tensor | None, double_time: bool, shortcut: Shortcut) -> Tensor:
    """conv(upsampled x) plus the shortcut: `B C_in t h w` -> `B C_out T 2h 2w`, for a kernel of three taps on every
    axis.

    before: see `time_phases`. double_time: whether frames are doubled as well.
    """
    batch, _, frames, height, width = x.shape
    if double_time:
        frames = 2 * frames - (1 if before is None else 0)
    channels = conv.out_channels
    bias = None if conv.bias is None else conv.bias.repeat(4)
    out: Tensor | None = None
    for phase in time_phases(conv, x, before, double_time, shortcut.even):
        # The four copies of a cell as four sets of channels: one pass over the source.
        tall = early(phase.kernel, 3), late(phase.kernel, 3)
        kernel = torch.cat([side(rows, 4) for rows in tall for side in (early, late)])
        parts = conv3d(phase.source, kernel, bias, (phase.stride, 1, 1))
        if out is None:
            out = parts.new_empty(batch, channels, frames, 2 * height, 2 * width)
        for place, part in enumerate(parts.split(channels, dim=1)):
            row, column = divmod(place, 2)
            # One ring of zeros gives an output more than cells; the copy's are the last or all but the last.
            part = part[..., row : row + height, column : column + width]
            part = part + shortcut.corner(phase.own, place)
            out[:, :, phase.frames, row::2, column::2] = part
    assert out is not None
    return out
