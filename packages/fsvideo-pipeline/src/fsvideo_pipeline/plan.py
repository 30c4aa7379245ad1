"""What fits where: the size of the video, of the canvas it is made on, and the number of frames. Pure
arithmetic.

The transformer sees latents of 64 pixels a side and its first stage works at half the resolution, so a canvas
has sides that are multiples of 128. A video of another size lies in the middle of its canvas; the rest is
filled by reflection and cropped away at the end: 1280x720 is made on 1280x768 with 24 rows above and below.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fsae.errors import UserError

SIDE_MULTIPLE = 128
"""Of a canvas: 64 pixels a latent, halved once for the base model."""

FRAME_GROUP = 4
"""Frames a latent stands for, after the first."""

MIN_SIDE, MAX_SIDE = 16, 4096
MAX_ASPECT = 4.0
"""Of a video whose size follows the photo's: a canvas of one cell by many is nothing a model has seen."""


@dataclass(frozen=True)
class VideoPlan:
    """One video, planned.

    Attributes:
        width: Of the video, in pixels, even.
        height: Likewise.
        canvas_width: Of the canvas, a multiple of 128.
        canvas_height: Likewise.
        frames: 1 + 4k.
        crop: Left, top, right, bottom of the part of the photo that becomes the first frame, in the photo's
            pixels.
        notes: Sentences on everything that differs from the request.
    """

    width: int
    height: int
    canvas_width: int
    canvas_height: int
    frames: int
    crop: tuple[float, float, float, float]
    notes: tuple[str, ...] = ()

    @property
    def left(self) -> int:
        """Columns of the canvas on the left of the video."""
        return (self.canvas_width - self.width) // 2

    @property
    def top(self) -> int:
        """Rows of the canvas above the video."""
        return (self.canvas_height - self.height) // 2


def parse_size(text: str) -> tuple[int, int]:
    """ "WxH" -> (width, height) in pixels.

    Raises:
        UserError: the text has another form.
    """
    match = re.fullmatch(r"\s*(\d{1,9})\s*[xX×]\s*(\d{1,9})\s*", text)
    if match is None:
        raise UserError(f"size {text!r} given; accepted is WIDTHxHEIGHT in pixels, such as 256x256")
    return int(match[1]), int(match[2])


def plan_video(
    photo: tuple[int, int],
    area: int,
    frames: int,
    size: tuple[int, int] | None = None,
    multiple: int = SIDE_MULTIPLE,
    group: int = FRAME_GROUP,
) -> VideoPlan:
    """Plan a video of a photo.

    Args:
        photo: (width, height) of the photo.
        area: pixels a frame should have about, where no size is asked for.
        frames: how many are asked for; the nearest 1 + group·k is taken.
        size: (width, height) asked for; None follows the photo's aspect ratio, up to 4:1.
        multiple: of the canvas's sides.
        group: frames a latent stands for.

    Raises:
        UserError: a side or the number of frames is out of range.
    """
    notes: list[str] = []
    if size is None:
        width, height = default_size(photo, area, multiple)
    else:
        width, height = _even_size(size, notes)
    crop = cover(photo, (width, height))
    _note_crop(photo, crop, asked=size is not None, notes=notes)
    if max(width / (crop[2] - crop[0]), height / (crop[3] - crop[1])) > 2:
        notes.append(f"the photo has {photo[0]}x{photo[1]} pixels and is enlarged, so the video will look soft")
    snapped = snap_frames(frames, group)
    if snapped != frames:
        notes.append(f"{frames} frames asked for; a video has 1 + {group}k frames, so it gets {snapped}")
    canvas = (_round_up(width, multiple), _round_up(height, multiple))
    if size is not None and canvas != (width, height):
        notes.append(
            f"{width}x{height} pixels are made on a canvas of {canvas[0]}x{canvas[1]}, with sides that are "
            f"multiples of {multiple}, and cropped out of it"
        )
    return VideoPlan(width, height, *canvas, snapped, crop, tuple(notes))


def default_size(photo: tuple[int, int], area: int, multiple: int = SIDE_MULTIPLE) -> tuple[int, int]:
    """(width, height), even, with the photo's aspect ratio (at most 4:1) and about `area` pixels.

    Of all canvases the one is taken on which the whole picture wastes least: with r the video's share of its
    canvas and s its size relative to `area`, the smallest |log s| - log r. A photo of 4:3 thus becomes
    340x256 on 384x256.
    """
    aspect = min(max(photo[0] / photo[1], 1 / MAX_ASPECT), MAX_ASPECT)
    longest = math.ceil(2 * math.sqrt(area * MAX_ASPECT) / multiple)

    def fit(canvas: tuple[int, int]) -> tuple[float, float]:
        return min(canvas[0], canvas[1] * aspect), min(canvas[1], canvas[0] / aspect)

    def waste(canvas: tuple[int, int]) -> tuple[float, int]:
        pixels = math.prod(fit(canvas))
        # Rounded, so that equal choices tie on every platform; the smaller canvas then wins.
        return round(abs(math.log(pixels / area)) - math.log(pixels / math.prod(canvas)), 9), math.prod(canvas)

    sides = range(multiple, longest * multiple + 1, multiple)
    width, height = fit(min(((w, h) for w in sides for h in sides), key=waste))
    return 2 * max(1, round(width / 2)), 2 * max(1, round(height / 2))


def cover(photo: tuple[int, int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest box of `size`'s aspect ratio in the middle of the photo: left, top, right, bottom."""
    scale = min(photo[0] / size[0], photo[1] / size[1])
    width, height = size[0] * scale, size[1] * scale
    left, top = (photo[0] - width) / 2, (photo[1] - height) / 2
    return left, top, left + width, top + height


def snap_frames(frames: int, group: int = FRAME_GROUP) -> int:
    """The nearest 1 + group·k, the lower one of two equally near: 18 and 19 become 17.

    Raises:
        UserError: fewer than one frame.
    """
    if frames < 1:
        raise UserError(
            f"{frames} frames given; accepted is a whole number of at least 1, best of the form 1 + {group}k"
        )
    below = frames - (frames - 1) % group
    return below if frames - below <= group / 2 else below + group


def _round_up(side: int, multiple: int) -> int:
    return multiple * math.ceil(side / multiple)


def _even_size(size: tuple[int, int], notes: list[str]) -> tuple[int, int]:
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in size):
        raise UserError(f"size {size[0]}x{size[1]} given; accepted are sides from {MIN_SIDE} to {MAX_SIDE} pixels")
    width, height = (side - side % 2 for side in size)
    if (width, height) != size:
        notes.append(f"size {size[0]}x{size[1]} asked for; a video has even sides, so it gets {width}x{height}")
    return width, height


def _note_crop(photo: tuple[int, int], crop: tuple[float, float, float, float], asked: bool, notes: list[str]) -> None:
    """Say what is cut off the photo, unless it is no more than the rounding of a side."""
    kept = min((crop[2] - crop[0]) / photo[0], (crop[3] - crop[1]) / photo[1])
    if kept < 0.98:
        why = "to the shape asked for" if asked else f"to {MAX_ASPECT:.0f}:1, the longest shape"
        notes.append(f"the photo of {photo[0]}x{photo[1]} pixels is cropped around its centre {why}: {kept:.1%} stays")
