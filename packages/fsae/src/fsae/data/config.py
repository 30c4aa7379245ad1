"""Which clips a training sees, as the YAML file, the flags and their help. No torch here.

A training draws micro-batches from `buckets`: each is a number of frames and a picture size, or an area in which all
aspect ratios find a size of their own ("with varying aspect ratios", paper §2.2.1, footnote 2). The mixture of long
clips of few pixels and short clips of many (paper §2.2.1, stage 3) is two buckets and their weights:

    clips:
      buckets:
        - {frames: 169, area: 65536, weight: 1}
        - {frames: 9, area: 495616, weight: 1}
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from fsae.bounds import Bound, Checked, Count, Positive, Source
from fsae.errors import require
from fsae.shapes import PAPER

SIDE = PAPER.space  # sides of clips are multiples of it

Frames = Annotated[int, Bound(f"1 + {PAPER.time}k", lambda value: value >= 1 and value % PAPER.time == 1)]
Side = Annotated[int, Bound(f"a multiple of {SIDE}", lambda value: value >= SIDE and value % SIDE == 0)]
Area = Annotated[int, Bound(f"at least {SIDE**2}, {SIDE} x {SIDE} pixels", lambda value: value >= SIDE**2)]
Aspect = Annotated[float, Bound("at least 1", lambda value: value >= 1)]
Reader = Literal["pyav", "decord"]


@dataclass(frozen=True)
class Sampling(Checked):
    """How a clip is cut from a video.

    Attributes:
        frames: How many frames.
        fps: Take the frames shown every stride / fps seconds; None takes the file's own frames.
        stride: Take every stride-th of these.
        size: (H, W) that each frame is scaled to cover, then cropped to around the centre; None keeps the file's.
        reader: What decodes, "pyav" or "decord".
    """

    frames: Count
    fps: Positive | None = None
    stride: Count = 1
    size: tuple[int, int] | None = None
    reader: Reader = "pyav"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.size is None or min(self.size) >= 1, "size", self.size, "two numbers of 1 or more")

    @property
    def span(self) -> int:
        """Frames, of the file or at `fps`, from the first that is taken to the last."""
        return (self.frames - 1) * self.stride + 1


@dataclass(frozen=True)
class SourceConfig(Checked, part="source"):
    """Where clips come from.

    Attributes:
        path: Folder of videos, images and tars (with its subfolders); a .jsonl or .csv list with the column path and,
            if wanted, caption, start and end (seconds); a .tar as webdataset writes it; or a pattern of these such
            as "shards/*.tar".
        weight: Share of the samples, relative to the other sources.
    """

    path: Source
    weight: Positive = 1.0


@dataclass(frozen=True)
class BucketConfig(Checked, part="bucket"):
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

    frames: Frames = 17
    area: Area | None = None
    height: Side | None = None
    width: Side | None = None
    weight: Positive = 1.0
    batch_size: Count | None = None
    max_aspect: Aspect = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.area is not None:
            alone = self.height is None and self.width is None
            require(alone, "bucket.area", self.area, "given without height and width")
        else:
            for name in ("height", "width"):
                accepted = f"a multiple of {SIDE}, if area is not given"
                require(getattr(self, name) is not None, f"bucket.{name}", None, accepted)

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
class Mixture(Checked, part="clips"):
    """What `fsae.data.buckets` draws clips from; checkpoints and caches hold it as it is.

    Attributes:
        sources: Where clips come from.
        buckets: Their lengths and sizes.
        fps: As in `Sampling`.
        stride: As in `Sampling`.
        reader: As in `Sampling`.
    """

    sources: list[SourceConfig]
    buckets: list[BucketConfig]
    fps: Positive | None = None
    stride: Count = 1
    reader: Reader = "pyav"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.sources), "clips.sources", self.sources, "one source or more")
        require(bool(self.buckets), "clips.buckets", self.buckets, "one bucket or more")

    def sampling(self, frames: int, size: tuple[int, int] | None = None) -> Sampling:
        """How clips of one of the lengths and sizes are cut."""
        return Sampling(frames, self.fps, self.stride, size, self.reader)


@dataclass(frozen=True)
class ClipsConfig(Checked, part="clips"):
    """The clips of a training.

    Attributes:
        frames: Frames of a clip, 1 + 4k; 1 takes images, and single frames of videos.
        height: Clips are resized and cropped to this height, a multiple of 64; of 128 for the upsampler and the
            refiner, which see them at half their size as well.
        width: As height: their width.
        buckets: Lengths and sizes of the clips, a mixture by weight, in place of frames, height and width, which then,
            as with caches, are those of validation. A bucket of one frame trains on images as well.
        more_data: Further sources, with their shares beside data, whose share is 1.
        fps: Sample videos at this frame rate, by the time of their frames, whatever the file's; null takes every frame
            of a file.
        stride: Take every stride-th of these frames.
        reader: What decodes videos, "pyav", or "decord" (needs the extra fsae[decord]).
    """

    frames: Frames = 17
    height: Side = 256
    width: Side = 256
    buckets: list[BucketConfig] = field(default_factory=list)
    more_data: list[SourceConfig] = field(default_factory=list)
    fps: Positive | None = None
    stride: Count = 1
    reader: Reader = "pyav"

    @property
    def plain(self) -> bool:
        """Whether clips of one length and size come from one source, frame by frame as its files have them."""
        return not (self.buckets or self.more_data or self.fps is not None or self.reader != "pyav")

    @property
    def sampling(self) -> Sampling:
        """How clips of frames, height and width are cut."""
        return Sampling(self.frames, self.fps, self.stride, (self.height, self.width), self.reader)

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(T, H, W) of all clips: those of validation, then those of the buckets."""
        buckets = [(bucket.frames, *size) for bucket in self.buckets for size in bucket.sizes()]
        return [(self.frames, self.height, self.width), *buckets]

    def mixture(self, data: str) -> Mixture:
        """What clips are drawn from, `data` the first source."""
        buckets = self.buckets or [BucketConfig(self.frames, height=self.height, width=self.width)]
        sources = [SourceConfig(data), *self.more_data]
        return Mixture(sources, buckets, self.fps, self.stride, self.reader)
