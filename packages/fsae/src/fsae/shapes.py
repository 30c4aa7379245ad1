"""Sizes in frames and pixels, and in latents. No torch here, so that a video can be planned before a model is loaded.

The stages of an FSAE are counted from the finest. Each has cells twice as wide and high as the one before, and each of
the finest `temporal_stages` half its frame rate; with n stages, a latent is

    space = 2^(n - 1)  pixels wide and high   and   time = 2^temporal_stages  frames long,

64 and 4 at the paper's sizes. The first latent stands for the first frame alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fsae.errors import UserError


@dataclass(frozen=True)
class Compression:
    """How much of a video one latent stands for.

    Attributes:
        space: pixels a latent is wide and high.
        time: frames that a latent stands for, but for the first, which stands for one.
    """

    space: int
    time: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Compression:
        """That of an FSAE with this configuration: `model.config`, the content of its config.json, or a preset."""
        return cls.of_stages(len(config["widths"]), config["temporal_stages"])

    @classmethod
    def of_stages(cls, stages: int, temporal_stages: int) -> Compression:
        """That of so many stages, of which the finest change the frame rate."""
        return cls(1 << (stages - 1), 1 << temporal_stages)

    def latents(self, frames: int) -> int:
        """Latents of `frames` frames; frames that fill no whole latent are not counted."""
        return 1 + (frames - 1) // self.time

    def frames(self, latents: int) -> int:
        """Frames of a video of `latents` latents."""
        return 1 + (latents - 1) * self.time

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of the latents of a video; a size that does not fit is a `UserError`."""
        self.check(frames, height, width)
        return self.latents(frames), height // self.space, width // self.space

    def video_size(self, latents: int, height: int, width: int) -> tuple[int, int, int]:
        """(T, H, W) of the video of so many latents of so many rows and columns: the inverse of `latent_size`."""
        return self.frames(latents), height * self.space, width * self.space

    def check(self, frames: int, height: int, width: int) -> None:
        """Refuse with a `UserError` what cannot be encoded: frames other than 1 + time k, sides no multiples of space.

        Where only one of the two is in question, 1 and `space` fit for the other.
        """
        if frames < 1 or (frames - 1) % self.time:
            raise UserError(
                f"{frames} frames cannot be encoded; accepted is 1 + {self.time}k (1, {1 + self.time}, "
                f"{1 + 2 * self.time}, ...); repeat the last frame or cut the clip"
            )
        if min(height, width) < self.space or height % self.space or width % self.space:
            raise UserError(
                f"{width}x{height} pixels cannot be encoded; accepted are multiples of {self.space}; "
                "resize, crop or pad the frames"
            )

    def cell(self, stage: int) -> int:
        """Pixels that a cell of a stage's features is wide and high: 1, 2, 4, ... up to `space`."""
        return min(1 << stage, self.space)

    def rate(self, stage: int) -> int:
        """Frames of a stage's features that stand for one latent: `time`, half of it, ... down to 1."""
        return max(self.time >> stage, 1)


PAPER = Compression(64, 4)  # and every preset's
