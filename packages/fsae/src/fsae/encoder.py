"""The encoder of FSAE (paper §2.2.1): stages, fine to coarse, each its blocks, then a downsample; 128 channels last.

Causal in time from end to end: a latent depends on its own four frames and those before. The features of frame 0 are
therefore the same whether the image or the whole clip is encoded, and the decoder may use them (paper §2.2.3).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fsae.layers.blocks import BlockStyle, EViTBlock, ResBlock
from fsae.layers.conv import VideoConv3d
from fsae.layers.resample import Downsample


class EncoderStage(nn.Module):
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
        self.down = None if next_channels is None else Downsample(channels, next_channels, halve_time=halve_time)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`B C T H W` -> (the stage's features `B C T H W`, what the next stage gets)."""
        for block in self.blocks:
            x = block(x)
        return x, x if self.down is None else self.down(x)


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
        return self.features(x)[1]

    def features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """`B 3 T H W` -> (the features of every stage, fine to coarse, and the latents)."""
        x = self.conv_in(x)
        kept = []
        for stage in self.stages:
            feature, x = stage(x)
            kept.append(feature)
        return kept, self.conv_out(x) + x.unflatten(1, (-1, self.average)).mean(2)
