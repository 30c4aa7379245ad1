"""Clips of one length and size from the user's files.

`VideoFolder` takes one source (`fsae.data.sources`); `fsae.data.buckets` mixes several, in many lengths and sizes. An
item is a pure function of (index, epoch), as the training loop's resume asks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fsae.data.config import Sampling
from fsae.data.image import cover, load_image
from fsae.data.index import Entries
from fsae.data.media import Entry, Media
from fsae.data.readers import DamagedVideo, check_reader, draw_clip
from fsae.data.sources import read_source
from fsae.data.video import VideoInfo, probe, to_video_tensor
from fsae.errors import UserError

Rows = range | NDArray[np.int32]

_UNUSABLE, _DAMAGED = 1, 2
_PROBED = 65536  # of the files that were looked into, the most that a process keeps in mind


class Clip(TypedDict):
    """A sample: `video` 3 T H W in [-1, 1] and what its source says about it."""

    video: Tensor
    caption: str


class ClipDataset(Dataset[Clip]):
    """What the data sets of clips share: an item that cannot be used is replaced, named by a warning, and counted.

    Which item replaces it depends on the files alone, not on what was met before, so that a run that is resumed sees
    what the uninterrupted one would have seen.

    Args:
        entries: What the sources hold.
        rows: Of each item, the number of its entry.
    """

    def __init__(self, entries: Entries, rows: Rows) -> None:
        self.entries, self._rows = entries, rows
        # Shared with the processes of a loader, so that this one can name in the end what they met.
        self._state = torch.zeros(len(rows), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self._state)

    def __getitem__(self, index: int) -> Clip:
        return self.sample(index, 0)

    def sample(self, index: int, epoch: int) -> Clip:
        """The clip of `index` in `epoch`; that of the next usable item if its own cannot be used; UserError if none
        can."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        tried = 0
        for place in self._replacements(index):
            tried += 1
            if self._state[place] == _UNUSABLE:
                continue
            entry = self.entry(place)
            try:
                pixels = self._pixels(entry.media, place, epoch)
            except UserError as error:
                if not self._state[place]:
                    warnings.warn(f"skipped {entry.media}: {error}", stacklevel=2)
                # Another draw may find a whole part of a damaged video; it is tried again.
                self._state[place] = _DAMAGED if isinstance(error, DamagedVideo) else _UNUSABLE
                continue
            return {"video": to_video_tensor(torch.from_numpy(pixels)), "caption": entry.caption}
        raise UserError(f"none of the {tried} files that could give clip {index} can be used: {self.summary()}")

    @property
    def skipped(self) -> list[Media]:
        """Files met so far of which a clip could not be used."""
        return [self.entries[number].media for number in self._skipped()]

    def _skipped(self) -> list[int]:
        """The numbers of these files' entries."""
        return list(dict.fromkeys(int(self._rows[place]) for place in self._state.nonzero().flatten().tolist()))

    def summary(self) -> str:
        """One line with the number of skipped files and the first ten names; empty if there were none."""
        skipped = self._skipped()
        if not skipped:
            return ""
        more = f" and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        named = ", ".join(str(self.entries[number].media) for number in skipped[:10])
        return f"{len(skipped)} file(s) skipped: {named}{more}"

    def entry(self, index: int) -> Entry:
        """The file of an item, and what its source says about it."""
        return self.entries[int(self._rows[index])]

    def _replacements(self, index: int) -> Iterable[int]:
        """The item itself, and those that may stand for it, in their order."""
        return chain(range(index, len(self)), range(index))

    def _pixels(self, media: Media, index: int, epoch: int) -> NDArray[np.uint8]:
        """The clip, uint8 `T H W 3`."""
        raise NotImplementedError


class VideoFolder(ClipDataset):
    """Map-style dataset of clips of one size from one source.

    Each epoch draws a new start frame from (seed, index, epoch). A file that is broken, too short, or an image where
    several frames are wanted is replaced by the next usable one in order.

    Args:
        source: Folder, list, tar or pattern: see `fsae.data.sources.read_source`.
        sampling: How a clip is cut. With one frame, an image is a clip and a video gives one of its frames.
        seed: Decides where clips start.

    Raises:
        UserError: a source that cannot be used, no size, or no such reader.
    """

    def __init__(self, source: str | Path, sampling: Sampling, seed: int = 0) -> None:
        if sampling.size is None:
            raise UserError("clips of a folder are of one size; give the sampling's")
        check_reader(sampling.reader)
        self.source = Path(source)
        entries = Entries([read_source(source)])
        super().__init__(entries, range(len(entries)))
        self.sampling, self.seed = sampling, seed
        told = {"frames": sampling.frames, "size": list(sampling.size), "stride": sampling.stride, "seed": seed}
        self.settings: dict[str, Any] = told
        if sampling.fps is not None:
            self.settings["fps"] = sampling.fps
        self._probed: dict[Media, VideoInfo] = {}

    def _pixels(self, media: Media, index: int, epoch: int) -> NDArray[np.uint8]:
        if media.is_image:
            if self.sampling.frames > 1:
                raise UserError(f"an image gives one frame, {self.sampling.frames} are wanted")
            assert self.sampling.size is not None
            return cover(load_image(media), self.sampling.size)[None]
        if media.file not in self._probed:
            if len(self._probed) == _PROBED:
                self._probed.clear()
            self._probed[media.file] = probe(media.file, count=False)
        draw = np.random.default_rng([self.seed, index, epoch]).random()
        return draw_clip(media, self._probed[media.file], draw, self.sampling)[0]
