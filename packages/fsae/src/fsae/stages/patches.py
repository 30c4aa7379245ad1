"""Patches with exact borders, in space and in time (paper §2.2.1, stage 3, and its footnote on padding).

The decoder's outer stages see `halo` cells around each place, and `reach` latents before and behind. Run on a patch of
what `inner` gives, they are right up to so far from each side that is not the clip's own border; the loss is taken
there, and its gradient is that of the whole clip's loss in the same window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fsae.decoder import Decoder, FirstFrame
from fsae.planned import PlannedDecoder
from fsae.tiling import Window


class Span(NamedTuple):
    """Latents from `start` on, before `stop`."""

    start: int
    stop: int

    def frames(self, rate: int, begun_at: int = 0) -> slice:
        """Their frames where a latent has `rate`, in a clip, or in what is made of its latents from `begun_at` on.

        The latent that such a part starts with has its last frame alone, as a clip's first has.
        """
        first = max(rate * (self.start - 1) + 1, 0)
        return slice(first - rate * begun_at, rate * (self.stop - 1) + 1 - rate * begun_at)


@dataclass(frozen=True)
class Patch:
    """A part of a clip, in cells of `inner`'s output and latents: what is computed, and inside it what is right.

    Attributes:
        window, core: of the frame.
        span, core_span: of the clip; None is all of it.
    """

    window: Window
    core: Window
    span: Span | None = None
    core_span: Span | None = None

    def cut(self, x: Tensor) -> Tensor:
        """The window's part of `inner`'s output `B C t h w`."""
        x = self.window.crop(x)
        return x if self.span is None else x[:, :, slice(*self.span)]

    def right(self, made: Tensor, scale: int, rate: int) -> Tensor:
        """The core of what the outer stages made, with `scale` pixels a cell and `rate` frames a latent."""
        made = self.core.inside(self.window).scaled(scale).crop(made)
        if self.span is None or self.core_span is None:
            return made
        return made[:, :, self.core_span.frames(rate, self.span.start)]

    def target(self, clip: Tensor, scale: int, rate: int) -> Tensor:
        """The core's part of a whole clip `B C T H W` of that scale and rate."""
        clip = self.core.scaled(scale).crop(clip)
        return clip if self.core_span is None else clip[:, :, self.core_span.frames(rate)]


def draw_patch(height: int, width: int, side: int, halo: int, generator: torch.Generator) -> Patch | None:
    """A random patch of at most `side` x `side` cells of a frame of `height` x `width`; None where that is all of it.

    Starts are drawn from a range that reaches past the frame by half a core on both ends, and are then moved inside:
    a frame's border, which only patches at the border itself can train, is met about as often as its middle.
    """
    if side >= max(height, width):
        return None
    top, left = (_start(length, min(side, length), halo, generator) for length in (height, width))
    window = Window(top, left, min(side, height), min(side, width))
    return Patch(window, exact_core(window, halo, height, width))


def exact_core(window: Window, halo: int, height: int, width: int) -> Window:
    """What is left of a window when each side that is not the border of the `height` x `width` frame loses `halo`."""
    top = window.top + halo if window.top > 0 else 0
    left = window.left + halo if window.left > 0 else 0
    bottom = window.bottom - halo if window.bottom < height else height
    right = window.right - halo if window.right < width else width
    return Window(top, left, bottom - top, right - left)


def draw_span(
    latents: int, length: int, reach: tuple[int, int], generator: torch.Generator
) -> tuple[Span, Span] | None:
    """A random part of at most `length` of a clip's latents and its core; None where that is all of them.

    Parts that are too short for a core behind a start of their own stand at one of the clip's ends.
    """
    if length >= latents:
        return None
    before, behind = reach
    if length > before + behind:
        beyond = (length - before - behind) // 2
        drawn = int(torch.randint(-beyond, latents - length + beyond + 1, (), generator=generator))
        start = min(max(drawn, 0), latents - length)
    else:
        ends = [0] * (length > behind) + [latents - length] * (length > before)
        start = ends[int(torch.randint(len(ends), (), generator=generator))]
    stop = start + length
    return Span(start, stop), Span(start + before if start else 0, stop - behind if stop < latents else latents)


def _start(length: int, side: int, halo: int, generator: torch.Generator) -> int:
    last = length - side
    beyond = (side - 2 * halo) // 2 if last else 0
    start = int(torch.randint(-beyond, last + beyond + 1, (), generator=generator))
    return min(max(start, 0), last)


def decode(
    decoder: Decoder,
    latents: Tensor,
    first_frame: FirstFrame | None,
    noise: list[list[Tensor]],
    patch: Patch | None,
    memory: int | None = None,
    in_parts: bool = True,
) -> Tensor:
    """Latents `B c t h w`, not normalised -> the whole video `B 3 T H W`, or its core in the patch.

    Args:
        decoder: what decodes.
        latents: as `Decoder.inner` has them, like first_frame and noise.
        first_frame: the first frame's features or None.
        noise: of the whole frame.
        patch: what the outer stages run on; None is all of it.
        memory: bytes that they may take, in parts if need be (see `fsae.planned`).
        in_parts: whether they may run in parts at all: what looks into the stages wants them whole.
    """
    x = decoder.inner(latents, first_frame)
    place = None if patch is None else patch.window
    x = x if patch is None else patch.cut(x)
    if in_parts:
        planned = PlannedDecoder.of_training(decoder, x, memory)
        made = planned.outer(x, None if first_frame is None else decoder.contexts(first_frame), noise, place)
    else:
        made = decoder.outer(x, first_frame, noise, place)
    outer = decoder.outer_stages
    # A copy, so that the rest need not be kept.
    return made if patch is None else patch.right(made, outer.cell, outer.compression.time).clone()
