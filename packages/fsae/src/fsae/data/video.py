"""Video files in and out through PyAV, by the index of their frames; `fsae.data.readers` reads by time.

Frames are decoded one after another from the start, never sought: an index of frames is what containers lie about
most. Arrays are uint8 `T H W 3`, RGB; tensors for the models are float `3 T H W` in [-1, 1].

A damaged place ends a video: the decoder is told to report every error that it notices, because what it would otherwise
make up for the lost pictures, and for all that lean on them, looks like video but is none.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import ArrayLike, NDArray

from fsae.data.media import Readable, as_media, check_file
from fsae.errors import UserError
from fsae.storage.files import atomic_path, check_writable

if TYPE_CHECKING:
    import torch

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")

# Visually lossless for the autoencoder's purposes, and small enough to send.
_X264 = {"crf": "17", "preset": "medium"}
_INVALID_DATA = 0x41444E49  # FFmpeg's code for it, "INDA"
_BT709 = 1  # the same number for primaries, transfer and matrix in the H.264 standard's tables


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds: number of frames, size in pixels as shown (upright), frames per second.

    counted: whether the frames are counted, by the container or here, and not worked out from the duration.
    """

    frames: int
    height: int
    width: int
    fps: float
    counted: bool = True

    @property
    def duration(self) -> float:
        """Seconds from the first frame's beginning to the last one's end, at a constant rate."""
        return self.frames / self.fps


def probe(path: Readable, count: bool = True) -> VideoInfo:
    """Look at a video file; errors as `read_video`.

    Where the container does not say how many frames it has (Matroska, MPEG-TS), they are decoded and counted; without
    `count` the number is worked out from its duration, quickly.
    """
    with open_video(path) as (container, stream):
        decoded = decode(container, stream)
        first = next(decoded, None)
        if first is None:
            raise UserError(f"the video {path} holds no frame; give another file")
        height, width = shown_size(first)
        fps = frame_rate(stream, path)
        if not stream.frames and not count and container.duration:
            about = max(1, round(container.duration / av.time_base * fps))
            return VideoInfo(about, height, width, fps, counted=False)
        return VideoInfo(stream.frames or 1 + sum(1 for _ in decoded), height, width, fps)


def stream_video(
    path: Readable, size: tuple[int, int] | None = None, start: int = 0, frames: int | None = None
) -> Iterator[NDArray[np.uint8]]:
    """Decode a file of any length one frame at a time, uint8 `H W 3`, in the memory of a few frames.

    Arguments are those of `read_video`; a video that ends before `frames` frames gives those that it has.

    Raises:
        UserError: the file is missing or no video, before the first frame; it is damaged, after the last frame before
            the damage.
    """
    _check_range(start, frames)
    return _stream(path, size, start, frames)


def _stream(
    path: Readable, size: tuple[int, int] | None, start: int, frames: int | None
) -> Iterator[NDArray[np.uint8]]:
    with open_video(path) as (container, stream):
        stop = None if frames is None else start + frames
        for frame in islice(decode(container, stream), start, stop):
            yield picture(frame, size)


def read_video(
    path: Readable,
    start: int = 0,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, float]:
    """Decode frames `start .. start + frames` (to the end if `frames` is None) of whatever FFmpeg reads, turned
    upright.

    Args:
        path: the video.
        start: index of the first frame wanted.
        frames: how many.
        size: (H, W) that each frame is scaled to cover, then cropped to around the centre; None keeps the file's.

    Returns:
        uint8 tensor `T H W 3`, RGB, and the frames per second.

    Raises:
        UserError: the file is missing, no video, damaged, or has fewer frames than asked for.
    """
    import torch

    _check_range(start, frames)
    with open_video(path) as (container, stream):
        stop = None if frames is None else start + frames
        pictures = [picture(frame, size) for frame in islice(decode(container, stream), start, stop)]
        fps = frame_rate(stream, path)
    if not pictures or (frames is not None and len(pictures) < frames):
        raise UserError(
            f"{path} has {len(pictures)} frames from frame {start} on, where {frames or 'some'} are asked "
            "for; ask for fewer or give a longer video"
        )
    return torch.from_numpy(stack(pictures, path)), fps


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
        UserError: before the first frame is taken, for a path or fps that cannot be; later, if there is no frame, one
            differs in size or type, or the disk fills.
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
    """UserError, before any work, if `write_video` will not be able to write `path`: its suffix, or
    `check_writable`."""
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


def _check_range(start: int, frames: int | None) -> None:
    if start < 0 or (frames is not None and frames < 1):
        raise UserError(f"cannot read {frames} frames from frame {start} on; ask for at least one, from 0 on")


@contextmanager
def open_video(path: Readable) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open for decoding; whatever FFmpeg finds wrong, then or while decoding, becomes a UserError."""
    media = as_media(path)
    check_file(media, "video", "one video")
    try:
        with ExitStack() as opened:
            # FFmpeg's own file access is faster, where there is a file.
            file = opened.enter_context(media.open()) if media.member else os.fspath(media.path)
            container = opened.enter_context(av.open(file, "r"))
            if not container.streams.video:
                raise UserError(f"{media} holds no video; give another file")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise UserError(f"the video {media} is of a codec that this FFmpeg cannot decode; convert it")
            stream.thread_type = "AUTO"
            stream.codec_context.options = {"err_detect": "explode"}
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"the video {media} cannot be decoded ({error.strerror}); it is damaged or no video") from error


def decode(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """The frames from the file's beginning to its end, or to an `av.FFmpegError` at a damaged place.

    A recording may begin in the middle of a group of pictures; it is read from its first whole picture on.
    """
    begun = False
    damage: av.FFmpegError | None = None
    for packet in container.demux(stream):
        try:
            for frame in decode_packet(packet):
                begun = True
                yield frame
        except av.InvalidDataError as error:
            if begun:
                raise
            damage = damage or error
    if damage is not None and not begun:
        raise damage


def decode_packet(packet: av.Packet) -> Iterator[av.VideoFrame]:
    """The frames that a packet completes; an `av.FFmpegError` if the decoder reports an error, or painted over one."""
    for frame in packet.decode():
        assert isinstance(frame, av.VideoFrame)
        if frame.is_corrupt:
            raise av.InvalidDataError(_INVALID_DATA, "a picture is incomplete")
        yield frame


def frame_rate(stream: av.VideoStream, path: Readable) -> float:
    """Frames per second, on average."""
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise UserError(f"{path} does not say how many frames per second it has; remux it with a frame rate")
    return float(rate)


def stack(pictures: list[NDArray[np.uint8]], path: Readable) -> NDArray[np.uint8]:
    """Frames `H W 3` as one array `T H W 3`; refused if the video changes its size on the way."""
    shapes = {image.shape[:2] for image in pictures}
    if len(shapes) > 1:
        sizes = " and ".join(f"{width}x{height}" for height, width in sorted(shapes))
        raise UserError(f"the video {path} changes its size ({sizes}); ask for one size, or cut it where it changes")
    return np.stack(pictures)


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns that bring the stored picture upright."""
    return round(frame.rotation / 90) % 4


def shown_size(frame: av.VideoFrame) -> tuple[int, int]:
    """(H, W) of a frame once it is upright."""
    return (frame.width, frame.height) if _quarter_turns(frame) % 2 else (frame.height, frame.width)


def picture(frame: av.VideoFrame, size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """One frame as `H W 3`, scaled while still in the codec's own format (fast), turned, and cropped."""
    turns = _quarter_turns(frame)
    if size is None:
        return np.rot90(frame.reformat(format="rgb24").to_ndarray().astype(np.uint8, copy=False), turns)
    height, width = shown_size(frame)
    scale = max(size[0] / height, size[1] / width)
    covering = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    stored = covering[::-1] if turns % 2 else covering
    # AREA averages what it shrinks, so that fine texture does not turn into moire.
    scaled = frame.reformat(
        height=stored[0], width=stored[1], format="rgb24", interpolation="AREA" if scale < 1 else "BICUBIC"
    )
    upright = np.rot90(scaled.to_ndarray().astype(np.uint8, copy=False), turns)
    top, left = (covering[0] - size[0]) // 2, (covering[1] - size[1]) // 2
    return upright[top : top + size[0], left : left + size[1]]


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
        for index, image in enumerate(chain([first], pictures)):
            container.mux(stream.encode(_to_frame(image, shape, index)))
        container.mux(stream.encode(None))


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


def _to_frame(image: ArrayLike, shape: tuple[int, ...], index: int) -> av.VideoFrame:
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.shape != shape or array.ndim != 3 or array.shape[2] != 3:
        raise UserError(
            f"frame {index} is {array.dtype} {array.shape}; all must be uint8 H W 3 like the first, {shape}"
        )
    even = np.pad(array, ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0)), mode="edge")
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
    converted = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
    converted.pts = index
    return converted
