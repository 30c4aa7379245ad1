"""Where a video or an image lies: a file of its own, or a member of a tar. Without torch."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from fsae.errors import UserError

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".gif"}
)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True)
class Media:
    """One video or image, or a span of a video.

    Attributes:
        path: The file, or the uncompressed tar that holds it.
        member: Its name in the tar; empty for a file of its own.
        offset: Where in the tar its bytes begin.
        size: How many bytes they are.
        start: Seconds into the video from which on it is meant.
        end: Seconds into the video up to which it is meant; None for its end.
    """

    path: Path
    member: str = ""
    offset: int = 0
    size: int = 0
    start: float = 0.0
    end: float | None = None

    @property
    def name(self) -> str:
        """The file's own name, without folders."""
        return Path(self.member or self.path).name

    @property
    def is_image(self) -> bool:
        """Whether it is a still image, by its suffix."""
        return os.path.splitext(self.name)[1].lower() in IMAGE_SUFFIXES

    @property
    def file(self) -> Media:
        """The whole file, without the span."""
        return Media(self.path, self.member, self.offset, self.size)

    def open(self) -> BinaryIO:
        """The bytes, for reading and seeking."""
        if not self.member:
            return self.path.open("rb")
        return cast(BinaryIO, io.BufferedReader(_Window(self.path, self.offset, self.size)))

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)


class Entry(NamedTuple):
    """A video or image of a source, and what the source says about it."""

    media: Media
    caption: str = ""


Readable = str | os.PathLike[str] | Media


def as_media(source: Readable) -> Media:
    """A path as `Media`."""
    return source if isinstance(source, Media) else Media(Path(source))


def check_file(media: Media, kind: str, example: str) -> None:
    """UserError about a `kind` such as "video" if the file, or the tar that should hold it, is not there or is no
    file."""
    if not os.path.exists(media.path):
        raise UserError(f"there is no {kind} file {media}; check its name")
    if not os.path.isfile(media.path):
        raise UserError(f"{media} is not a file; give {example}")


class _Window(io.RawIOBase):
    """Bytes `offset .. offset + size` of a file as a file."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._offset, self._size, self._position = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + position)
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(memoryview(buffer)[:wanted]) or 0
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
