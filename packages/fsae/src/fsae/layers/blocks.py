"""The two blocks of FSAE (paper §2.2.1): residual convolutions in outer stages, EfficientViT blocks in inner ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsae.layers.attention import LiteMLA
from fsae.layers.config import BlockStyle
from fsae.layers.conv import POINT, Kernel, VideoConv3d, early
from fsae.layers.norm import PixelNorm
from fsae.layers.recomputed import Recomputed
from fsae.streaming import FrameCache
from fsae.tiling import RECOMPUTED, frames_at_once


class ResBlock(nn.Module):
    """x + norm(conv2(SiLU(conv1 x))) [+ noise · n], the norm last on the branch as in DC-AE.

    The noise (paper §2.2.3) comes after the norm, where the branch's level is the norm's weight and 0.05 a defined
    ratio.
    """

    def __init__(self, channels: int, style: BlockStyle) -> None:
        super().__init__()
        self.noise = style.noise
        self.conv1 = VideoConv3d(channels, channels, time=style.time, group=style.group)
        self.conv2 = VideoConv3d(channels, channels, Kernel(bias=False), time=style.time, group=style.group)
        self.norm = PixelNorm(channels, style.eps, style.norm_affine)

    def forward(self, x: Tensor, noise_map: Tensor | None = None, cache: FrameCache | None = None) -> Tensor:
        """`B C T H W` -> the same shape. noise_map: `1 1 1 H W`, one for all frames, so that it does not flicker."""
        # The branch's inside has no name, so that it is gone before the norm.
        alone = not torch.is_grad_enabled()
        branch = self.norm(self.conv2(F.silu(self.conv1(x, cache), inplace=alone), cache), own=True)
        if noise_map is not None:
            branch = _sum(branch, self.noise * noise_map)
        return _sum(branch, x)


class GLUMBConv(Recomputed):
    """Gated inverted bottleneck: C -> 8C, SiLU, depthwise 3x3x3, value · SiLU(gate), 4C -> C, norm. No residual.

    In the inner stages its depthwise kernel is the only one that looks across frames.
    """

    def __init__(self, channels: int, style: BlockStyle) -> None:
        super().__init__()
        wide = 8 * channels
        self.inverted = VideoConv3d(channels, wide, Kernel(1, taps=1))
        self.depth = VideoConv3d(wide, wide, Kernel(groups=wide), time=style.time, group=style.group)
        self.point = VideoConv3d(wide // 2, channels, POINT)
        self.norm = PixelNorm(channels, style.eps, style.norm_affine)

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """`B C T H W` -> the same shape. Many frames go through as a stream, to hold few 8C-wide ones at once."""
        count = frames_at_once(x, 8)
        if self.recomputes and cache is None and self.depth.group == 1:
            return self._recomputed(x, RECOMPUTED * count)
        if x.shape[2] <= count:
            return self._rest(self.depth(self._wide(x), cache))
        if self.depth.time == "standard":
            return torch.cat(list(self._with_neighbours(x.split(count, dim=2))), dim=2)
        stream = FrameCache() if cache is None else cache
        whole = max(count // self.depth.group, 1) * self.depth.group
        first = whole if self.depth in stream else whole + 1
        parts = [x[:, :, :first], *x[:, :, first:].split(whole, dim=2)]
        return torch.cat([self._rest(self.depth(self._wide(part), stream)) for part in parts if part.shape[2]], dim=2)

    def _recomputed(self, x: Tensor, count: int) -> Tensor:
        """`count` frames at a time, with their neighbours of the narrow x, so that nothing wide is kept."""
        if x.shape[2] <= count:
            return self._rest(self.depth(self._wide(x)))
        before, after = {"causal": (2, 0), "standard": (1, 1), "group_causal": (1, 0)}[self.depth.time]
        line = torch.cat([*[x[:, :, :1]] * before, x, *[x[:, :, -1:]] * after], dim=2)
        parts = [line[:, :, start : start + count + before + after] for start in range(0, x.shape[2], count)]
        return torch.cat([self.run(self, part, call=self._between) for part in parts], dim=2)

    def _between(self, line: Tensor) -> Tensor:
        """Frames and their neighbours -> the frames; where groups are of one frame, the one behind is the same."""
        weight = early(self.depth.weight, 2) if self.depth.time == "group_causal" else None
        return self._rest(self.depth.convolve(self._wide(line), weight))

    def _with_neighbours(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """The non-causal form of a stream: each part between the last frame before it and the first behind it."""
        ahead = self._wide(parts[0])
        before = ahead[:, :, :1]
        for following in (*parts[1:], None):
            here = ahead
            ahead = here[:, :, -1:] if following is None else self._wide(following)
            yield self._rest(self.depth.convolve(torch.cat([before, here, ahead[:, :, :1]], dim=2)))
            before = here[:, :, -1:]

    def _wide(self, x: Tensor) -> Tensor:
        return F.silu(self.inverted(x), inplace=not torch.is_grad_enabled())

    def _rest(self, wide: Tensor) -> Tensor:
        value, gate = wide.chunk(2, dim=1)
        return self.norm(self.point(value * F.silu(gate)), own=True)


class EViTBlock(nn.Module):
    """x + LiteMLA(x), then x + GLUMBConv(x)."""

    def __init__(self, channels: int, style: BlockStyle) -> None:
        super().__init__()
        self.attention = LiteMLA(channels, style.head_dim, style.eps, style.norm_affine)
        self.local = GLUMBConv(channels, style)

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """`B C T H W` -> the same shape."""
        x = _sum(self.attention(x), x)
        return _sum(self.local(x, cache), x)


def _sum(made: Tensor, other: Tensor) -> Tensor:
    """made + other; written over `made`, which nobody else looks at, where no gradient will ask for it."""
    if torch.is_grad_enabled() or torch.result_type(made, other) != made.dtype:
        return made + other
    return made.add_(other)
