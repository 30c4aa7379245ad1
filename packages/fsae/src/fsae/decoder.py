"""The decoders of FSAE: latents back to video, stages from coarse to fine, each an upsample and then its blocks.

causal      the encoder's mirror, as it is first trained (paper §2.2.1)
standard    non-causal, with first-frame injection and noise (paper §2.2.3, FSAE-Standard)
lite        group-causal in groups of 1, 2 and 4 frames, narrower outer stages (paper §2.2.3, FSAE-Lite)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsae.layers.attention import Context, FirstFrameAttention
from fsae.layers.blocks import BlockStyle, EViTBlock, ResBlock, Stage
from fsae.layers.conv import TimeKind, VideoConv3d
from fsae.layers.motion import FirstFrameSampling, MotionField, Values
from fsae.layers.norm import PixelNorm
from fsae.layers.resample import Upsample
from fsae.streaming import FrameCache, joined
from fsae.tiling import OuterStages, Plan, Window, tiled

DecoderKind = Literal["causal", "standard", "lite"]

TIME_OF_KIND: dict[DecoderKind, TimeKind] = {"causal": "causal", "standard": "standard", "lite": "group_causal"}

# The encoder's features of frame 0, fine to coarse, each `B C h w`, or what their injection makes of them; None where
# none is used.
FirstFrame = Sequence[Tensor | Context | Values | None]

# Frames that a convolution keeps between two chunks of a stream; none where there is no stream.
KEPT_FRAMES: dict[DecoderKind, int] = {"causal": 2, "standard": 0, "lite": 1}


class DecoderStage(Stage):
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
        injection: FirstFrameAttention | FirstFrameSampling | None,
    ) -> None:
        super().__init__()
        self.up = (
            None
            if previous_channels is None
            else Upsample(
                previous_channels,
                channels,
                double_time=double_time,
                time=style.time,
                group=style.group,
                shortcut=style.shortcut,
            )
        )
        self.injection = injection
        self.noisy = residual and style.noise > 0
        block = ResBlock if residual else EViTBlock
        self.blocks = nn.ModuleList(block(channels, style) for _ in range(depth))

    def forward(
        self,
        x: Tensor,
        first_frame: Tensor | Context | Values | None,
        noise: Sequence[Tensor] = (),
        window: Window | None = None,
        cache: FrameCache | None = None,
        displacements: Tensor | None = None,
    ) -> Tensor:
        """The step up, the look at the first frame, the blocks.

        Args:
            x: `B C' t h w`, what the stage before gave.
            first_frame: the encoder's features of frame 0 at this resolution, whole, or what `context` made of them.
            noise: a map `1 1 1 H W` for each block, whole frames; none where there is no noise.
            window: the part of the frame that this stage's output is, in its own cells; None is all of it.
            cache: the state of a stream that x is the next chunk of.
            displacements: where the injection samples, as `MotionField` gives them, of the window.

        Returns:
            `B C T H W`.
        """
        if self.up is not None:
            x = self.run(self.up, x, cache=cache)
        if self.injection is not None and first_frame is not None:
            where = (window,) if displacements is None else (displacements, window)
            x = self.run(self.injection, x, first_frame, *where)
        maps = [noise_map if window is None else window.crop(noise_map) for noise_map in noise]
        for b, block in enumerate(self.blocks):
            x = self.run(block, x, *(noise_map.to(x.device, x.dtype) for noise_map in maps[b : b + 1]), cache=cache)
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
        injection_sampling: the outer stages sample the first frame's features along the motion (`fsae.layers.motion`)
            instead of attending to them, those at higher frame rates too.
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
        injection_sampling: bool = False,
    ) -> None:
        super().__init__()
        self.copies = widths[-1] // latent_channels
        self.outer_stages = OuterStages(
            widths=tuple((*widths, widths[-1])[: residual_stages + 1]),
            convolutions=tuple(2 * depth + (1 if s else 2) for s, depth in enumerate(depths[:residual_stages])),
            temporal_stages=temporal_stages,
            cell=2 ** min(residual_stages, len(widths) - 1),
            halo=_halo(depths[:residual_stages], len(widths)),
            kept_frames=KEPT_FRAMES[kind],
        )
        style = replace(style, time=TIME_OF_KIND[kind])
        self.conv_in = VideoConv3d(latent_channels, widths[-1], time=style.time)
        stages = []
        for s, width in enumerate(widths):
            injection: FirstFrameAttention | FirstFrameSampling | None = None
            rate = 2 ** max(temporal_stages - s, 0)
            if context_widths is not None and injection_sampling and s < self._count:
                injection = FirstFrameSampling(width, context_widths[s], size=2**s, rate=rate)
            elif context_widths is not None and s >= temporal_stages:
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
                    replace(style, group=rate),
                    residual=s < residual_stages,
                    previous_channels=widths[s + 1] if s + 1 < len(widths) else None,
                    double_time=s < temporal_stages,
                    injection=injection,
                )
            )
        self.stages = nn.ModuleList(stages)
        self.motion: MotionField | None = None
        if context_widths is not None and injection_sampling:
            met = min(self._count, len(widths) - 1)
            self.motion = MotionField(widths[met], 2**temporal_stages, 2**met, style.eps, style.norm_affine)
        self.norm_out = PixelNorm(widths[0], style.eps, style.norm_affine)
        self.conv_out = VideoConv3d(widths[0], 3, time=style.time, group=2**temporal_stages)

    @property
    def halo(self) -> int:
        """Cells of `inner`'s output around a place that `outer` looks at: 7 at the paper's depths."""
        return self.outer_stages.halo

    @property
    def _count(self) -> int:
        return len(self.outer_stages.convolutions)

    def draw_noise(self, height: int, width: int, generator: torch.Generator) -> list[list[Tensor]]:
        """The noise of a video of `height` x `width` pixels: by outer stage, fine to coarse, a map `1 1 1 H W` a block.

        They are drawn for the whole frame, coarse stages first, block by block; `outer` cuts its window out of them.
        Without noise the lists are empty.
        """
        maps: list[list[Tensor]] = [[] for _ in range(self._count)]
        for s in reversed(range(self._count)):
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
        for s in reversed(range(self._count, len(self.stages))):
            x = self.stages[s](x, None if first_frame is None else first_frame[s], cache=cache)
        return x if self.motion is None else torch.cat([x, self.motion(x, cache)], dim=1)

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
        for s in reversed(range(self._count)):
            part = None if window is None else window.scaled(self.outer_stages.cell >> s)
            here = None if first_frame is None else first_frame[s]
            x = self.stages[s](x, here, noise[s], part, cache, displacements)
        return self.conv_out(F.relu(self.norm_out(x), inplace=not torch.is_grad_enabled()), cache)

    def whole(
        self, latents: Tensor, first_frame: FirstFrame | None, noise: Sequence[Sequence[Tensor]], plan: Plan
    ) -> Tensor:
        """The clip's video by plan: all frames of one window before the next, so that one window's stream is kept.

        first_frame and noise: as `outer` has them.
        """
        count = latents.shape[2]
        chunked = plan.latents < count
        kept = FrameCache() if chunked else None
        parts = [self.inner(part, first_frame, kept) for part in latents.split(plan.latents, dim=2)]
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        del parts, kept

        def compute(_: int, window: Window) -> list[Tensor]:
            cache = FrameCache() if chunked else None
            chunks = window.crop(x).split(plan.latents, dim=2)
            pieces = (self.outer(chunk, first_frame, noise, window, cache) for chunk in chunks)
            return [joined(pieces, self.outer_stages.frames(0, count, begun=False))]

        (video,) = tiled(plan.windows, self.outer_stages.halo, x.shape[3], x.shape[4], compute)
        return video

    def stream(
        self, chunks: Iterable[Tensor], first_frame: FirstFrame | None, noise: Sequence[Sequence[Tensor]], plan: Plan
    ) -> Iterator[Tensor]:
        """Latents, not normalised, chunk by chunk -> their frames, `plan.latents` latents' worth at a time.

        Not for the Standard decoder, which looks ahead. The others keep no frames but those that their convolutions
        look back at. first_frame and noise: as `outer` has them.
        """
        kept, tiles_kept = FrameCache(), [FrameCache() for _ in plan.windows]

        def outer(x: Tensor) -> Tensor:
            def compute(index: int, window: Window) -> list[Tensor]:
                return [self.outer(window.crop(x), first_frame, noise, window, tiles_kept[index])]

            return tiled(plan.windows, self.outer_stages.halo, x.shape[3], x.shape[4], compute)[0]

        for chunk in chunks:
            for part in chunk.split(plan.latents, dim=2):
                # Nothing made here has a name: while the caller has the frames, only they are alive.
                yield outer(self.inner(part, first_frame, kept))

    def forward(self, latents: Tensor, first_frame: FirstFrame | None, generator: torch.Generator) -> Tensor:
        """first_frame: the encoder's features of frame 0 at every stage, fine to coarse, each `B C H W`, or None."""
        scale = 2 ** (len(self.stages) - 1)
        noise = self.draw_noise(latents.shape[3] * scale, latents.shape[4] * scale, generator)
        return self.outer(self.inner(latents, first_frame), first_frame, noise)


def _halo(depths: Sequence[int], stages: int) -> int:
    """Cells beyond a place that are looked at: 1 for the last convolution, 2 a block, 1 and then half each step up."""
    reach = 1
    for s, depth in enumerate(depths):
        reach += 2 * depth
        if s + 1 < stages:
            reach = -(-(reach + 1) // 2)
    return reach
