"""Pictures for a report, drawn with Pillow alone: a grid of labelled frames, a small line chart, a heat map."""

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
_RAMP = np.array([(240, 244, 249), (158, 195, 225), (49, 120, 190), (8, 40, 90)])  # from low to high
_MAP, _CELLS, _READABLE = 880, (14, 64), 40  # a map's side, its cells' least and greatest, the least that take a figure
_BAR = (14, 180)  # the colours' scale, width and height


def frame_grid(rows: Sequence[tuple[str, NDArray[np.uint8]]]) -> Image.Image:
    """Rows of frames, each (label, uint8 `N H W 3`), one under the other, the label above its row."""
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


def heat_map(
    values: NDArray[np.floating],
    title: str,
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    limits: tuple[float, float] = (0.0, 1.0),
) -> Image.Image:
    """A matrix as coloured cells, first row on top, under a scale of the colours; large cells carry their figure.

    Rows and columns have a title and a label each. What is not finite stays blank; what lies outside `limits`, the
    values of the palest and the darkest colour, gets the nearer one.
    """
    (row_title, row_labels), (column_title, column_labels) = rows, columns
    if values.shape != (len(row_labels), len(column_labels)):
        raise ValueError(f"{len(row_labels)} x {len(column_labels)} labels for values of shape {values.shape}")
    cell = min(max(_MAP // max(values.shape), _CELLS[0]), _CELLS[1])
    width, height = cell * values.shape[1], cell * values.shape[0]
    written = ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength
    left, top = round(max(map(written, row_labels))) + 2 * _LABEL + 4, 2 * _LABEL
    right = left + max(width + 70 + _BAR[0], round(written(title)) + 8)
    picture = Image.new("RGB", (right, top + max(height, _BAR[1]) + 3 * _LABEL), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((left, 6), title, fill=_INK)
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            _draw_cell(draw, (left + column * cell, top + row * cell), cell, value, limits)
    for row, text in enumerate(row_labels):
        draw.text((left - 4, top + (row + 0.5) * cell), text, fill=_INK, anchor="rm")
    for column, text in enumerate(column_labels):
        draw.text((left + (column + 0.5) * cell, top + height + 3), text, fill=_INK, anchor="ma")
    draw.text((left + width / 2, top + height + _LABEL + 6), column_title, fill=_INK, anchor="ma")
    upright = Image.new("RGB", (round(draw.textlength(row_title)) + 2, _LABEL), "white")
    ImageDraw.Draw(upright).text((1, 0), row_title, fill=_INK)
    upright = upright.rotate(90, expand=True)
    picture.paste(upright, (3, max(top + (height - upright.height) // 2, 0)))
    _draw_scale(draw, (left + width + 20, top), limits)
    return picture


def _draw_cell(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], cell: int, value: float, limits: tuple[float, float]
) -> None:
    share = (value - limits[0]) / (limits[1] - limits[0])
    draw.rectangle((*corner, corner[0] + cell - 2, corner[1] + cell - 2), fill=_colour(share))
    if cell >= _READABLE:
        middle = (corner[0] + cell / 2, corner[1] + cell / 2)
        draw.text(middle, f"{value:.2f}", fill="white" if share > 0.5 else _INK, anchor="mm")


def _draw_scale(draw: ImageDraw.ImageDraw, corner: tuple[int, int], limits: tuple[float, float]) -> None:
    (left, top), (width, height) = corner, _BAR
    for line in range(height):
        draw.line((left, top + line, left + width, top + line), fill=_colour(1 - line / (height - 1)))
    for share in (0.0, 0.5, 1.0):
        text = f"{limits[0] + share * (limits[1] - limits[0]):.3g}"
        draw.text((left + width + 6, top + (1 - share) * (height - 1)), text, fill=_INK, anchor="lm")


def _colour(share: float) -> tuple[int, int, int]:
    place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    red, green, blue = (round(float(np.interp(place, range(len(_RAMP)), _RAMP[:, part]))) for part in range(3))
    return red, green, blue


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
