"""Which clips a training sees, as the YAML file, the flags and their help. No torch here.

A training draws micro-batches from `buckets`: each is a number of frames and a picture size, or an area in which all
aspect ratios find a size of their own ("with varying aspect ratios", paper §2.2.1, footnote 2). The mixture of long
clips of few pixels and short clips of many (paper §2.2.1, stage 3) is two buckets and their weights:

    buckets:
      - {frames: 169, area: 65536, weight: 1}
      - {frames: 9, area: 495616, weight: 1}
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fsae.errors import require

SIDE = 64  # the autoencoder's spatial compression: sides of clips are multiples of it
STRIDE = 4  # its temporal compression: clips have 1 + 4k frames


def require_size(frames: int, height: int, width: int) -> None:
    """Refuse the options of these names if the autoencoder takes no clip of this length and size."""
    require(frames >= 1 and frames % STRIDE == 1, "frames", frames, "1 + 4k")
    for name, side in (("height", height), ("width", width)):
        require(side >= SIDE and side % SIDE == 0, name, side, f"a multiple of {SIDE}")


@dataclass(frozen=True)
class SourceConfig:
    """Where clips come from.

    Attributes:
        path: Folder of videos, images and tars (with its subfolders); a .jsonl or .csv list with the column path and,
            if wanted, caption, start and end (seconds); a .tar as webdataset writes it; or a pattern of these such
            as "shards/*.tar".
        weight: Share of the samples, relative to the other sources.
    """

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(bool(self.path), "source.path", self.path, "a folder, a list, a tar or a pattern")
        require(0 < self.weight < math.inf, "source.weight", self.weight, "a number above 0")


@dataclass(frozen=True)
class BucketConfig:
    """Clips of one length and one size, or one area.

    Attributes:
        frames: Frames of a clip, 1 + 4k. With 1, images are clips, and videos give single frames.
        area: Pixels of a frame; videos of every aspect ratio get sides, multiples of 64, of about this area.
        height: Instead of area: one height for all, a multiple of 64.
        width: With height: the width, a multiple of 64.
        weight: Share of the micro-batches, relative to the other buckets.
        batch_size: Samples in a micro-batch of one process; None takes the loop's.
        max_aspect: With area: the most elongated size, as longer by shorter side.
    """

    frames: int = 17
    area: int | None = None
    height: int | None = None
    width: int | None = None
    weight: float = 1.0
    batch_size: int | None = None
    max_aspect: float = 2.0

    def __post_init__(self) -> None:
        require(self.frames >= 1 and self.frames % STRIDE == 1, "bucket.frames", self.frames, "1 + 4k")
        require(0 < self.weight < math.inf, "bucket.weight", self.weight, "a number above 0")
        require(self.batch_size is None or self.batch_size >= 1, "bucket.batch_size", self.batch_size, "1 or more")
        require(self.max_aspect >= 1, "bucket.max_aspect", self.max_aspect, "at least 1")
        if self.area is not None:
            require(
                self.height is None and self.width is None, "bucket.area", self.area, "given without height and width"
            )
            require(
                self.area >= SIDE * SIDE, "bucket.area", self.area, f"at least {SIDE * SIDE}, {SIDE} x {SIDE} pixels"
            )
        else:
            for name in ("height", "width"):
                side = getattr(self, name)
                accepted = f"a multiple of {SIDE}, if area is not given"
                require(side is not None and side >= SIDE and side % SIDE == 0, f"bucket.{name}", side, accepted)

    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of every size, from the widest to the tallest.

        For an area A these are the square nearest to it and, for each side that is a multiple of 64, that side and the
        multiple of 64 next to A / side, lying and standing, as far as their ratio stays within `max_aspect`.
        """
        if self.area is None:
            assert self.height is not None and self.width is not None
            return [(self.height, self.width)]
        longest = math.ceil(math.sqrt(self.area * self.max_aspect) / SIDE)
        square = round(math.sqrt(self.area) / SIDE) * SIDE
        found = {(square, square)}
        for side in range(SIDE, longest * SIDE + 1, SIDE):
            other = max(1, round(self.area / side / SIDE)) * SIDE
            found |= {(other, side), (side, other)}
        fitting = [size for size in found if max(size) <= self.max_aspect * min(size)]
        return sorted(fitting, key=lambda size: (size[0] / size[1], size))


@dataclass(frozen=True)
class ClipsConfig:
    """The clips of a training.

    Attributes:
        sources: Where they come from.
        buckets: Their lengths and sizes.
        fps: Frames per second at which videos are sampled by the time of their frames; None takes a file's own frames.
        stride: Take every stride-th of these.
        reader: What decodes videos: "pyav", or "decord" (needs the extra fsae[decord]).
    """

    sources: list[SourceConfig] = field(default_factory=list)
    buckets: list[BucketConfig] = field(default_factory=list)
    fps: float | None = None
    stride: int = 1
    reader: Literal["pyav", "decord"] = "pyav"

    def __post_init__(self) -> None:
        require(bool(self.sources), "clips.sources", self.sources, "one source or more")
        require(bool(self.buckets), "clips.buckets", self.buckets, "one bucket or more")
        require(self.fps is None or 0 < self.fps < math.inf, "clips.fps", self.fps, "a number above 0, or none")
        require(self.stride >= 1, "clips.stride", self.stride, "1 or more")
        require(self.reader in ("pyav", "decord"), "clips.reader", self.reader, '"pyav" or "decord"')
