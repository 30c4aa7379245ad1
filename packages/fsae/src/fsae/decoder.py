"""The decoders of FSAE: latents back to video, stages from coarse to fine, each an upsample and then its blocks.

causal      the encoder's mirror, as it is first trained (paper §2.2.1)
standard    non-causal, with first-frame injection and noise (paper §2.2.3, FSAE-Standard)
lite        group-causal in groups of 1, 2 and 4 frames, narrower outer stages (paper §2.2.3, FSAE-Lite)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsae.layers.attention import FirstFrameAttention, FirstFrameContext
from fsae.layers.blocks import EViTBlock, ResBlock
from fsae.layers.config import Injection, StackConfig
from fsae.layers.conv import TimeKind, VideoConv3d
from fsae.layers.motion import FirstFrameSampling, MotionField, Values
from fsae.layers.norm import PixelNorm
from fsae.layers.recomputed import Recomputed
from fsae.layers.resample import Upsample
from fsae.streaming import FrameCache
from fsae.tiling import OuterStages, Window

DecoderKind = Literal["causal", "standard", "lite"]

TIME_OF_KIND: dict[DecoderKind, TimeKind] = {"causal": "causal", "standard": "standard", "lite": "group_causal"}

# The encoder's features of frame 0, fine to coarse, each `B C h w`, or what their injection makes of them; None where
# none is used.
FirstFrame = Sequence[Tensor | FirstFrameContext | Values | None]

# Frames that a convolution keeps between two chunks of a stream; none where there is no stream.
KEPT_FRAMES: dict[DecoderKind, int] = {"causal": 2, "standard": 0, "lite": 1}


class Sight(NamedTuple):
    """What a stage sees of the first frame.

    Attributes:
        first_frame: the encoder's features at this resolution, `B C H W`, whole, or what `context` made of them.
        window: the part of the frame that the stage's output is, in its own cells; None is all of it.
        displacements: where the injection samples, as `MotionField` gives them, of the window.
    """

    first_frame: Tensor | FirstFrameContext | Values
    window: Window | None = None
    displacements: Tensor | None = None


class DecoderStage(Recomputed):
    """The step up from the stage before, the look at the first frame, and the blocks of one resolution."""

    def __init__(
        self, stack: StackConfig, stage: int, injection: FirstFrameAttention | FirstFrameSampling | None
    ) -> None:
        super().__init__()
        style = stack.style_of(stage)
        residual = stage < stack.residual_stages
        channels, *coarser = stack.widths[stage:]
        double_time = stage < stack.temporal_stages
        self.up = Upsample(coarser[0], channels, style, double_time=double_time) if coarser else None
        self.injection = injection
        self.noisy = residual and style.noise > 0
        block = ResBlock if residual else EViTBlock
        self.blocks = nn.ModuleList(block(channels, style) for _ in range(stack.depths[stage]))

    def forward(
        self, x: Tensor, sight: Sight | None, noise: Sequence[Tensor] = (), cache: FrameCache | None = None
    ) -> Tensor:
        """The step up, the look at the first frame, the blocks.

        Args:
            x: `B C' t h w`, what the stage before gave.
            sight: what is seen of the first frame; None is nothing.
            noise: a map `1 1 1 H W` for each block, of x's window; none where there is no noise.
            cache: the state of a stream that x is the next chunk of.

        Returns:
            `B C T H W`.
        """
        if self.up is not None:
            x = self.run(self.up, x, cache=cache)
        if self.injection is not None and sight is not None:
            displacements = () if sight.displacements is None else (sight.displacements,)
            x = self.run(self.injection, x, sight.first_frame, *displacements, sight.window)
        for b, block in enumerate(self.blocks):
            x = self.run(block, x, *(noise_map.to(x.device, x.dtype) for noise_map in noise[b : b + 1]), cache=cache)
        return x


class Decoder(Recomputed):
    """Latents `B c t h w`, not normalised -> video `B 3 1+4(t-1) 64h 64w`.

    Args:
        stack: the stages; the time of their style is the kind's.
        kind: how time is seen, see the top of this file.
        injection: how the encoder's features of frame 0 enter, if they do: the attention at every stage that runs at
            the latents' frame rate, where one frame of the decoder stands for one latent.

    Attributes:
        outer_stages: the residual stages, which see a part of the frame; the others see all of it.
    """

    def __init__(self, stack: StackConfig, kind: DecoderKind, injection: Injection | None = None) -> None:
        super().__init__()
        style = replace(stack.style, time=TIME_OF_KIND[kind])
        stack = replace(stack, style=style)
        self.copies = stack.widths[-1] // stack.latent_channels
        self.outer_stages = _outer_stages(stack, KEPT_FRAMES[kind])
        self.conv_in = VideoConv3d(stack.latent_channels, stack.widths[-1], time=style.time)
        self.stages = nn.ModuleList(
            DecoderStage(stack, s, None if injection is None else self._injection(stack, s, injection))
            for s in range(len(stack.widths))
        )
        self.motion: MotionField | None = None
        if injection is not None and injection.sampling:
            width = stack.widths[min(self.outer_stages.count, len(stack.widths) - 1)]
            time, cell = stack.compression.time, self.outer_stages.cell
            self.motion = MotionField(width, stack.latent_channels, frames=time, cell=cell, style=style)
        self.norm_out = PixelNorm(stack.widths[0], style.eps, style.norm_affine)
        self.conv_out = VideoConv3d(stack.widths[0], 3, time=style.time, group=stack.compression.time)

    def _injection(
        self, stack: StackConfig, stage: int, injection: Injection
    ) -> FirstFrameAttention | FirstFrameSampling | None:
        width, rate = stack.widths[stage], stack.compression.rate(stage)
        if injection.sampling and stage < self.outer_stages.count:
            return FirstFrameSampling(width, injection.widths[stage], size=stack.compression.cell(stage), rate=rate)
        if rate > 1:
            return None
        return FirstFrameAttention(width, stage, injection, stack.style)

    @property
    def halo(self) -> int:
        """Cells of `inner`'s output around a place that `outer` looks at: 7 at the paper's depths."""
        return self.outer_stages.halo

    @property
    def reach(self) -> tuple[int, int]:
        """Latents before and behind one that `outer` looks at: causal 25 and 0, Lite 13 and 0, Standard 13 and 13."""
        # A group-causal convolution looks ahead inside a latent's own frames alone.
        before, behind = {"causal": (2, 0), "group_causal": (1, 0), "standard": (1, 1)}[self.conv_out.time]
        depths = [len(cast(DecoderStage, stage).blocks) for stage in self.stages[: self.outer_stages.count]]
        doubled = len(self.stages) - 1, self.outer_stages.compression.time
        return _reach(depths, before, *doubled), _reach(depths, behind, *doubled)

    def draw_noise(self, height: int, width: int, generator: torch.Generator) -> list[list[Tensor]]:
        """The noise of a video of `height` x `width` pixels: by outer stage, fine to coarse, a map `1 1 1 H W` a block.

        They are drawn for the whole frame, coarse stages first, block by block; `outer` cuts its window out of them.
        Without noise the lists are empty.
        """
        maps: list[list[Tensor]] = [[] for _ in range(self.outer_stages.count)]
        for s in reversed(range(self.outer_stages.count)):
            stage = cast(DecoderStage, self.stages[s])
            if stage.noisy:
                shape = (1, 1, 1, height >> s, width >> s)
                maps[s] = [torch.randn(shape, generator=generator) for _ in stage.blocks]
        return maps

    def contexts(self, first_frame: FirstFrame) -> FirstFrame:
        """Features of frame 0 -> what is looked at where a stage looks at them, once for all tiles and chunks."""
        return [
            stage.injection.context(feature) if stage.injection is not None and isinstance(feature, Tensor) else None
            for stage, feature in zip(cast(Iterable[DecoderStage], self.stages), first_frame, strict=True)
        ]

    def inner(self, latents: Tensor, first_frame: FirstFrame | None, cache: FrameCache | None = None) -> Tensor:
        """The whole-frame stages, up to the last EfficientViT stage's output, which the outer stages start from.

        Args:
            latents: `B c t h w`, not normalised.
            first_frame: the encoder's features of frame 0 at every stage, fine to coarse, each `B C H W`, or `contexts`
                of them; None leaves the injection out.
            cache: the state of a stream that the latents are the next chunk of; not for the Standard decoder.

        Returns:
            `B C t h' w'`, in cells of `outer_stages.cell` pixels; where the outer stages sample, the displacements are
            its last channels, so that they are cut as it is cut.
        """
        x = self.conv_in(latents, cache) + latents.repeat_interleave(self.copies, dim=1)
        for s in reversed(range(self.outer_stages.count, len(self.stages))):
            x = self.stages[s](x, _sight(first_frame, s), cache=cache)
        return x if self.motion is None else torch.cat([x, self.run(self.motion, x, latents, cache=cache)], dim=1)

    def outer(
        self,
        x: Tensor,
        first_frame: FirstFrame | None,
        noise: Sequence[Sequence[Tensor]],
        window: Window | None = None,
        cache: FrameCache | None = None,
    ) -> Tensor:
        """The convolutional stages and the last convolution, of a whole frame or of a part of it.

        All that is farther than `halo` cells from an edge of the window (edges of the frame do not count) is what the
        whole frame's video is there.

        Args:
            x: `inner`'s output, cropped to the window.
            first_frame: as `inner` has it, whole.
            noise: `draw_noise` of the whole frame.
            window: the part of the frame that x is, in cells of `inner`'s output; None is all of it.
            cache: the state of the window's stream that x is the next chunk of; not `inner`'s.

        Returns:
            `B 3 1+4(t-1) H W` (`4t` where the stream has begun), H and W `outer_stages.cell` times x's.
        """
        displacements = None
        if self.motion is not None:
            x, displacements = x.split([x.shape[1] - 2 * self.motion.frames, 2 * self.motion.frames], dim=1)
            x = x.to(self.conv_out.weight.dtype)  # displacements made all of it fp32
        for s in reversed(range(self.outer_stages.count)):
            part = None if window is None else window.scaled(self.outer_stages.cell >> s)
            maps = noise[s] if part is None else [part.crop(noise_map) for noise_map in noise[s]]
            x = self.stages[s](x, _sight(first_frame, s, part, displacements), maps, cache)
        return cast(Tensor, self.run(self.conv_out, x, cache=cache, call=self._pixels))

    def _pixels(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        return cast(Tensor, self.conv_out(F.relu(self.norm_out(x), inplace=not torch.is_grad_enabled()), cache))

    def forward(self, latents: Tensor, first_frame: FirstFrame | None, generator: torch.Generator) -> Tensor:
        """first_frame: the encoder's features of frame 0 at every stage, fine to coarse, each `B C H W`, or None."""
        height, width = (side << (len(self.stages) - 1) for side in latents.shape[3:])
        noise = self.draw_noise(height, width, generator)
        return self.outer(self.inner(latents, first_frame), first_frame, noise)


def _sight(
    first_frame: FirstFrame | None, stage: int, window: Window | None = None, displacements: Tensor | None = None
) -> Sight | None:
    """What one stage sees, of the features of all."""
    feature = None if first_frame is None else first_frame[stage]
    return None if feature is None else Sight(feature, window, displacements)


def _outer_stages(stack: StackConfig, kept_frames: int) -> OuterStages:
    """The residual stages, which a window of the frame is enough for."""
    depths = stack.depths[: stack.residual_stages]
    return OuterStages(
        widths=(*stack.widths, stack.widths[-1])[: stack.residual_stages + 1],
        convolutions=tuple(2 * depth + (1 if s else 2) for s, depth in enumerate(depths)),
        compression=stack.compression,
        cell=stack.compression.cell(stack.residual_stages),
        halo=_halo(depths, len(stack.widths)),
        kept_frames=kept_frames,
        upward=True,
    )


def _halo(depths: Sequence[int], stages: int) -> int:
    """Cells beyond a place that are looked at: 1 for the last convolution, 2 a block, 1 and then half each step up."""
    reach = 1
    for s, depth in enumerate(depths):
        reach += 2 * depth
        if s + 1 < stages:
            reach = -(-(reach + 1) // 2)
    return reach


def _reach(depths: Sequence[int], frames: int, steps: int, rate: int) -> int:
    """Latents on one side that are looked at by convolutions of so many frames there; see `_halo`.

    steps: between all stages; rate: frames that the finest stage has for a latent.
    """
    reach = frames
    for s, depth in enumerate(depths):
        reach += frames * (2 * depth + (s < steps))
        if rate >> s > 1:
            reach = -(-reach // 2)
    return reach
