"""Measures how the camera of a video moved, and names it as one of the nano world's eight motions.

    python tools/nano/measure_motion.py clip.mp4 ...

Direct registration: each frame is aligned to the first by a similarity transform (Gauss-Newton on brightness
with a gain and an offset, robust weights, coarse to fine, each frame starting where the one before ended). It
needs no features, so it works on blurred and noisy video; it names the motion that moves the picture most.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

LEVELS = (16, 32, 64)  # pixels of the frame's shorter side
FINE_LEVELS = (128, 256)  # to a small fraction of a pixel, from where the coarse levels ended
ITERATIONS = 12
MOST_FRAMES = 17  # frames aligned in a longer video, evenly spaced
STILL_BELOW = 0.02  # mean displacement over the whole clip, as a fraction of the frame's size
MEAN_RADIUS = 0.3826  # mean distance of a unit square's points from its centre


@dataclass(frozen=True)
class MeasuredMotion:
    """The camera's whole movement from the first frame to the last.

    `pan_x`, `pan_y`: what the camera turned right and down, as fractions of the frame's width and height.
    `zoom`: how many times larger things got. `roll`: degrees the camera turned clockwise.
    """

    kind: str
    pan_x: float
    pan_y: float
    zoom: float
    roll: float


def luminance(video: Any) -> torch.Tensor:
    """(T, 1, H, W) grey in [0, 1] of uint8 T H W 3, float T H W 3 in [0, 1], or float 3 T H W in [-1, 1]."""
    frames = torch.as_tensor(video)
    if frames.ndim != 4 or (frames.shape[-1] != 3 and frames.shape[0] != 3):
        raise ValueError(f"a video of shape {tuple(frames.shape)}; T H W 3 (uint8, or float 0..1) or 3 T H W (-1..1)")
    if frames.shape[-1] == 3:
        frames = frames.float() / 255 if frames.dtype == torch.uint8 else frames.float()
        frames = frames.permute(0, 3, 1, 2)
    else:
        frames = (frames.float() + 1).permute(1, 0, 2, 3) / 2
    weights = torch.tensor([0.299, 0.587, 0.114], device=frames.device)
    return (frames * weights[:, None, None]).sum(1, keepdim=True)


def _blurred(frames: torch.Tensor) -> torch.Tensor:
    """A 5-tap binomial blur, edges replicated."""
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=frames.device) / 16
    frames = F.conv2d(F.pad(frames, (2, 2, 0, 0), mode="replicate"), taps.view(1, 1, 1, 5))
    return F.conv2d(F.pad(frames, (0, 0, 2, 2), mode="replicate"), taps.view(1, 1, 5, 1))


def _pyramid(frames: torch.Tensor, sides: Sequence[int] = LEVELS) -> list[torch.Tensor]:
    """The video at each size of its shorter side, coarsest first."""
    height, width = frames.shape[-2:]
    levels = []
    for side in sides:
        scale = min(1.0, side / min(height, width))
        size = (max(8, round(height * scale)), max(8, round(width * scale)))
        shrunk = F.interpolate(frames, size=size, mode="bilinear", antialias=True, align_corners=False)
        levels.append(_blurred(shrunk))
    return levels


def _align(first: torch.Tensor, frame: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """(a, b, tx, ty) with frame(x) = first(a x - b y + tx, b x + a y + ty); lengths in frame widths.

    `first` and `frame` are (1, 1, h, w) at one level.
    """
    height, width = frame.shape[-2:]
    y, x = torch.meshgrid(
        (torch.arange(height, dtype=torch.float32) + 0.5 - height / 2) / width,
        (torch.arange(width, dtype=torch.float32) + 0.5 - width / 2) / width,
        indexing="ij",
    )
    # Central differences per unit of width, sampled along with the picture.
    padded = F.pad(first, (1, 1, 1, 1), mode="replicate")
    gradient_x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) * (width / 2)
    gradient_y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) * (width / 2)
    stack = torch.cat([first, gradient_x, gradient_y], dim=1)
    target = frame[0, 0]
    parameters = start.clone()
    for _ in range(ITERATIONS):
        a, b, tx, ty = parameters.tolist()
        at_x, at_y = a * x - b * y + tx, b * x + a * y + ty
        grid = torch.stack([2 * at_x, 2 * at_y * width / height], dim=-1)[None]
        inside = (grid[0].abs() < 1).all(-1).float()
        warped, gx, gy = F.grid_sample(stack, grid, padding_mode="border", align_corners=False)[0]
        residual = warped - target
        ones = torch.ones_like(x)
        jacobian = torch.stack([gx * x + gy * y, gy * x - gx * y, gx, gy, warped, ones], dim=-1).view(-1, 6)
        spread = 1.5 * residual[inside > 0].abs().median().clamp_min(1e-3) if inside.any() else torch.tensor(1.0)
        weight = (inside / (1 + (residual / (2 * spread)) ** 2)).view(-1, 1)
        normal = jacobian.T @ (weight * jacobian)
        damping = 1e-3 * normal.diagonal() + 1e-6
        step = torch.linalg.solve(normal + torch.diag(damping), -(jacobian * weight).T @ residual.view(-1))[:4]
        step = step.clamp(-0.1, 0.1)
        parameters = parameters + step
        parameters[:2] = parameters[:2].clamp(-3, 3)
        if float(step.abs().max()) < 1e-4:
            break
    return parameters


def estimate_path(video: Any) -> torch.Tensor:
    """(T', 4) alignments (a, b, tx, ty) of at most 17 evenly spaced frames to the first, itself row 0."""
    frames = luminance(video).cpu()
    total = frames.shape[0]
    chosen = torch.linspace(0, total - 1, min(total, MOST_FRAMES)).round().long()
    levels = _pyramid(frames[chosen])
    identity = torch.tensor([1.0, 0.0, 0.0, 0.0])
    path = [identity]
    for index in range(1, len(chosen)):
        # From where the last frame ended, moving on as it moved.
        guess = path[-1] if index == 1 else path[-1] + 0.8 * (path[-1] - path[-2])
        for level in levels:
            guess = _align(level[:1], level[index : index + 1], guess)
        path.append(guess)
    return torch.stack(path)


def refine(alignment: torch.Tensor, pair: Any) -> torch.Tensor:
    """An alignment of `estimate_path` made exact, for a video of two frames: the picture and what it was moved to."""
    for level in _pyramid(luminance(pair).cpu(), FINE_LEVELS):
        alignment = _align(level[:1], level[1:], alignment)
    return alignment


def measure_motion(video: Any) -> MeasuredMotion:
    """The camera's motion in a video: uint8 T H W 3, float T H W 3 in [0, 1], or float 3 T H W in [-1, 1]."""
    height, width = luminance(video).shape[-2:]
    return name_motion(estimate_path(video)[-1], (height, width))


def name_motion(alignment: torch.Tensor, size: tuple[int, int]) -> MeasuredMotion:
    """What a last frame's alignment (a, b, tx, ty) means for a frame of (H, W) pixels."""
    a, b, tx, ty = alignment.tolist()
    height, width = size
    scale, angle = math.hypot(a, b), math.atan2(b, a)
    pan_x, pan_y = tx, ty * width / height
    shrunk = math.log(max(scale, 1e-6))
    displacements = {
        "pan right" if pan_x > 0 else "pan left": abs(pan_x),
        "pan down" if pan_y > 0 else "pan up": abs(pan_y),
        "zoom out" if shrunk > 0 else "zoom in": abs(shrunk) * MEAN_RADIUS,
        "roll": abs(angle) * MEAN_RADIUS,
    }
    kind = max(displacements, key=lambda name: displacements[name])
    if displacements[kind] < STILL_BELOW:
        kind = "still"
    return MeasuredMotion(kind, pan_x, pan_y, 1 / max(scale, 1e-6), math.degrees(angle))


def agreement(pairs: Iterable[tuple[str, str]]) -> float:
    """Share of (asked, measured) motion names that are the same."""
    listed = list(pairs)
    if not listed:
        raise ValueError("no pairs to compare")
    return sum(asked == measured for asked, measured in listed) / len(listed)


def shuffled_agreement(pairs: Sequence[tuple[str, str]], seed: int = 0) -> float:
    """The control: agreement expected when the asked motions are handed out to the clips at random.

    The mean over 100 shuffles, so that the control is a number and not an accident.
    """
    generator = torch.Generator().manual_seed(seed)
    asked, measured = [a for a, _ in pairs], [m for _, m in pairs]
    shares = []
    for _ in range(100):
        order = torch.randperm(len(asked), generator=generator).tolist()
        shares.append(agreement((asked[i], m) for i, m in zip(order, measured, strict=True)))
    return sum(shares) / len(shares)


def main() -> int:
    """The command; its exit code."""
    import argparse

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("videos", nargs="+", type=Path)
    arguments = parser.parse_args()
    from fsae.data.video import read_video

    for path in arguments.videos:
        frames, _ = read_video(path)
        found = measure_motion(frames)
        print(
            f"{path}: {found.kind} (camera right {found.pan_x:+.3f}, down {found.pan_y:+.3f} of the frame; "
            f"zoom {found.zoom:.3f}; roll {found.roll:+.1f} degrees)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
