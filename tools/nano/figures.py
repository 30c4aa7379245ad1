"""What a finished video is worth, in numbers: each figure takes arrays and gives a number.

    frame 0         `psnr_db`, `colour_shift`            against the photograph that went in
    detail          `sharpness_ratio`, `vertical_nyquist`, `stripes`
    time            `differences_by_position`, `unevenness`
    the camera      `moved`, `along_asked`               what the photograph looks like after a true move

Images are uint8 `H W 3`, videos uint8 `T H W 3` with T = 1 + 4k. An alignment is `(a, b, tx, ty)` of `measure_motion`:
frame(x) = photo(a x - b y + tx, b x + a y + ty) with lengths in frame widths from the middle.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from measure_motion import luminance
from motion import PANS
from numpy.typing import NDArray
from skimage.color import deltaE_ciede2000, rgb2lab
from torch import Tensor
from torch.nn import functional as F

from fsae.evaluation.metrics import psnr

Image = NDArray[np.uint8]
Video = NDArray[np.uint8]
Mask = NDArray[np.bool_]

GROUP = 4
"""Frames that one latent stands for, after the first."""

CELL = 8
"""Pixels a side over which colour is averaged, so that texture does not count as colour."""

WINDOW = 16
"""Rows of the window in which the alternation of rows is measured."""


def psnr_db(image: Image | Video, truth: Image | Video, covered: Mask | None = None) -> float:
    """PSNR in dB, over the pixels `covered` `H W` if given; 0 where none is: nothing of the truth can be seen."""
    if covered is not None:
        if not covered.any():
            return 0.0
        image, truth = image[covered], truth[covered]
    made, given = (torch.from_numpy(values.astype(np.float32))[None] / 127.5 for values in (image, truth))
    return float(psnr(made, given))


def moved(photo: Image, alignment: Tensor) -> tuple[Image, Mask]:
    """The photograph as a camera sees it that moved by `alignment` (bicubic), and which pixels the photograph covers.

    What it does not cover is filled by reflection.
    """
    height, width = photo.shape[:2]
    a, b, tx, ty = alignment.double().tolist()
    y, x = torch.meshgrid(
        (torch.arange(height, dtype=torch.float64) + 0.5 - height / 2) / width,
        (torch.arange(width, dtype=torch.float64) + 0.5 - width / 2) / width,
        indexing="ij",
    )
    grid = torch.stack([2 * (a * x - b * y + tx), 2 * (b * x + a * y + ty) * width / height], dim=-1)
    picture = torch.from_numpy(photo.astype(np.float64)).permute(2, 0, 1)[None]
    seen = F.grid_sample(picture, grid[None], mode="bicubic", padding_mode="reflection", align_corners=False)[0]
    # Half a pixel short of the edge: beyond it a sample already mixes in the reflection.
    inside = (grid.abs() <= 1 - 1 / torch.tensor([width, height])).all(-1)
    return seen.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy(), inside.numpy()


def part_way(alignment: Tensor, share: float) -> Tensor:
    """The alignment after a share of the way at constant speed: scale as a power, angle and shift linear."""
    a, b, tx, ty = alignment.double().tolist()
    scale, angle = math.hypot(a, b) ** share, math.atan2(b, a) * share
    return torch.tensor([scale * math.cos(angle), scale * math.sin(angle), tx * share, ty * share])


def true_clip(photo: Image, alignment: Tensor, frames: int) -> Video:
    """The clip of `frames` frames that moves the photograph to `alignment` at constant speed."""
    return np.stack([moved(photo, part_way(alignment, t / (frames - 1)))[0] for t in range(frames)])


def along_asked(alignment: Tensor, kind: str) -> Tensor:
    """What of an alignment is the asked motion: its pan, zoom or roll alone; none where it goes the other way."""
    a, b, tx, ty = alignment.double().tolist()
    if kind in PANS:
        right, down = PANS[kind]
        return torch.tensor([1.0, 0.0, right * max(0.0, right * tx), down * max(0.0, down * ty)])
    if kind == "roll":
        angle = math.atan2(b, a)
        return torch.tensor([math.cos(angle), math.sin(angle), 0.0, 0.0])
    scale = math.hypot(a, b)
    scale = {"zoom in": min(scale, 1.0), "zoom out": max(scale, 1.0)}.get(kind, 1.0)
    return torch.tensor([scale, 0.0, 0.0, 0.0])


def sharpness(image: Image, covered: Mask | None = None) -> float:
    """Variance of the Laplacian of luminance, over the pixels whose neighbours are all covered; 0 without any."""
    grey = luminance(image[None])[0, 0].double()
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    if covered is not None:
        mask = torch.from_numpy(covered).double()[None, None]
        laplacian = laplacian[-F.max_pool2d(-mask, 3, 1)[0, 0] > 0.5]
    return float(laplacian.var(correction=0)) if len(laplacian) else 0.0


def sharpness_ratio(frame: Image, truth: Image, covered: Mask | None = None) -> float:
    """Sharpness of a frame over that of what it should show; 0 where nothing of the truth can be seen."""
    whole = sharpness(truth, covered)
    return sharpness(frame, covered) / whole if whole > 0 else 0.0


def vertical_nyquist(frames: Image | Video) -> float:
    """Share of luminance power at the frequency of alternating rows, for a video the mean over its frames.

    The power of L in the FFT bin at pi along y, in Hann windows w of 16 rows, averaged over windows and columns:

        mean |sum_n w_n (-1)^n L(y + n, x)|^2 / (sum_n w_n^2 var L),

    1 for white noise, (sum w)^2 / sum w^2 = 32/3 for rows that alternate, about 0 for what is smooth down the column.
    """
    grey = luminance(frames if frames.ndim == 4 else frames[None])[:, 0].double()
    grey = grey - grey.mean((1, 2), keepdim=True)
    window = torch.hann_window(WINDOW, dtype=torch.float64)
    alternating = window * (1 - 2 * (torch.arange(WINDOW) % 2))
    power = (grey.unfold(1, WINDOW, 1) @ alternating).square().mean((1, 2))
    return float((power / (window.square().sum() * grey.square().mean((1, 2)))).mean())


def stripes(frames: Image | Video) -> float:
    """How much more the rows alternate than the columns do: `vertical_nyquist` over that of the frames transposed.

    Alternation of rows alone is hidden in a blurred frame, which has lost more of what the photograph had there than
    stripes bring; blur takes from rows and columns alike.
    """
    return vertical_nyquist(frames) / max(vertical_nyquist(np.swapaxes(frames, -3, -2)), 1e-12)


def differences_by_position(frames: Video) -> NDArray[np.float64]:
    """Mean absolute difference of each frame to the one before, in levels, by its place in its latent's group: `(4,)`.

    Frames 4j+1 ... 4j+4 belong to one latent; the mean is over all groups of the clip.
    """
    steps = np.abs(np.diff(frames.astype(np.float32), axis=0)).mean(axis=(1, 2, 3), dtype=np.float64)
    return steps.reshape(-1, GROUP).mean(axis=0)


def unevenness(differences: NDArray[np.float64]) -> float:
    """Largest over smallest of the four mean differences `N 4` of some clips: 1 for a steady motion."""
    positions = differences.mean(axis=0)
    return float(positions.max() / max(float(positions.min()), 1e-6))


def colour_shift(image: Image, truth: Image) -> float:
    """Mean CIEDE2000 difference of two images whose cells of 8 x 8 pixels were averaged; about 2 is just visible."""
    return float(deltaE_ciede2000(*(rgb2lab(_cells(picture)) for picture in (image, truth))).mean())


def _cells(image: Image) -> NDArray[np.float64]:
    """`H W 3` -> means of cells `h w 3` in [0, 1]; what is left over at the bottom and right is cut off."""
    rows, columns = image.shape[0] // CELL, image.shape[1] // CELL
    whole = image[: rows * CELL, : columns * CELL] / 255.0
    return whole.reshape(rows, CELL, columns, CELL, 3).mean(axis=(1, 3))
