"""The eight motions of the nano world's camera, as similarity transforms of the first frame's plane.

Words: "the camera pans left" means that the camera turns left, so what it shows moves right on the screen;
"zooms in" means that things grow; "rolls clockwise" means that the camera turns clockwise about its axis, so
the picture turns counterclockwise. Pixel coordinates are centred on the frame, x to the right and y down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

PANS = {"pan left": (-1, 0), "pan right": (1, 0), "pan up": (0, -1), "pan down": (0, 1)}
MOTIONS = (*PANS, "zoom in", "zoom out", "roll", "still")
MOVING = MOTIONS[:-1]

PAN_TRAVEL = (0.10, 0.25)  # of the frame's width (left, right) or height (up, down)
ZOOM_TRAVEL = (1.15, 1.40)  # ratio of sizes
ROLL_TRAVEL = (8.0, 20.0)  # degrees
LARGEST_EASE = 0.6


@dataclass(frozen=True)
class Motion:
    """One camera motion over a clip.

    `travel` is the total from the first frame to the last, whatever the clip's length: a fraction of the
    frame for pans, a ratio > 1 for zooms, degrees for rolls. `direction` is +1 for a clockwise roll, else -1.
    `ease` mixes a constant speed (0) with a smooth start and stop (1).
    """

    kind: str
    travel: float = 0.0
    direction: int = 1
    ease: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in MOTIONS:
            raise ValueError(f"motion {self.kind!r}; one of {', '.join(MOTIONS)}")


def draw_motion(rng: np.random.Generator, still_fraction: float = 1 / len(MOTIONS)) -> Motion:
    """A random motion: still with `still_fraction`, else one of the seven others with equal chance."""
    kind = "still" if rng.random() < still_fraction else MOVING[int(rng.integers(len(MOVING)))]
    return draw_travel(rng, kind)


def draw_travel(rng: np.random.Generator, kind: str) -> Motion:
    """A motion of the given kind with a random travel, direction and ease."""
    u, direction, ease = rng.random(), (1 if rng.random() < 0.5 else -1), float(rng.random()) * LARGEST_EASE
    if kind == "still":
        return Motion(kind)
    if kind in PANS:
        low, high = PAN_TRAVEL
        return Motion(kind, low + u * (high - low), ease=ease)
    if kind == "roll":
        low, high = ROLL_TRAVEL
        return Motion(kind, low + u * (high - low), direction, ease)
    low, high = (math.log(z) for z in ZOOM_TRAVEL)
    return Motion(kind, math.exp(low + u * (high - low)), ease=ease)


def progress(frames: int, ease: float) -> torch.Tensor:
    """(T,) share of the travel done at each frame: 0 at the first (and at a single one), 1 at the last."""
    if frames == 1:
        return torch.zeros(1)
    u = torch.linspace(0.0, 1.0, frames)
    return (1 - ease) * u + ease * (3 - 2 * u) * u * u


def camera_path(motion: Motion, frames: int, size: tuple[int, int]) -> torch.Tensor:
    """(T, 2, 3) maps from centred pixels of each frame to those of the first frame; row 0 is the identity.

    `size` is the frame's (H, W) in pixels.
    """
    height, width = size
    share = progress(frames, motion.ease)
    scale, angle = torch.ones(frames), torch.zeros(frames)
    shift = torch.zeros(frames, 2)
    if motion.kind in PANS:
        toward = torch.tensor([width * float(PANS[motion.kind][0]), height * float(PANS[motion.kind][1])])
        shift = motion.travel * share[:, None] * toward
    elif motion.kind == "zoom in":
        scale = torch.exp(-math.log(motion.travel) * share)
    elif motion.kind == "zoom out":
        scale = torch.exp(math.log(motion.travel) * share)
    elif motion.kind == "roll":
        angle = math.radians(motion.travel) * motion.direction * share
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    # With y down, (cos, -sin; sin, cos) turns the looked-at window clockwise on the screen.
    rows = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1)
    return rows.view(frames, 2, 3)


def extent(path: torch.Tensor, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """(left, right, top, bottom): centred pixels of the first frame that the whole path sees."""
    height, width = size
    corners = torch.tensor([[x, y, 1.0] for x in (-width / 2, width / 2) for y in (-height / 2, height / 2)])
    seen = torch.einsum("tij,kj->tki", path, corners)
    x, y = seen[..., 0], seen[..., 1]
    return float(x.min()), float(x.max()), float(y.min()), float(y.max())
