"""Patches with exact borders (paper §2.2.1, stage 3, and its footnote on padding).

The decoder's outer stages see `halo` cells around each place. Run on a patch of what `inner` gives, they are right up
to `halo` cells from each side that is not the frame's own border; the loss is taken there, and its gradient is that of
the whole frame's loss in the same window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fsae.decoder import Decoder, FirstFrame
from fsae.planned import PlannedDecoder
from fsae.tiling import Window


@dataclass(frozen=True)
class Patch:
    """A part of a frame, in cells of `inner`'s output: what is computed, and inside it what is right."""

    window: Window
    core: Window

    def video(self, decoded: Tensor, cell: int) -> Tensor:
        """The core of what `outer` made of the window, `B 3 T H W`: a copy, so that the rest need not be kept."""
        return self.core.inside(self.window).scaled(cell).crop(decoded).clone()


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
    x = x if place is None else place.crop(x)
    if in_parts:
        planned = PlannedDecoder.of_training(decoder, x, memory)
        made = planned.outer(x, None if first_frame is None else decoder.contexts(first_frame), noise, place)
    else:
        made = decoder.outer(x, first_frame, noise, place)
    return made if patch is None else patch.video(made, decoder.outer_stages.cell)
