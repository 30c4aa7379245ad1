"""The photo on its canvas, and the video cut out of it again. Arrays are uint8 `... H W 3`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fsvideo_pipeline.plan import VideoGeometry, VideoPlan

Pixels = NDArray[np.uint8]


def make_canvas(photo: Pixels, plan: VideoPlan) -> Pixels:
    """Photo `H W 3` -> canvas `H W 3`.

    The part that the plan keeps is scaled to the video's size (bicubic, averaging where it shrinks) and continued by
    reflection to the canvas.
    """
    geometry = plan.geometry
    scaled = Image.fromarray(photo).resize(geometry.size, Image.Resampling.BICUBIC, box=plan.fit.crop)
    rows = reflected(geometry.size.height, geometry.top, geometry.canvas.height)
    columns = reflected(geometry.size.width, geometry.left, geometry.canvas.width)
    return np.asarray(scaled)[rows][:, columns]


def reflected(length: int, before: int, total: int) -> NDArray[np.int64]:
    """Indices into `length` samples that continue them to `total`, the first of them `before` places in.

    Samples are mirrored about the outermost ones, which are not repeated, as often as it takes: 4 samples, 5
    before, 12 in all are 1 2 3 2 1 0 1 2 3 2 1 0. A single sample is copied.
    """
    period = max(2 * (length - 1), 1)
    position = np.abs(np.arange(total) - before) % period
    return np.minimum(position, period - position) if length > 1 else np.zeros(total, dtype=np.int64)


def crop_video(frames: Pixels, geometry: VideoGeometry) -> Pixels:
    """Frames of the canvas `T H W 3` -> of the video `T H W 3`."""
    left, top, (width, height) = geometry.left, geometry.top, geometry.size
    return frames[:, top : top + height, left : left + width]
