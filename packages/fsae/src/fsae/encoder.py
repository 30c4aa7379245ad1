"""The encoder of FSAE (paper §2.2.1): stages, fine to coarse, each its blocks, then a downsample; the latents last.

Causal in time from end to end: a latent depends on its own frames and those before. The features of frame 0 are
therefore the same whether the image or the whole clip is encoded, and the decoder may use them (paper §2.2.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fsae.layers.blocks import EViTBlock, ResBlock
from fsae.layers.config import StackConfig
from fsae.layers.conv import VideoConv3d
from fsae.layers.matching import Matching
from fsae.layers.recomputed import Recomputed
from fsae.layers.resample import Downsample
from fsae.streaming import FrameCache
from fsae.tiling import OuterStages


class EncoderStage(Recomputed):
    """The blocks of one resolution, and the step down to the next where there is one."""

    def __init__(self, stack: StackConfig, stage: int) -> None:
        super().__init__()
        channels, *coarser = stack.widths[stage:]
        block = ResBlock if stage < stack.residual_stages else EViTBlock
        self.blocks = nn.ModuleList(block(channels, stack.style) for _ in range(stack.depths[stage]))
        halve_time = stage < stack.temporal_stages
        self.down = (
            Downsample(channels, coarser[0], halve_time=halve_time, shortcut=stack.style.shortcut) if coarser else None
        )

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> tuple[Tensor, Tensor]:
        """`B C T H W` -> (the stage's features `B C T H W`, what the next stage gets)."""
        for block in self.blocks:
            x = self.run(block, x, cache=cache)
        return x, x if self.down is None else self.run(self.down, x, cache=cache)


class Encoder(Recomputed):
    """Video `B 3 T H W` in [-1, 1] -> latents `B c t h w`, not yet normalised.

    Attributes:
        outer_stages: the residual stages, which see a part of the frame; the others see all of it.
    """

    def __init__(self, stack: StackConfig) -> None:
        super().__init__()
        self.average = stack.widths[-1] // stack.latent_channels
        self.outer_stages = _outer_stages(stack)
        self.conv_in = VideoConv3d(3, stack.widths[0])
        self.stages = nn.ModuleList(EncoderStage(stack, s) for s in range(len(stack.widths)))
        self.conv_out = VideoConv3d(stack.widths[-1], stack.latent_channels)
        places = self.outer_stages.compression.space // self.outer_stages.cell // 2
        if stack.matching and not places:
            raise ValueError("frames are compared for latents twice as wide as the first inner stage's cells, or more")
        self.match = Matching(stack.latent_channels, places) if stack.matching else None

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.outer(x)[1])[1]

    def features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """`B 3 T H W` -> (the features of every stage, fine to coarse, and the latents)."""
        fine, x = self.outer(x)
        coarse, latents = self.inner(x)
        return fine + coarse, latents

    def outer(self, x: Tensor, cache: FrameCache | None = None) -> tuple[list[Tensor], Tensor]:
        """The convolutional stages, of a whole frame or of a part of it that starts at a cell.

        All that is farther than `outer_stages.halo` cells from an edge of the part is what the whole frame gives there.

        Args:
            x: `B 3 T H W`.
            cache: the state of a stream that x is the next chunk of: 1 + 4n frames at first, 4n from then on.

        Returns:
            The features of each of these stages, and what `inner` starts from, `B C t h w`.
        """
        begun = cache is not None and self.conv_in in cache
        kept, out = self._run(self.run(self.conv_in, x, cache=cache), self.stages[: self.outer_stages.count], cache)
        if self.match is not None:
            # The frames themselves, small, in channels of their own: what is cut and joined stays one map.
            stages = self.outer_stages
            frames = self.match.frames(x, stages.cell, stages.compression.time, begun)
            out = torch.cat([out, frames.to(out.dtype)], dim=1)
        return kept, out

    def inner(self, x: Tensor, cache: FrameCache | None = None) -> tuple[list[Tensor], Tensor]:
        """The whole-frame stages: `outer`'s output -> (the features of each of these stages, the latents)."""
        told: Tensor | float = 0.0
        if self.match is not None:
            x, frames = x.split([x.shape[1] - self.match.frame_channels, self.match.frame_channels], dim=1)
            told = self.match(frames, cache)
        kept, x = self._run(x, self.stages[self.outer_stages.count :], cache)
        return kept, self.conv_out(x, cache) + x.unflatten(1, (-1, self.average)).mean(2) + told

    @staticmethod
    def _run(x: Tensor, stages: nn.ModuleList, cache: FrameCache | None) -> tuple[list[Tensor], Tensor]:
        kept = []
        for stage in stages:
            feature, x = stage(x, cache)
            kept.append(feature)
        return kept, x


def _outer_stages(stack: StackConfig) -> OuterStages:
    """The residual stages that have a coarser one beside them, which a window of the frame is enough for."""
    count = min(stack.residual_stages, len(stack.widths) - 1)
    depths = stack.depths[:count]
    return OuterStages(
        widths=stack.widths[: count + 1],
        convolutions=tuple(2 * depth + 1 for depth in depths),
        compression=stack.compression,
        cell=stack.compression.cell(count),
        halo=_halo(depths),
        kept_frames=2,
    )


def _halo(depths: Sequence[int]) -> int:
    """Cells of the last stage's output beyond a place that lie under what the place is made of; 5 at depths 2, 2, 2."""
    reach = 0
    for depth in reversed(depths):
        # A strided convolution looks at 2j - 1, 2j, 2j + 1, and each block at two more on both sides.
        reach = 2 * reach + 1 + 2 * depth
    return -(-(reach + 1) // 2 ** len(depths))
