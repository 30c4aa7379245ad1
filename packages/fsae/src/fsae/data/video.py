"""Video files in and out through PyAV.

Frames are decoded one after another from the start, never sought: container indices lie often enough (open
groups of pictures, edit lists) that a sought frame may be another one. Arrays are uint8 `T H W 3`, RGB;
tensors for the models are float `3 T H W` in [-1, 1].
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import ArrayLike, NDArray

from fsae.errors import UserError
from fsae.files import atomic_path, check_writable

if TYPE_CHECKING:
    import torch

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")

# Visually lossless for the autoencoder's purposes, and small enough to send.
_X264 = {"crf": "17", "preset": "medium"}
_BT709 = 1  # the same number for primaries, transfer and matrix in the H.264 standard's tables


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds: number of frames, size in pixels as shown (upright), frames per second."""

    frames: int
    height: int
    width: int
    fps: float


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Look at a video file.

    `frames` is the container's own count, or the number of decoded frames where it states none.

    Raises:
        UserError: as `read_video`.
    """
    with _open(path) as (container, stream):
        decoded = container.decode(stream)
        first = next(decoded, None)
        if first is None:
            raise UserError(f"the video {path} holds no frame; give another file")
        height, width = _shown_size(first)
        frames = stream.frames or 1 + sum(1 for _ in decoded)
        return VideoInfo(frames, height, width, _frame_rate(stream, path))


def read_video(
    path: str | os.PathLike[str],
    start: int = 0,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, float]:
    """Decode frames `start .. start + frames` (to the end if `frames` is None), turned upright.

    Args:
        path: a video in any container and codec that FFmpeg reads.
        start: index of the first frame wanted.
        frames: how many frames.
        size: (H, W) to which each frame is scaled so that it covers it, then cropped around the centre; None
            keeps the file's size.

    Returns:
        uint8 tensor `T H W 3`, RGB, and the frames per second.

    Raises:
        UserError: the file is missing, no video, damaged, or has fewer frames than asked for.
    """
    import torch

    if start < 0 or (frames is not None and frames < 1):
        raise UserError(f"cannot read {frames} frames from frame {start} on; ask for at least one, from 0 on")
    with _open(path) as (container, stream):
        stop = None if frames is None else start + frames
        pictures = [_picture(frame, size) for frame in islice(container.decode(stream), start, stop)]
        fps = _frame_rate(stream, path)
    if not pictures or (frames is not None and len(pictures) < frames):
        raise UserError(
            f"{path} has {len(pictures)} frames from frame {start} on, where {frames or 'some'} are asked "
            "for; ask for fewer or give a longer video"
        )
    return torch.from_numpy(np.stack(pictures)), fps


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[ArrayLike],
    fps: float,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write H.264 (libx264, yuv420p, BT.709, index in front) as browsers play it; whole or not at all.

    Args:
        path: ends in .mp4, .m4v, .mov or .mkv.
        frames: uint8 `H W 3` RGB, all of one size, taken one by one as they come. yuv420p knows even sizes
            only: an odd height or width grows by one, its last row or column repeated.
        fps: frames per second.
        metadata: container tags such as {"comment": ...}; values are written as text.

    Raises:
        UserError: before the first frame is taken, if `path` cannot be written or has another suffix or `fps`
            is no positive number; later, if there is no frame, or one differs in size or type, or the disk
            fills.
    """
    check_video_target(path)
    if not (math.isfinite(fps) and fps > 0):
        raise UserError(f"a video cannot have {fps} frames per second; give a positive number")
    try:
        with atomic_path(path) as temporary:
            _encode(temporary, frames, fps, metadata or {})
    except av.FFmpegError as error:
        raise UserError(f"cannot write the video {path}: {error.strerror or error}") from error


def check_video_target(path: str | os.PathLike[str]) -> None:
    """Check before any work that `write_video` will be able to write `path`.

    Raises:
        UserError: the suffix is none of `SUFFIXES`, or `fsae.files.check_writable` refuses the place.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot write {path} as a video; give a name that ends in {', '.join(SUFFIXES)}")
    check_writable(path)


def to_video_tensor(frames: torch.Tensor) -> torch.Tensor:
    """uint8 `T H W 3` to float `3 T H W` in [-1, 1]."""
    import torch

    return torch.as_tensor(frames).permute(3, 0, 1, 2).to(torch.float32) / 127.5 - 1


def to_frames(video: torch.Tensor) -> torch.Tensor:
    """Float `3 T H W` in [-1, 1] to uint8 `T H W 3`, rounded; what lies outside is clamped."""
    import torch

    levels = ((video.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(1, 2, 3, 0).cpu()


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open for decoding; whatever FFmpeg finds wrong, then or while decoding, becomes a UserError."""
    if not os.path.exists(path):
        raise UserError(f"there is no video file {path}; check its name")
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a file; give one video")
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} holds no video; give another file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except av.FFmpegError as error:
        raise UserError(f"the video {path} cannot be decoded ({error.strerror}); it is damaged or no video") from error


def _frame_rate(stream: av.VideoStream, path: str | os.PathLike[str]) -> float:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise UserError(f"{path} does not say how many frames per second it has; remux it with a frame rate")
    return float(rate)


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns that bring the stored picture upright."""
    return round(frame.rotation / 90) % 4


def _shown_size(frame: av.VideoFrame) -> tuple[int, int]:
    return (frame.width, frame.height) if _quarter_turns(frame) % 2 else (frame.height, frame.width)


def _picture(frame: av.VideoFrame, size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """One frame as `H W 3`, scaled while still in the codec's own format (fast), turned, and cropped."""
    turns = _quarter_turns(frame)
    if size is None:
        return np.rot90(frame.reformat(format="rgb24").to_ndarray().astype(np.uint8, copy=False), turns)
    height, width = _shown_size(frame)
    scale = max(size[0] / height, size[1] / width)
    covering = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    stored = covering[::-1] if turns % 2 else covering
    # AREA averages what it shrinks, so that fine texture does not turn into moire.
    scaled = frame.reformat(
        height=stored[0], width=stored[1], format="rgb24", interpolation="AREA" if scale < 1 else "BICUBIC"
    )
    picture = np.rot90(scaled.to_ndarray().astype(np.uint8, copy=False), turns)
    top, left = (covering[0] - size[0]) // 2, (covering[1] - size[1]) // 2
    return picture[top : top + size[0], left : left + size[1]]


def _encode(path: Path, frames: Iterable[ArrayLike], fps: float, metadata: Mapping[str, Any]) -> None:
    pictures = iter(frames)
    first = next(pictures, None)
    if first is None:
        raise UserError("a video needs at least one frame; there was none")
    shape = np.shape(first)
    # use_metadata_tags lets keys beyond the standard's few through; faststart puts the index in front for
    # browsers.
    options = {"movflags": "faststart+use_metadata_tags"} if path.suffix.lower() != ".mkv" else {}
    with av.open(os.fspath(path), "w", options=options) as container:
        container.metadata.update({key: str(value) for key, value in metadata.items()})
        stream = _add_stream(container, shape, fps)
        for index, picture in enumerate(_chain(first, pictures)):
            container.mux(stream.encode(_to_frame(picture, shape, index)))
        container.mux(stream.encode(None))


def _chain(first: ArrayLike, rest: Iterator[ArrayLike]) -> Iterator[ArrayLike]:
    yield first
    yield from rest


def _add_stream(container: av.container.OutputContainer, shape: tuple[int, ...], fps: float) -> av.VideoStream:
    rate = Fraction(fps).limit_denominator(1001)
    stream = container.add_stream("libx264", rate=rate, options=_X264)
    stream.height, stream.width = (side + side % 2 for side in shape[:2])
    stream.pix_fmt = "yuv420p"
    # Said openly, because players guess the matrix of an untagged file by its size and shift its colours.
    context = stream.codec_context
    context.color_primaries = context.color_trc = context.colorspace = _BT709
    context.color_range = ColorRange.MPEG
    return stream


def _to_frame(picture: ArrayLike, shape: tuple[int, ...], index: int) -> av.VideoFrame:
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.shape != shape or array.ndim != 3 or array.shape[2] != 3:
        raise UserError(
            f"frame {index} is {array.dtype} {array.shape}; all must be uint8 H W 3 like the first, {shape}"
        )
    even = np.pad(array, ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0)), mode="edge")
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
    converted = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
    converted.pts = index
    return converted
