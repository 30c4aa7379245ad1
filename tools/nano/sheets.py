"""Contact sheets, to be looked at: videos beside the photograph they were made from, every pixel as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fsae.storage.files import atomic_path

STRIP = 26
"""Pixels for a line of text under the pictures."""

SHOWN = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where in the video the frames of a sheet lie: frames 0, 8, 16, 24 and 32 of 33."""

PER_KIND = 2
"""Videos of one motion and one size on the overview."""


@dataclass(frozen=True)
class Shown:
    """A video on the overview: its motion, what was asked for, the photograph and the last frame, uint8 `H W 3`."""

    kind: str
    prompt: str
    photo: NDArray[np.uint8]
    last: NDArray[np.uint8]


def with_text(picture: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
    """The picture `H W 3` with a line of text under it, cut where the picture ends."""
    page = Image.new("RGB", (picture.shape[1], picture.shape[0] + STRIP), "white")
    page.paste(Image.fromarray(picture), (0, 0))
    ImageDraw.Draw(page).text((6, picture.shape[0] + 4), text, fill="black", font=ImageFont.load_default(15))
    return np.asarray(page)


def case_sheet(photo: NDArray[np.uint8], frames: NDArray[np.uint8], prompt: str) -> NDArray[np.uint8]:
    """The photograph and five frames of its video `T H W 3` in a row, the prompt under them."""
    chosen = [frames[round(share * (len(frames) - 1))] for share in SHOWN]
    return with_text(np.concatenate([photo, *chosen], axis=1), prompt)


def overview(shown: Sequence[Shown]) -> NDArray[np.uint8]:
    """One page: a row for each motion, and in it photograph and last frame of up to two videos of each size."""
    rows = [_row([video for video in shown if video.kind == kind]) for kind in dict.fromkeys(v.kind for v in shown)]
    width = max(row.shape[1] for row in rows)
    return np.concatenate([_padded(row, row.shape[0], width) for row in rows])


def _row(videos: Sequence[Shown]) -> NDArray[np.uint8]:
    sizes = dict.fromkeys(video.photo.shape for video in videos)
    chosen = [video for size in sizes for video in [v for v in videos if v.photo.shape == size][:PER_KIND]]
    cells = [
        with_text(np.concatenate([video.photo, video.last], axis=1), f"{video.kind}: {video.prompt}")
        for video in chosen
    ]
    height = max(cell.shape[0] for cell in cells)
    return np.concatenate([_padded(cell, height, cell.shape[1]) for cell in cells], axis=1)


def _padded(picture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """The picture on a white page, in its upper left corner."""
    page = np.full((height, width, 3), 255, np.uint8)
    page[: picture.shape[0], : picture.shape[1]] = picture
    return page


def write_png(picture: NDArray[np.uint8], path: Path) -> None:
    """Write uint8 `H W 3`; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, "PNG")
