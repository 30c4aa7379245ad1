"""Pictures for a report, drawn with Pillow alone: a grid of labelled frames, and a small line chart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_LABEL = 14  # pixels that a line of Pillow's own font takes
_GAP = 2
_SIZE = (480, 220)
_MARGIN = (52, 24, 12, 22)  # left, top, right, bottom
_INK, _LINE, _RULE = (40, 40, 40), (31, 96, 180), (220, 220, 220)


def frame_grid(rows: Sequence[tuple[str, NDArray[np.uint8]]]) -> Image.Image:
    """Rows of frames, each (label, uint8 ``N H W 3``), one under the other, the label above its row."""
    widths = [frames.shape[0] * (frames.shape[2] + _GAP) - _GAP for _, frames in rows]
    heights = [frames.shape[1] + _LABEL + _GAP for _, frames in rows]
    sheet = Image.new("RGB", (max(widths), sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for (label, frames), height in zip(rows, heights, strict=True):
        draw.text((1, top + 1), label, fill=_INK)
        for number, frame in enumerate(frames):
            sheet.paste(Image.fromarray(frame), (number * (frames.shape[2] + _GAP), top + _LABEL))
        top += height
    return sheet


def line_charts(charts: Sequence[tuple[str, Sequence[float]]]) -> Image.Image:
    """Charts of (title, values over frames 0, 1, ...), one under the other; values that are not finite are left out."""
    sheet = Image.new("RGB", (_SIZE[0], _SIZE[1] * len(charts)), "white")
    for number, (title, values) in enumerate(charts):
        sheet.paste(_chart(title, values), (0, number * _SIZE[1]))
    return sheet


def _chart(title: str, values: Sequence[float]) -> Image.Image:
    picture = Image.new("RGB", _SIZE, "white")
    draw = ImageDraw.Draw(picture)
    left, top = _MARGIN[:2]
    right, bottom = _SIZE[0] - _MARGIN[2], _SIZE[1] - _MARGIN[3]
    draw.text((left, 6), title, fill=_INK)
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    for share in (0.0, 0.5, 1.0):
        y = bottom - share * (bottom - top)
        draw.line((left, y, right, y), fill=_RULE)
        draw.text((4, y - 6), f"{low + share * (high - low):.4g}", fill=_INK)
    last = max(len(values) - 1, 1)
    draw.text((left, bottom + 6), "frame 0", fill=_INK)
    draw.text((right - 6 * len(str(last)), bottom + 6), str(last), fill=_INK)
    previous: tuple[float, float] | None = None
    for frame, value in enumerate(values):
        if not math.isfinite(value):
            previous = None
            continue
        place = (left + frame / last * (right - left), bottom - (value - low) / (high - low) * (bottom - top))
        if previous is not None:
            draw.line((*previous, *place), fill=_LINE, width=2)
        draw.ellipse((place[0] - 2, place[1] - 2, place[0] + 2, place[1] + 2), fill=_LINE)
        previous = place
    return picture
