"""What fits where: the size of the video, of the canvas it is made on, of its latents, and what is taken of the photo.
Pure arithmetic.

The autoencoder makes latents of `compression.space` pixels a side, and the base model works at half the resolution, so
a canvas has sides that are multiples of twice that: 128 at the paper's compression. A video of another size lies in the
middle of its canvas; the rest is filled by reflection and cropped away at the end: 1280x720 is made on 1280x768 with 24
rows above and below.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fsae.errors import UserError
from fsae.shapes import Compression

MIN_SIDE, MAX_SIDE = 16, 4096
MAX_ASPECT = 4.0
"""Of a video whose size follows the photo's: a canvas of one cell by many is nothing a model has seen."""


class Size(NamedTuple):
    """Pixels; as text, WIDTHxHEIGHT."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class VideoGeometry:
    """The sizes of one video: all that decoding needs to know of a plan.

    Attributes:
        frames: 1 + time k.
        size: of the video, even.
        canvas: that the video is made on, of whole latents at half its size too.
        latents: (t, h, w) of the canvas's latents.
    """

    frames: int
    size: Size
    canvas: Size
    latents: tuple[int, int, int]

    @classmethod
    def of(cls, frames: int, size: Size, compression: Compression) -> VideoGeometry:
        """The smallest canvas that holds the video, and its latents."""
        multiple = canvas_multiple(compression)
        canvas = Size(*(multiple * math.ceil(side / multiple) for side in size))
        return cls(frames, size, canvas, compression.latent_size(frames, canvas.height, canvas.width))

    @property
    def left(self) -> int:
        """Columns of the canvas on the left of the video."""
        return (self.canvas.width - self.size.width) // 2

    @property
    def top(self) -> int:
        """Rows of the canvas above the video."""
        return (self.canvas.height - self.size.height) // 2


@dataclass(frozen=True)
class PhotoFit:
    """How the photo becomes the first frame.

    Attributes:
        photo: its size.
        crop: left, top, right, bottom of the part that is kept, in the photo's pixels.
        scale: pixels of the video for one of the photo, across and down; above 1 it is enlarged.
    """

    photo: Size
    crop: tuple[float, float, float, float]
    scale: float

    @classmethod
    def cover(cls, photo: Size, size: Size) -> PhotoFit:
        """The largest box of `size`'s aspect ratio in the middle of the photo, scaled to `size`."""
        shrink = min(photo.width / size.width, photo.height / size.height)
        width, height = size.width * shrink, size.height * shrink
        left, top = (photo.width - width) / 2, (photo.height - height) / 2
        return cls(photo, (left, top, left + width, top + height), 1 / shrink)

    @property
    def kept(self) -> float:
        """The share of the photo's width or of its height that is kept, whichever is less."""
        left, top, right, bottom = self.crop
        return min((right - left) / self.photo.width, (bottom - top) / self.photo.height)


@dataclass(frozen=True)
class VideoPlan:
    """One video, planned: its sizes, what is taken of the photo, and sentences on all that differs from the request."""

    geometry: VideoGeometry
    fit: PhotoFit
    notes: tuple[str, ...] = ()


def parse_size(text: str) -> Size:
    """ "WxH" in pixels; UserError for any other form."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*[xX×]\s*(\d{1,9})\s*", text)
    if match is None:
        raise UserError(f"size {text!r} given; accepted is WIDTHxHEIGHT in pixels, such as 256x256")
    return Size(int(match[1]), int(match[2]))


def plan_video(photo: Size, area: int, frames: int, compression: Compression, size: Size | None = None) -> VideoPlan:
    """Plan a video of a photo.

    Args:
        photo: its size.
        area: pixels a frame should have about, where no size is asked for.
        frames: how many are asked for; the nearest 1 + time k is taken.
        compression: the autoencoder's.
        size: asked for; None follows the photo's aspect ratio, up to 4:1.

    Raises:
        UserError: a side or the number of frames is out of range.
    """
    made = default_size(photo, area, canvas_multiple(compression)) if size is None else _even_size(size)
    geometry = VideoGeometry.of(snap_frames(frames, compression.time), made, compression)
    fit = PhotoFit.cover(photo, made)
    return VideoPlan(geometry, fit, tuple(_notes(size, frames, geometry, fit, compression)))


def canvas_multiple(compression: Compression) -> int:
    """What a canvas's sides are multiples of: two latents, since the base model's canvas is half as wide and high."""
    return 2 * compression.space


def default_size(photo: Size, area: int, multiple: int) -> Size:
    """Even, with the photo's aspect ratio (at most 4:1) and about `area` pixels.

    Of all canvases the one is taken on which the whole picture wastes least: with r the video's share of its
    canvas and s its size relative to `area`, the smallest |log s| - log r. A photo of 4:3 thus becomes
    340x256 on 384x256.
    """
    aspect = min(max(photo.width / photo.height, 1 / MAX_ASPECT), MAX_ASPECT)
    longest = math.ceil(2 * math.sqrt(area * MAX_ASPECT) / multiple)

    def fit(canvas: tuple[int, int]) -> tuple[float, float]:
        return min(canvas[0], canvas[1] * aspect), min(canvas[1], canvas[0] / aspect)

    def waste(canvas: tuple[int, int]) -> tuple[float, int]:
        pixels = math.prod(fit(canvas))
        # Rounded, so that equal choices tie on every platform; the smaller canvas then wins.
        return round(abs(math.log(pixels / area)) - math.log(pixels / math.prod(canvas)), 9), math.prod(canvas)

    sides = range(multiple, longest * multiple + 1, multiple)
    width, height = fit(min(((w, h) for w in sides for h in sides), key=waste))
    return Size(2 * max(1, round(width / 2)), 2 * max(1, round(height / 2)))


def snap_frames(frames: int, group: int) -> int:
    """The nearest 1 + group·k, the lower of two equally near: with a group of 4, 18 and 19 become 17; UserError below
    1."""
    if frames < 1:
        raise UserError(
            f"{frames} frames given; accepted is a whole number of at least 1, best of the form 1 + {group}k"
        )
    below = frames - (frames - 1) % group
    return below if frames - below <= group / 2 else below + group


def _even_size(size: Size) -> Size:
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in size):
        raise UserError(f"size {size} given; accepted are sides from {MIN_SIDE} to {MAX_SIDE} pixels")
    return Size(*(side - side % 2 for side in size))


def _notes(
    size: Size | None, frames: int, geometry: VideoGeometry, fit: PhotoFit, compression: Compression
) -> Iterator[str]:
    """What differs from the size and frames asked for, and what the photo suffers, a sentence each."""
    if size is not None and geometry.size != size:
        yield f"size {size} asked for; a video has even sides, so it gets {geometry.size}"
    if fit.kept < 0.98:  # less is cut off by the rounding of a side
        why = f"to {MAX_ASPECT:.0f}:1, the longest shape" if size is None else "to the shape asked for"
        yield f"the photo of {fit.photo} pixels is cropped around its centre {why}: {fit.kept:.1%} stays"
    if fit.scale > 2:
        yield f"the photo has {fit.photo} pixels and is enlarged, so the video will look soft"
    if geometry.frames != frames:
        yield f"{frames} frames asked for; a video has 1 + {compression.time}k frames, so it gets {geometry.frames}"
    if size is not None and geometry.canvas != geometry.size:
        yield (
            f"{geometry.size} pixels are made on a canvas of {geometry.canvas}, with sides that are multiples of "
            f"{canvas_multiple(compression)}, and cropped out of it"
        )
