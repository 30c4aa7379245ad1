"""Clips of many lengths and sizes, a micro-batch at a time of one (paper §2.2.1).

Every file is sorted, by the aspect ratio and length that its header states, into one size of each `BucketConfig` that
it is long enough for. A micro-batch is of one bucket: one number of frames and one size. Which bucket, which source and
which files follow from the seed and the step alone, whatever turns out broken later; and all processes of a micro-batch
have the same bucket, so that they take equal time and wait for none.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from fsae.data.config import BucketConfig, Mixture, Sampling
from fsae.data.datasets import ClipDataset
from fsae.data.image import cover, load_image
from fsae.data.index import Entries, Index
from fsae.data.media import Media
from fsae.data.order import Cut, derived_generator, derived_seed
from fsae.data.readers import GRACE, check_reader, draw_clip, room
from fsae.data.sources import read_source
from fsae.data.video import VideoInfo
from fsae.errors import UserError


@dataclass(frozen=True)
class Bucket:
    """Clips of one length and size.

    Attributes:
        frames: T.
        size: (H, W).
        batch_size: Samples in a micro-batch of one process; None takes the loop's.
        share: Probability that a micro-batch is of this bucket.
        first: Index of the first of its items in the dataset.
        members: For each source that it has files of: its share of the samples, and their numbers.
    """

    frames: int
    size: tuple[int, int]
    batch_size: int | None
    share: float
    first: int
    members: list[tuple[float, NDArray[np.int32]]]

    def __len__(self) -> int:
        return sum(len(numbers) for _, numbers in self.members)


class BucketedClips(ClipDataset):
    """Map-style dataset of clips in buckets; items are (bucket, file) pairs, one bucket after the other.

    Opening it looks into every file for its size and length. Files that cannot be read, or that are too short for every
    bucket, are named by one warning then and are among `skipped`. A file that breaks later is replaced by the next
    usable one of its bucket.

    Args:
        config: Sources, buckets and how videos are sampled.
        seed: Decides where in its file a clip starts.

    Raises:
        UserError: a source that cannot be used, or a bucket that no file fits.
    """

    def __init__(self, config: Mixture, seed: int = 0) -> None:
        check_reader(config.reader)
        self.config, self.seed = config, seed
        self.settings = {"clips": asdict(config), "clip_seed": seed}
        self.entries = Entries([read_source(source.path, probed=True) for source in config.sources])
        self.buckets: list[Bucket] = []
        for bucket in config.buckets:
            self.buckets += self._sizes_of(bucket)
        self._firsts = [bucket.first for bucket in self.buckets]
        super().__init__(self.entries, np.concatenate([rows for bucket in self.buckets for _, rows in bucket.members]))
        used = np.zeros(len(self.entries), bool)
        used[self._rows] = True
        self._never = np.flatnonzero(~used)
        if len(self._never):
            warnings.warn(f"broken, or fit for no bucket: {self.summary()}", stacklevel=2)

    def order(self, cut: Cut) -> BucketOrder:
        """The order in which a training loop sees the items."""
        return BucketOrder(self.buckets, cut)

    def bucket(self, index: int) -> Bucket:
        """The bucket of an item."""
        return self.buckets[bisect_right(self._firsts, index) - 1]

    def _skipped(self) -> list[int]:
        """Files of which no clip, or at least one clip, could not be used so far."""
        return [*self._never.tolist(), *super()._skipped()]

    def read(self, index: int, epoch: int) -> tuple[NDArray[np.uint8], tuple[float, float]]:
        """An item's clip, uint8 `T H W 3`, and when its first and last frame begin in the file, in seconds; UserError
        if it cannot be read: nothing takes its place here, other than in `sample`."""
        bucket, media = self.bucket(index), self.entry(index).media
        if media.is_image:
            return cover(load_image(media), bucket.size)[None], (0.0, 0.0)
        draw = np.random.default_rng([self.seed, index, epoch]).random()
        sampling = self.config.sampling(bucket.frames, bucket.size)
        source, row = self.entries.place(int(self._rows[index]))
        info = source.info(row)
        assert isinstance(info, VideoInfo), "only files that could be probed are sorted"
        pixels, times = draw_clip(media, info, draw, sampling)
        return pixels, (times[0], times[-1])

    def _sizes_of(self, config: BucketConfig) -> list[Bucket]:
        """The buckets, one a size, of one setting; those without a file are left out."""
        sizes, sampling = config.sizes(), self.config.sampling(config.frames)
        fitting = [_fitting(index, sampling) for index in self.entries.indices]
        weights = [
            source.weight if len(rows) else 0.0 for source, rows in zip(self.config.sources, fitting, strict=True)
        ]
        if not any(weights):
            raise UserError(self._none_fits(config.frames))
        share = config.weight / sum(bucket.weight for bucket in self.config.buckets)
        members: dict[tuple[int, int], list[tuple[float, NDArray[np.int32]]]] = {size: [] for size in sizes}
        for source, (weight, rows) in enumerate(zip(weights, fitting, strict=True)):
            nearest = _nearest(self.entries.indices[source], rows, sizes)
            for place, size in enumerate(sizes):
                own = (rows[nearest == place] + self.entries.firsts[source]).astype(np.int32)
                if len(own):
                    members[size].append((weight / sum(weights) * len(own) / len(rows), own))
        buckets = []
        first = self.buckets[-1].first + len(self.buckets[-1]) if self.buckets else 0
        for size in sizes:
            if members[size]:
                weight = share * sum(part for part, _ in members[size])
                buckets.append(Bucket(config.frames, size, config.batch_size, weight, first, members[size]))
                first += len(buckets[-1])
        return buckets

    def _none_fits(self, frames: int) -> str:
        """The sentence about a bucket that no file is long enough for, and about those that cannot be read."""
        places = [np.flatnonzero(index.rows.numbers["frames"] == 0) for index in self.entries.indices]
        broken = sum(map(len, places))
        too_short = self._too_short(frames)
        if not broken:
            return too_short
        source = next(number for number, rows in enumerate(places) if len(rows))
        first = self.entries.indices[source].info(int(places[source][0]))
        if broken == len(self.entries):
            return f"none of the sources' {broken} file(s) can be read; the first: {first}"
        return f"{too_short}; {broken} file(s) cannot be read, the first: {first}"

    def _too_short(self, frames: int) -> str:
        shortest, fps = self.config.sampling(frames).span, self.config.fps
        if fps is None:
            return (
                f"no file of the sources has the {shortest} frames that the bucket of {frames} frames needs; "
                "give longer videos, or take the bucket out"
            )
        return (
            f"no file of the sources lasts the {shortest / fps:.2f} seconds that the bucket of {frames} frames needs "
            f"at {fps:g} frames a second; give longer videos, a higher fps, or take the bucket out"
        )

    def _replacements(self, index: int) -> Iterable[int]:
        bucket = self.bucket(index)
        return chain(range(index, bucket.first + len(bucket)), range(bucket.first, index))

    def _pixels(self, media: Media, index: int, epoch: int) -> NDArray[np.uint8]:
        return self.read(index, epoch)[0]


def nearest_size(info: VideoInfo, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (H, W) whose aspect ratio is nearest to a video's, by their quotient."""
    ratio = math.log(info.height / info.width)
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))


def _fitting(index: Index, sampling: Sampling) -> NDArray[np.int64]:
    """The rows that a clip fits in."""
    names = ("start", "end", "frames", "fps", "image")
    start, end, frames, fps, image = (index.rows.numbers[name] for name in names)
    _, have, need = room(start, end, frames, fps, sampling)
    long = have >= (need if sampling.fps is None else need - GRACE)
    return np.flatnonzero((frames > 0) & np.where(image, sampling.frames == 1, long))


def _nearest(index: Index, rows: NDArray[np.int64], sizes: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Of each row the number of its nearest size; those of one height and width are looked at together."""
    height, width = (index.rows.numbers[name][rows].astype(np.int64) for name in ("height", "width"))
    pictures, which = np.unique(height << 32 | width, return_inverse=True)
    infos = [VideoInfo(1, picture >> 32, picture & 0xFFFFFFFF, 1.0) for picture in pictures.tolist()]
    return np.array([sizes.index(nearest_size(info, sizes)) for info in infos], np.int64)[which]


# --- the order


class BucketOrder:
    """The items of every micro-batch of one process: a function of seed and step, with no state to restore.

    Micro-batch number q of the run is of a bucket drawn by (seed, q); the samples of a bucket, over all processes, are
    of sources drawn by their shares; and each source's files in a bucket come in permutations, one an epoch, so that
    each is seen once before any is seen twice.
    """

    def __init__(self, buckets: Sequence[Bucket], cut: Cut) -> None:
        self.buckets, self.cut = buckets, cut
        self.batch_sizes = [bucket.batch_size or cut.batch for bucket in buckets]
        self._which = _Choices([bucket.share for bucket in buckets], cut.seed, 0)
        self._sources = [_Choices([p for p, _ in bucket.members], cut.seed, 1, b) for b, bucket in enumerate(buckets)]
        self._permutations: dict[tuple[int, int], tuple[int, torch.Tensor]] = {}

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, offset): how often all items' number of samples was seen before a step, and how many since."""
        counts = self._which.counts(step * self.cut.accumulation)
        seen = sum(int(n) * size for n, size in zip(counts, self.batch_sizes, strict=True)) * self.cut.processes
        return divmod(seen, sum(map(len, self.buckets)))

    def micro_batch(self, step: int, micro: int) -> list[tuple[int, int]]:
        """The (index, epoch) pairs of this process's micro-batch `micro` of `step`, all of one bucket."""
        bucket, before = self._which.choice(step * self.cut.accumulation + micro)
        size = self.batch_sizes[bucket]
        first = (before * self.cut.processes + self.cut.rank) * size
        return [self._item(bucket, number) for number in range(first, first + size)]

    def _item(self, bucket: int, number: int) -> tuple[int, int]:
        """(index, epoch) of a bucket's sample `number`."""
        source, before = self._sources[bucket].choice(number)
        lengths = [len(numbers) for _, numbers in self.buckets[bucket].members]
        epoch, offset = divmod(before, lengths[source])
        known, permutation = self._permutations.get((bucket, source), (-1, torch.zeros(0)))
        if known != epoch:
            generator = derived_generator(self.cut.seed, 2, bucket, source, epoch)
            permutation = torch.randperm(lengths[source], generator=generator)
            self._permutations[bucket, source] = epoch, permutation
        return self.buckets[bucket].first + sum(lengths[:source]) + int(permutation[offset]), epoch


class _Choices:
    """An endless row of independent choices among kinds, each a function of the seed and its place in the row.

    They are drawn in blocks; how often each kind came before a block is counted up from the row's beginning once, which
    takes a tenth of a second for a million choices.
    """

    BLOCK = 4096

    def __init__(self, probabilities: Sequence[float], *seed: int) -> None:
        self._limits = np.cumsum(probabilities) / np.sum(probabilities)
        self._seed = seed
        self._before = [np.zeros(len(probabilities), np.int64)]
        self._drawn: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))

    def choice(self, number: int) -> tuple[int, int]:
        """The kind at a place, and how often it came before."""
        block, offset = divmod(number, self.BLOCK)
        kinds = self._block(block)
        kind = int(kinds[offset])
        return kind, int(self._counts_before(block)[kind] + np.count_nonzero(kinds[:offset] == kind))

    def counts(self, number: int) -> NDArray[np.int64]:
        """How often each kind comes before a place."""
        block, offset = divmod(number, self.BLOCK)
        before = self._counts_before(block)
        return before + np.bincount(self._block(block)[:offset], minlength=len(before))

    def _block(self, block: int) -> NDArray[np.int64]:
        if self._drawn[0] != block:
            draws = np.random.default_rng(derived_seed(*self._seed, block)).random(self.BLOCK)
            kinds = np.minimum(np.searchsorted(self._limits, draws, side="right"), len(self._limits) - 1)
            self._drawn = block, kinds
        return self._drawn[1]

    def _counts_before(self, block: int) -> NDArray[np.int64]:
        while len(self._before) <= block:
            kinds = self._block(len(self._before) - 1)
            self._before.append(self._before[-1] + np.bincount(kinds, minlength=len(self._limits)))
        return self._before[block]
