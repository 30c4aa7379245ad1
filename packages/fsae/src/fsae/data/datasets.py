"""Clips and captions from the user's files.

``VideoFolder`` takes a folder of videos and images, or a list (.jsonl or .csv) with the columns ``path`` and,
optionally, ``caption``. An item is a pure function of (index, epoch), as the training loop's resume asks.
"""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fsae.data.image import load_image
from fsae.data.video import probe, read_video, to_video_tensor
from fsae.errors import UserError

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".gif"})
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


class Clip(TypedDict):
    """A sample: ``video`` 3 T H W in [-1, 1] and what its list says about it."""

    video: Tensor
    caption: str


class VideoFolder(Dataset[Clip]):
    """Map-style dataset of clips.

    Each epoch draws a new start frame from (seed, index, epoch). A file that is broken, too short, or an
    image where several frames are wanted is replaced by the next usable one in order; it is named by a
    warning when it is met and in ``skipped``, also when a worker process of a loader met it.

    Args:
        source: Folder (searched with its subfolders, in the order of the paths) or .jsonl/.csv list; relative
            paths in a list are relative to the list.
        frames: Frames of a clip, T. With 1, an image is a clip and a video gives one of its frames.
        size: (H, W); frames are resized to cover it and cropped in the centre.
        stride: Take every stride-th frame of the file.
        seed: Decides where clips start.

    Raises:
        UserError: no such source, no usable entry in it, or a list without a ``path``.
    """

    def __init__(self, source: str | Path, frames: int, size: tuple[int, int], stride: int = 1, seed: int = 0) -> None:
        if min(frames, stride, *size) < 1:
            raise UserError(f"frames {frames}, size {size}, stride {stride}: all must be 1 or more")
        self.source = Path(source)
        self.entries = list(_entries(self.source))
        if not self.entries:
            raise UserError(f"{source} holds no video or image; give a folder of them, or a .jsonl or .csv list")
        self.frames, self.size, self.stride, self.seed = frames, size, stride, seed
        self.settings = {"frames": frames, "size": list(size), "stride": stride, "seed": seed}
        self._lengths: dict[Path, int] = {}
        # Shared with the processes of a loader, so that this one can name in the end what they met.
        self._unusable = torch.zeros(len(self.entries), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Clip:
        return self.sample(index, 0)

    def sample(self, index: int, epoch: int) -> Clip:
        """The clip of ``index`` in ``epoch``; of the next usable file if its own cannot be used.

        Raises:
            UserError: no file of the whole dataset can be used.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        for place in (*range(index, len(self)), *range(index)):
            if self._unusable[place]:
                continue
            path, caption = self.entries[place]
            try:
                return {"video": to_video_tensor(self._frames(path, place, epoch)), "caption": caption}
            except UserError as error:
                self._unusable[place] = 1
                warnings.warn(f"skipped {path}: {error}", stacklevel=2)
        raise UserError(f"none of the {len(self)} files of {self.source} can be used: {self.summary()}")

    @property
    def skipped(self) -> list[Path]:
        """Files met so far that could not be used."""
        return [self.entries[place][0] for place in self._unusable.nonzero().flatten().tolist()]

    def summary(self) -> str:
        """One line with the number of skipped files and the first ten names; empty if there were none."""
        skipped = self.skipped
        if not skipped:
            return ""
        more = f" and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        return f"{len(skipped)} file(s) skipped: {', '.join(map(str, skipped[:10]))}{more}"

    def _frames(self, path: Path, index: int, epoch: int) -> Tensor:
        """The clip's pixels, uint8 ``T H W 3``."""
        if path.suffix.lower() in IMAGE_SUFFIXES:
            if self.frames > 1:
                raise UserError(f"an image gives one frame, {self.frames} are wanted")
            return torch.from_numpy(cover(load_image(path), self.size)).unsqueeze(0)
        span = (self.frames - 1) * self.stride + 1
        if path not in self._lengths:
            self._lengths[path] = probe(path).frames
        length = self._lengths[path]
        if length < span:
            raise UserError(f"it has {length} frames, {span} are wanted")
        start = int(np.random.default_rng([self.seed, index, epoch]).integers(length - span + 1))
        pixels, _ = read_video(path, start=start, frames=span, size=self.size)
        return pixels[:: self.stride].contiguous()


def cover(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize ``H W 3`` until it covers ``size`` (antialiased), then crop the centre."""
    height, width = size
    scale = max(height / image.shape[0], width / image.shape[1])
    # The longer side is rounded, so it may fall a pixel short of the target.
    resized = (max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale)))
    picture = Image.fromarray(image).resize(resized, Image.Resampling.LANCZOS)
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    return np.asarray(picture.crop((left, top, left + width, top + height))).copy()


def _entries(source: Path) -> Iterator[tuple[Path, str]]:
    """(path, caption) of every entry."""
    if source.is_dir():
        known = VIDEO_SUFFIXES | IMAGE_SUFFIXES
        yield from ((p, "") for p in sorted(source.rglob("*")) if p.is_file() and p.suffix.lower() in known)
    elif source.suffix.lower() in (".jsonl", ".csv") and source.is_file():
        for number, row in _rows(source):
            path, caption = row.get("path"), row.get("caption")
            if not isinstance(path, str) or not path:
                raise UserError(
                    f"{source}, line {number}: there is no path; each entry needs path, and may have caption"
                )
            yield source.parent / path, str(caption or "")
    else:
        raise UserError(f"{source} is neither a folder nor a .jsonl or .csv list; check the path")


def _rows(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, columns) of a list's entries."""
    with source.open(encoding="utf-8-sig", newline="") as lines:
        if source.suffix.lower() == ".csv":
            reader = csv.DictReader(lines)
            for row in reader:
                yield reader.line_num, row
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{source}, line {number} is not JSON ({error}); give one object a line") from error
                if not isinstance(row, dict):
                    raise UserError(f'{source}, line {number} is not an object; give {{"path": ..., "caption": ...}}')
                yield number, row
