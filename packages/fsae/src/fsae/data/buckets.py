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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fsae.data.config import BucketConfig, Mixture
from fsae.data.datasets import ClipDataset
from fsae.data.image import cover, image_size, load_image
from fsae.data.media import Media
from fsae.data.order import Cut, derived_generator, derived_seed
from fsae.data.readers import check_length, check_reader, draw_clip
from fsae.data.sources import Entry, read_source
from fsae.data.video import VideoInfo, probe
from fsae.errors import UserError

_PROBING_THREADS = 8  # more than processors: most of the time is waiting for the disk


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
    members: list[tuple[float, list[int]]]

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
        sources = [read_source(source.path) for source in config.sources]
        self.entries = [entry for source in sources for entry in source]
        self.infos = _probe_all(entry.media for entry in self.entries)
        bounds = np.cumsum([0, *map(len, sources)]).tolist()
        numbers = [range(a, b) for a, b in pairwise(bounds)]
        self.buckets: list[Bucket] = []
        for bucket in config.buckets:
            self.buckets += self._sizes_of(bucket, numbers)
        self._items = [number for bucket in self.buckets for _, members in bucket.members for number in members]
        self._firsts = [bucket.first for bucket in self.buckets]
        super().__init__(len(self._items))
        used = set(self._items)
        self._never = [entry.media for number, entry in enumerate(self.entries) if number not in used]
        if self._never:
            warnings.warn(f"broken, or fit for no bucket: {self.summary()}", stacklevel=2)

    def order(self, cut: Cut) -> BucketOrder:
        """The order in which a training loop sees the items."""
        return BucketOrder(self.buckets, cut)

    def bucket(self, index: int) -> Bucket:
        """The bucket of an item."""
        return self.buckets[bisect_right(self._firsts, index) - 1]

    @property
    def skipped(self) -> list[Media]:
        """Files of which no clip, or at least one clip, could not be used so far."""
        return list(dict.fromkeys([*self._never, *super().skipped]))

    def read(self, index: int, epoch: int) -> tuple[NDArray[np.uint8], tuple[float, float]]:
        """An item's clip, uint8 `T H W 3`, and when its first and last frame begin in the file, in seconds; UserError
        if it cannot be read: nothing takes its place here, other than in `sample`."""
        bucket, media = self.bucket(index), self.entry(index).media
        if media.is_image:
            return cover(load_image(media), bucket.size)[None], (0.0, 0.0)
        draw = np.random.default_rng([self.seed, index, epoch]).random()
        sampling = self.config.sampling(bucket.frames, bucket.size)
        pixels, times = draw_clip(media, self._info(self._items[index]), draw, sampling)
        return pixels, (times[0], times[-1])

    def _sizes_of(self, config: BucketConfig, sources: Sequence[range]) -> list[Bucket]:
        """The buckets, one a size, of one setting; those without a file are left out."""
        sizes = config.sizes()
        fitting = [[number for number in source if self._fits(number, config.frames)] for source in sources]
        weights = [
            source.weight if numbers else 0.0 for source, numbers in zip(self.config.sources, fitting, strict=True)
        ]
        if not any(weights):
            raise UserError(self._none_fits(config.frames))
        share = config.weight / sum(bucket.weight for bucket in self.config.buckets)
        members: dict[tuple[int, int], list[tuple[float, list[int]]]] = {size: [] for size in sizes}
        for weight, numbers in zip(weights, fitting, strict=True):
            nearest = [nearest_size(self._info(number), sizes) for number in numbers]
            for size in sizes:
                own = [number for number, its in zip(numbers, nearest, strict=True) if its == size]
                if own:
                    members[size].append((weight / sum(weights) * len(own) / len(numbers), own))
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
        broken = [info for info in self.infos if isinstance(info, str)]
        if len(broken) == len(self.infos):
            return f"none of the sources' {len(broken)} file(s) can be read; the first: {broken[0]}"
        too_short = self._too_short(frames)
        return f"{too_short}; {len(broken)} file(s) cannot be read, the first: {broken[0]}" if broken else too_short

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

    def _info(self, number: int) -> VideoInfo:
        info = self.infos[number]
        assert isinstance(info, VideoInfo), "only files that could be probed are sorted"
        return info

    def _fits(self, number: int, frames: int) -> bool:
        info, media = self.infos[number], self.entries[number].media
        if isinstance(info, str) or media.is_image:
            return isinstance(info, VideoInfo) and frames == 1
        try:
            check_length(media, info, self.config.sampling(frames))
        except UserError:
            return False
        return True

    def entry(self, index: int) -> Entry:
        return self.entries[self._items[index]]

    def _replacements(self, index: int) -> Sequence[int]:
        bucket = self.bucket(index)
        return (*range(index, bucket.first + len(bucket)), *range(bucket.first, index))

    def _pixels(self, media: Media, index: int, epoch: int) -> NDArray[np.uint8]:
        return self.read(index, epoch)[0]


def nearest_size(info: VideoInfo, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (H, W) whose aspect ratio is nearest to a video's, by their quotient."""
    ratio = math.log(info.height / info.width)
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))


def _probe_all(media: Iterable[Media]) -> list[VideoInfo | str]:
    """Length and size of each file; of those that cannot be read, why."""
    files = [one.file for one in media]
    distinct = list(dict.fromkeys(files))
    with ThreadPoolExecutor(_PROBING_THREADS) as pool:
        infos = list(tqdm(pool.map(_probe, distinct), total=len(distinct), desc="looking into files", delay=2))
    known = dict(zip(distinct, infos, strict=True))
    return [known[file] for file in files]


def _probe(media: Media) -> VideoInfo | str:
    try:
        if media.is_image:
            return VideoInfo(1, *image_size(media), fps=1.0)
        return probe(media, count=False)
    except UserError as error:
        return str(error)


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
        self._permutations: dict[tuple[int, int], tuple[int, list[int]]] = {}

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
        known, permutation = self._permutations.get((bucket, source), (-1, []))
        if known != epoch:
            generator = derived_generator(self.cut.seed, 2, bucket, source, epoch)
            permutation = torch.randperm(lengths[source], generator=generator).tolist()
            self._permutations[bucket, source] = epoch, permutation
        return self.buckets[bucket].first + sum(lengths[:source]) + permutation[offset], epoch


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
