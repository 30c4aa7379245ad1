"""The nano world's camera: eight motions and pairs of them, as similarity transforms of the first frame's plane.

Words: "the camera pans left" means that the camera turns left, so what it shows moves right on the screen;
"zooms in" means that things grow; "rolls clockwise" means that the camera turns clockwise about its axis, so
the picture turns counterclockwise. Pixel coordinates are centred on the frame, x to the right and y down.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch

PANS = {"pan left": (-1, 0), "pan right": (1, 0), "pan up": (0, -1), "pan down": (0, 1)}
MOTIONS = (*PANS, "zoom in", "zoom out", "roll", "still")
MOVING = MOTIONS[:-1]
JOINED = " + "
_OPPOSED = ({"pan left", "pan right"}, {"pan up", "pan down"}, {"zoom in", "zoom out"})
COMBINATIONS = tuple(JOINED.join(pair) for pair in combinations(MOVING, 2) if set(pair) not in _OPPOSED)

SPEEDS = ("small", "usual", "large")
TRAVELS: dict[str, tuple[float, float, float, float]] = {  # the bounds of small, usual and large travel
    "pan": (0.05, 0.10, 0.25, 0.40),  # of the frame's width (left, right) or height (up, down)
    "zoom": (1.09, 1.15, 1.40, 1.70),  # ratio of sizes
    "roll": (5.0, 8.0, 20.0, 30.0),  # degrees
}
SPEED_SHARES = (0.25, 0.5, 0.25)
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

    @property
    def parts(self) -> tuple[Motion, ...]:
        """The motion itself, as the only one of its parts."""
        return (self,)

    @property
    def speed(self) -> str:
        """One of `SPEEDS`, by the travel; the usual one for a still camera."""
        if self.kind == "still":
            return "usual"
        _, small, large, _ = TRAVELS[self.kind.split()[0]]
        return "small" if self.travel < small else "large" if self.travel > large else "usual"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `motion_from_dict`."""
        return asdict(self)


@dataclass(frozen=True)
class Combined:
    """Two motions at the same time, in the order of `MOTIONS`: a diagonal pan, a pan while zooming, and so on."""

    parts: tuple[Motion, Motion]

    def __post_init__(self) -> None:
        if self.kind not in COMBINATIONS:
            raise ValueError(f"motions {self.kind!r}; one of {', '.join(COMBINATIONS)}")

    @property
    def kind(self) -> str:
        """The names of the parts: "pan left + zoom in"."""
        return JOINED.join(part.kind for part in self.parts)

    @property
    def direction(self) -> int:
        """Of the roll, if one of the parts is one."""
        return next((part.direction for part in self.parts if part.kind == "roll"), 1)

    @property
    def speed(self) -> str:
        """What both parts have in common; the usual one where they differ."""
        first, second = (part.speed for part in self.parts)
        return first if first == second else "usual"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `motion_from_dict`."""
        return {"kind": self.kind, "parts": [part.as_dict() for part in self.parts]}


def motion_from_dict(values: dict[str, Any]) -> Motion | Combined:
    """The motion that `as_dict` wrote."""
    if "parts" in values:
        return _together([Motion(**part) for part in values["parts"]])
    return Motion(**values)


def usual_motion(kind: str, direction: int = 1) -> Motion | Combined:
    """A motion of the given kind in the middle of its usual travel."""
    parts = []
    for part in kind.split(JOINED):
        _, low, high, _ = TRAVELS.get(part.split()[0], (0.0, 0.0, 0.0, 0.0))
        parts.append(Motion(part, math.sqrt(low * high), direction))
    return _together(parts)


def draw_motion(
    rng: np.random.Generator, still_fraction: float = 1 / len(MOTIONS), combined_fraction: float = 0.15
) -> Motion | Combined:
    """A random motion: still or combined with these chances, else one of the seven others with equal chance."""
    u = rng.random()
    if u < still_fraction:
        return Motion("still")
    kinds = COMBINATIONS if u > 1 - combined_fraction else MOVING
    return draw_travel(rng, kinds[int(rng.integers(len(kinds)))])


def draw_travel(rng: np.random.Generator, kind: str, speed: str | None = None) -> Motion | Combined:
    """A motion of the given kind, at the given speed or a random one, with a random travel, direction and ease.

    The parts of a combination share speed and ease.
    """
    drawn = SPEEDS[int(rng.choice(len(SPEEDS), p=SPEED_SHARES))]
    ease = float(rng.random()) * LARGEST_EASE
    return _together([_drawn(rng, part, speed or drawn, ease) for part in kind.split(JOINED)])


def _together(parts: list[Motion]) -> Motion | Combined:
    return parts[0] if len(parts) == 1 else Combined(tuple(parts))  # type: ignore[arg-type]


def _drawn(rng: np.random.Generator, kind: str, speed: str, ease: float) -> Motion:
    u, direction = rng.random(), (1 if rng.random() < 0.5 else -1)
    if kind not in MOVING:
        return Motion(kind)
    bounds = TRAVELS[kind.split()[0]]
    low, high = bounds[SPEEDS.index(speed) :][:2]
    # Even in the logarithm, which for a ratio is what the eye sees; over these ranges it favours the smaller travels.
    return Motion(kind, low * (high / low) ** u, direction if kind == "roll" else 1, ease)


def progress(frames: int, ease: float) -> torch.Tensor:
    """(T,) share of the travel done at each frame: 0 at the first (and at a single one), 1 at the last."""
    if frames == 1:
        return torch.zeros(1)
    u = torch.linspace(0.0, 1.0, frames)
    return (1 - ease) * u + ease * (3 - 2 * u) * u * u


def camera_path(motion: Motion | Combined, frames: int, size: tuple[int, int]) -> torch.Tensor:
    """(T, 2, 3) maps from centred pixels of each frame to those of the first frame; row 0 is the identity.

    `size` is the frame's (H, W) in pixels. Each frame's map is pan · zoom · roll of all parts: the window is turned
    and scaled about its middle, and its middle moves in the first frame's plane.
    """
    height, width = size
    scale, angle = torch.ones(frames), torch.zeros(frames)
    shift = torch.zeros(frames, 2)
    for part in motion.parts:
        share = progress(frames, part.ease)
        if part.kind in PANS:
            toward = torch.tensor([width * float(PANS[part.kind][0]), height * float(PANS[part.kind][1])])
            shift = shift + part.travel * share[:, None] * toward
        elif part.kind == "zoom in":
            scale = scale * torch.exp(-math.log(part.travel) * share)
        elif part.kind == "zoom out":
            scale = scale * torch.exp(math.log(part.travel) * share)
        elif part.kind == "roll":
            angle = angle + math.radians(part.travel) * part.direction * share
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
