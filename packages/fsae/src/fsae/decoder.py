"""The decoders of FSAE: latents back to video, stages from coarse to fine, each an upsample and then its blocks.

causal      the encoder's mirror, as it is first trained (paper §2.2.1)
standard    non-causal, with first-frame injection and noise (paper §2.2.3, FSAE-Standard)
lite        group-causal in groups of 1, 2 and 4 frames, narrower outer stages (paper §2.2.3, FSAE-Lite)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsae.layers.attention import FirstFrameAttention
from fsae.layers.blocks import BlockStyle, EViTBlock, ResBlock
from fsae.layers.conv import TimeKind, VideoConv3d
from fsae.layers.norm import PixelNorm
from fsae.layers.resample import Upsample

DecoderKind = Literal["causal", "standard", "lite"]

TIME_OF_KIND: dict[DecoderKind, TimeKind] = {"causal": "causal", "standard": "standard", "lite": "group_causal"}


class DecoderStage(nn.Module):
    """The step up from the stage before, the look at the first frame, and the blocks of one resolution."""

    def __init__(
        self,
        channels: int,
        depth: int,
        style: BlockStyle,
        *,
        residual: bool,
        previous_channels: int | None,
        double_time: bool,
        injection: FirstFrameAttention | None,
    ) -> None:
        super().__init__()
        self.up = (
            None
            if previous_channels is None
            else Upsample(previous_channels, channels, double_time=double_time, time=style.time, group=style.group)
        )
        self.injection = injection
        self.noisy = residual and style.noise > 0
        block = ResBlock if residual else EViTBlock
        self.blocks = nn.ModuleList(block(channels, style) for _ in range(depth))

    def forward(self, x: Tensor, first_frame: Tensor | None, generator: torch.Generator) -> Tensor:
        """x `B C' t h w`, first_frame `B C H W` at this stage's resolution -> `B C T H W`."""
        if self.up is not None:
            x = self.up(x)
        if self.injection is not None and first_frame is not None:
            x = self.injection(x, first_frame)
        for block in self.blocks:
            if self.noisy:
                noise = torch.randn((1, 1, 1, *x.shape[3:]), generator=generator)
                x = block(x, noise.to(x.device, x.dtype))
            else:
                x = block(x)
        return x


class Decoder(nn.Module):
    """Latents `B c t h w`, not normalised -> video `B 3 1+4(t-1) 64h 64w`.

    Args:
        widths: channels of each stage, fine to coarse.
        depths: blocks of each stage.
        latent_channels: c.
        residual_stages, temporal_stages: as in the encoder.
        kind: how time is seen, see the top of this file.
        context_widths: the encoder's widths where its first-frame features are injected, else None. They enter
            every stage that runs at the latents' frame rate, where one frame of the decoder stands for one latent.
        injection_head_dim: channels a head of the injection.
        injection_window: side of its windows.
        injection_reach: pixels that its offsets are counted in; 0 for none.
        style: what all blocks share.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        latent_channels: int,
        residual_stages: int,
        temporal_stages: int,
        kind: DecoderKind,
        style: BlockStyle,
        context_widths: Sequence[int] | None = None,
        injection_head_dim: int = 64,
        injection_window: int = 128,
        injection_reach: float = 0.0,
    ) -> None:
        super().__init__()
        self.copies = widths[-1] // latent_channels
        style = replace(style, time=TIME_OF_KIND[kind])
        self.conv_in = VideoConv3d(latent_channels, widths[-1], time=style.time)
        stages = []
        for s, width in enumerate(widths):
            injection = None
            if context_widths is not None and s >= temporal_stages:
                injection = FirstFrameAttention(
                    width,
                    context_widths[s],
                    head_dim=injection_head_dim,
                    window=injection_window,
                    reach=injection_reach / 2**s,
                    eps=style.eps,
                    norm_affine=style.norm_affine,
                )
            stages.append(
                DecoderStage(
                    width,
                    depths[s],
                    # A latent's worth of frames at this rate: 4, 2, 1, 1, ... from fine to coarse.
                    replace(style, group=2 ** max(temporal_stages - s, 0)),
                    residual=s < residual_stages,
                    previous_channels=widths[s + 1] if s + 1 < len(widths) else None,
                    double_time=s < temporal_stages,
                    injection=injection,
                )
            )
        self.stages = nn.ModuleList(stages)
        self.norm_out = PixelNorm(widths[0], style.eps, style.norm_affine)
        self.conv_out = VideoConv3d(widths[0], 3, time=style.time, group=2**temporal_stages)

    def forward(self, latents: Tensor, first_frame: Sequence[Tensor] | None, generator: torch.Generator) -> Tensor:
        """first_frame: the encoder's features of frame 0 at every stage, fine to coarse, each `B C H W`, or None."""
        x = self.conv_in(latents) + latents.repeat_interleave(self.copies, dim=1)
        for s in reversed(range(len(self.stages))):
            x = self.stages[s](x, None if first_frame is None else first_frame[s], generator)
        return self.conv_out(F.relu(self.norm_out(x)))
