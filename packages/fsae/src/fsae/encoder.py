"""The encoder of FSAE (paper §2.2.1): stages, fine to coarse, each its blocks, then a downsample; 128 channels last.

Causal in time from end to end: a latent depends on its own four frames and those before. The features of frame 0 are
therefore the same whether the image or the whole clip is encoded, and the decoder may use them (paper §2.2.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fsae.layers.blocks import BlockStyle, EViTBlock, ResBlock, Stage
from fsae.layers.conv import VideoConv3d
from fsae.layers.resample import Downsample
from fsae.streaming import FrameCache
from fsae.tiling import OuterStages, Plan, Window, tiled


class EncoderStage(Stage):
    """The blocks of one resolution, and the step down to the next where there is one."""

    def __init__(
        self,
        channels: int,
        depth: int,
        style: BlockStyle,
        *,
        residual: bool,
        next_channels: int | None,
        halve_time: bool,
    ) -> None:
        super().__init__()
        block = ResBlock if residual else EViTBlock
        self.blocks = nn.ModuleList(block(channels, style) for _ in range(depth))
        self.down = (
            None
            if next_channels is None
            else Downsample(channels, next_channels, halve_time=halve_time, shortcut=style.shortcut)
        )

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> tuple[Tensor, Tensor]:
        """`B C T H W` -> (the stage's features `B C T H W`, what the next stage gets)."""
        for block in self.blocks:
            x = self.run(block, x, cache=cache)
        return x, x if self.down is None else self.run(self.down, x, cache=cache)


class Encoder(nn.Module):
    """Video `B 3 T H W` in [-1, 1] -> latents `B c t h w`, not yet normalised.

    Args:
        widths: channels of each stage, fine to coarse.
        depths: blocks of each stage.
        latent_channels: c; the width of the last stage is a multiple of it, or the other way round.
        residual_stages: how many of the finest stages are of residual convolutions; the others are EfficientViT blocks.
        temporal_stages: how many of the finest stages halve time on their way down.
        style: what all blocks share.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        latent_channels: int,
        residual_stages: int,
        temporal_stages: int,
        style: BlockStyle,
    ) -> None:
        super().__init__()
        self.average = widths[-1] // latent_channels
        count = min(residual_stages, len(widths) - 1)
        self.outer_stages = OuterStages(
            widths=tuple(widths[: count + 1]),
            convolutions=tuple(2 * depth + 1 for depth in depths[:count]),
            temporal_stages=temporal_stages,
            cell=2**count,
            halo=_halo(depths[:count]),
            kept_frames=2,
        )
        self.conv_in = VideoConv3d(3, widths[0])
        self.stages = nn.ModuleList(
            EncoderStage(
                width,
                depths[s],
                style,
                residual=s < residual_stages,
                next_channels=widths[s + 1] if s + 1 < len(widths) else None,
                halve_time=s < temporal_stages,
            )
            for s, width in enumerate(widths)
        )
        self.conv_out = VideoConv3d(widths[-1], latent_channels)

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
        return self._run(self.conv_in(x, cache), self.stages[: self._count], cache)

    def inner(self, x: Tensor, cache: FrameCache | None = None) -> tuple[list[Tensor], Tensor]:
        """The whole-frame stages: `outer`'s output -> (the features of each of these stages, the latents)."""
        kept, x = self._run(x, self.stages[self._count :], cache)
        return kept, self.conv_out(x, cache) + x.unflatten(1, (-1, self.average)).mean(2)

    def whole(self, video: Tensor, plan: Plan) -> Tensor:
        """The clip's latents by plan: all frames of one window before the next, so that one window's stream is kept."""

        chunked = self.outer_stages.frames(0, plan.latents, begun=False) < video.shape[2]

        def compute(_: int, window: Window) -> list[Tensor]:
            cache = FrameCache() if chunked else None
            parts = self._cut(window.scaled(self.outer_stages.cell).crop(video), plan.latents, begun=False)
            return [torch.cat([self.outer(part, cache)[1] for part in parts], dim=2)]

        (x,) = self._tiled(video, plan, compute)
        kept = FrameCache() if chunked else None
        return torch.cat([self.inner(part, kept)[1] for part in x.split(plan.latents, dim=2)], dim=2)

    def stream(self, chunks: Iterable[Tensor], plan: Plan) -> Iterator[Tensor]:
        """Chunks of one video, 1 + 4n frames at first and 4n from then on -> the latents of each."""
        kept, tiles_kept = FrameCache(), [FrameCache() for _ in plan.windows]

        def outer(video: Tensor) -> Tensor:
            def compute(index: int, window: Window) -> list[Tensor]:
                return [self.outer(window.scaled(self.outer_stages.cell).crop(video), tiles_kept[index])[1]]

            return self._tiled(video, plan, compute)[0]

        begun = False
        for chunk in chunks:
            parts = self._cut(chunk, plan.latents, begun)
            yield torch.cat([self.inner(outer(part), kept)[1] for part in parts], dim=2)
            begun = True

    def image_features(self, image: Tensor, plan: Plan, first: int) -> list[Tensor]:
        """The features of an image `B 3 1 H W` at stage `first` and those coarser than it, fine to coarse."""

        def compute(_: int, window: Window) -> list[Tensor]:
            features, out = self.outer(window.scaled(self.outer_stages.cell).crop(image))
            return [*features[first:], out]

        *fine, x = self._tiled(image, plan, compute)
        return fine + self.inner(x)[0]

    def _tiled(self, video: Tensor, plan: Plan, compute: Callable[[int, Window], list[Tensor]]) -> list[Tensor]:
        height, width = (side // self.outer_stages.cell for side in video.shape[3:])
        return tiled(plan.windows, self.outer_stages.halo, height, width, compute)

    def _cut(self, chunk: Tensor, latents: int, begun: bool) -> Iterator[Tensor]:
        """A chunk of video into what stands for so many latents each."""
        start = 0
        while start < chunk.shape[2]:
            count = self.outer_stages.frames(0, latents, begun or start > 0)
            yield chunk[:, :, start : start + count]
            start += count

    @property
    def _count(self) -> int:
        return len(self.outer_stages.convolutions)

    @staticmethod
    def _run(x: Tensor, stages: nn.ModuleList, cache: FrameCache | None) -> tuple[list[Tensor], Tensor]:
        kept = []
        for stage in stages:
            feature, x = stage(x, cache)
            kept.append(feature)
        return kept, x


def _halo(depths: Sequence[int]) -> int:
    """Cells of the last stage's output beyond a place that lie under what the place is made of; 5 at depths 2, 2, 2."""
    reach = 0
    for depth in reversed(depths):
        # A strided convolution looks at 2j - 1, 2j, 2j + 1, and each block at two more on both sides.
        reach = 2 * reach + 1 + 2 * depth
    return -(-(reach + 1) // 2 ** len(depths))
