"""The two blocks of FSAE (paper §2.2.1): residual convolutions in outer stages, EfficientViT blocks in inner ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fsae.layers.attention import LiteMLA
from fsae.layers.conv import TimeKind, VideoConv3d
from fsae.layers.norm import PixelNorm


@dataclass(frozen=True)
class BlockStyle:
    """What the blocks of a stage share: how time is padded and how channels are normalised.

    `time` and `group` are those of `VideoConv3d`; `noise` is the weight of the noise of the Standard decoder.
    """

    time: TimeKind = "causal"
    group: int = 1
    head_dim: int = 32
    eps: float = 1e-5
    norm_affine: bool = True
    noise: float = 0.0


class ResBlock(nn.Module):
    """x + norm(conv2(SiLU(conv1 x))) [+ noise · n], the norm last on the branch as in DC-AE.

    The noise (paper §2.2.3) comes after the norm, where the branch's level is the norm's weight and 0.05 a defined
    ratio.
    """

    def __init__(self, channels: int, style: BlockStyle) -> None:
        super().__init__()
        self.noise = style.noise
        self.conv1 = VideoConv3d(channels, channels, time=style.time, group=style.group)
        self.conv2 = VideoConv3d(channels, channels, time=style.time, group=style.group, bias=False)
        self.norm = PixelNorm(channels, style.eps, style.norm_affine)

    def forward(self, x: Tensor, noise_map: Tensor | None = None) -> Tensor:
        """`B C T H W` -> the same shape. noise_map: `1 1 1 H W`, one for all frames, so that it does not flicker."""
        branch = self.norm(self.conv2(F.silu(self.conv1(x))))
        if noise_map is not None:
            branch = branch + self.noise * noise_map
        return x + branch


class GLUMBConv(nn.Module):
    """Gated inverted bottleneck: C -> 8C, SiLU, depthwise 3x3x3, value · SiLU(gate), 4C -> C, norm. No residual.

    In the inner stages its depthwise kernel is the only one that looks across frames.
    """

    def __init__(self, channels: int, style: BlockStyle) -> None:
        super().__init__()
        wide = 8 * channels
        self.inverted = VideoConv3d(channels, wide, 1, time_kernel=1)
        self.depth = VideoConv3d(wide, wide, time=style.time, group=style.group, groups=wide)
        self.point = VideoConv3d(wide // 2, channels, 1, time_kernel=1, bias=False)
        self.norm = PixelNorm(channels, style.eps, style.norm_affine)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.depth(F.silu(self.inverted(x))).chunk(2, dim=1)
        return self.norm(self.point(value * F.silu(gate)))


class EViTBlock(nn.Module):
    """x + LiteMLA(x), then x + GLUMBConv(x)."""

    def __init__(self, channels: int, style: BlockStyle) -> None:
        super().__init__()
        self.attention = LiteMLA(channels, style.head_dim, style.eps, style.norm_affine)
        self.local = GLUMBConv(channels, style)

    def forward(self, x: Tensor) -> Tensor:
        """`B C T H W` -> the same shape."""
        x = x + self.attention(x)
        return x + self.local(x)
