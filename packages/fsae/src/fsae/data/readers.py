"""Clips of videos by the time of their frames, through PyAV or decord.

Time is counted in seconds from a file's first frame and comes from the presentation times of the frames, so that a
video of variable frame rate is sampled as it is shown. At time t the frame is shown that began last at or before t; a
millisecond of grace allows for clocks that are no finer (Matroska's).

PyAV seeks: to a key frame before the wanted time, and decodes forward from there. What follows the key frame in the
file but precedes it in time (the leading pictures of an open group) leans on frames before it and is dropped. Where
the times show that the seek came out too late, it is repeated further back, at last from the beginning; so the result
is always that of decoding the whole file. decord reads sequentially from the beginning, because its own seeks give
wrong frames on open groups of pictures; MPEG-TS it reads wrongly even so, which is refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from numpy.typing import NDArray

from fsae.data.config import Reader, Sampling
from fsae.data.media import Media, Readable, as_media, check_file
from fsae.data.video import VideoInfo, decode, decode_packet, frame_rate, open_video, picture, stack
from fsae.errors import UserError, require

GRACE = Fraction(1, 1000)
# Decoding so many seconds costs less than a seek that may have to be repeated.
_NEAR = Fraction(2)


class DamagedVideo(UserError):
    """A video is damaged where it is read; other parts of it may be whole."""


class ShortVideo(UserError):
    """A video ends before the last frame that is wanted."""


class Timed(NamedTuple):
    """A frame, when it begins, and how long it is shown if none follows (seconds)."""

    begin: Fraction
    interval: Fraction
    frame: av.VideoFrame


def read_clip(video: Readable, sampling: Sampling, start: float | None = None) -> tuple[NDArray[np.uint8], list[float]]:
    """Decode a clip by time.

    Args:
        video: The file. If it is a `Media` with a span, the clip lies within it.
        sampling: Which frames, in which size.
        start: Seconds into the file; the first frame is the one shown then. None: where the span begins.

    Returns:
        uint8 `T H W 3`, RGB, upright, and when each frame begins, in seconds.

    Raises:
        DamagedVideo: the file is damaged between the key frame before `start` and the clip's end.
        ShortVideo: it, or its span, ends before the clip does.
        UserError: no such file, no video, or a missing reader.
    """
    media, frames, fps, stride = as_media(video), sampling.frames, sampling.fps, sampling.stride
    first = Fraction(media.start if start is None else start)
    require(first >= 0, "start", start, "0 or more")
    end = None if media.end is None else Fraction(media.end)

    def select(reader: Callable[[Media, Fraction], Iterator[Timed]]) -> list[Timed]:
        shown = reader(media, first)
        clip = _every(shown, stride, end) if fps is None else _at(shown, first, stride / Fraction(fps), end)
        return list(islice(clip, frames))

    try:
        chosen = select(_READERS[sampling.reader])
    except _NoTimes:
        chosen = select(_by_index)
    if len(chosen) < frames:
        raise ShortVideo(f"{media} has {len(chosen)} frames from {float(first):g} s on, {frames} are wanted")
    # A frame that is shown for long is taken several times, and converted once.
    pictures = {shown.begin: picture(shown.frame, sampling.size) for shown in chosen}
    return stack([pictures[shown.begin] for shown in chosen], media), [float(shown.begin) for shown in chosen]


def draw_clip(media: Media, info: VideoInfo, draw: float, sampling: Sampling) -> tuple[NDArray[np.uint8], list[float]]:
    """A clip that starts at a share `draw` in [0, 1) of the places where it can.

    The places are those that `info` promises. Where the file then turns out to be damaged or shorter, they are those
    before its first damage or its true end, so that what is whole is used.

    Returns:
        As `read_clip`.

    Raises:
        ShortVideo: the clip does not fit.
        DamagedVideo: it does not fit in what is before the damage.
        UserError: as `read_clip`.
    """
    promised, spare = check_length(media, info, sampling)
    fps, span = sampling.fps, sampling.span
    start = media.start + (draw * spare if fps is not None else int(draw * (promised - span + 1)) / info.fps)
    try:
        return read_clip(media, sampling, start)
    except (DamagedVideo, ShortVideo) as error:
        times = frame_times(media, sampling.reader)
        if not times:
            raise
        damaged = isinstance(error, DamagedVideo)
        try:
            if fps is None:
                start = times[int(draw * (_enough(len(times), span) - span + 1))]
            else:
                end = times[-1] if damaged else times[-1] + 1 / info.fps
                start = media.start + draw * _spare(end - media.start, span / fps)
        except ShortVideo as short:
            raise type(error)(f"{error}; before, {short}" if damaged else str(short)) from error
        return read_clip(media, sampling, start)


def check_length(media: Media, info: VideoInfo, sampling: Sampling) -> tuple[int, float]:
    """The frames of a file or its span, and the seconds by which a clip of `fps` can be moved in it (0 without), as
    `info` promises; ShortVideo if the clip does not fit."""
    promised, have, need = room(media.start, media.end, info.frames, info.fps, sampling)
    if sampling.fps is None:
        return _enough(int(promised), need), 0.0
    return int(promised), _spare(float(have), need)


def room(start: Any, end: Any, frames: Any, fps: Any, sampling: Sampling) -> tuple[Any, Any, Any]:
    """What there is for a clip in a file, or in each of many, given by its span, frames and rate.

    Returns:
        The frames of the file or its span; what there is and what a clip needs, frames, or seconds with `fps`.
    """
    length = np.fmin(np.nan if end is None else end, frames / fps) - start
    promised = np.maximum(0, np.rint(length * fps))
    if sampling.fps is None:
        return promised, promised, sampling.span
    return promised, length, sampling.span / sampling.fps


def _enough(length: int, wanted: int) -> int:
    if length < wanted:
        raise ShortVideo(f"it has {length} frames, {wanted} are wanted")
    return length


def _spare(length: float, wanted: float) -> float:
    if length < wanted - GRACE:
        raise ShortVideo(f"it has {length:.3g} s, {wanted:.3g} s are wanted")
    return max(0.0, length - wanted)


def frame_times(video: Readable, reader: Reader = "pyav") -> list[float]:
    """When each frame of a file, or of its span, begins, in seconds; of a damaged file, as far as it decodes. UserError
    for no such file, no video, or a missing reader."""
    media = as_media(video)

    def collect(reader: Callable[[Media, Fraction], Iterator[Timed]]) -> list[float]:
        times = []
        try:
            for shown in reader(media.file, Fraction(0)):
                if media.end is not None and shown.begin >= media.end - GRACE:
                    break
                if shown.begin >= media.start - GRACE:
                    times.append(float(shown.begin))
        except DamagedVideo:
            pass
        return times

    try:
        return collect(_READERS[reader])
    except _NoTimes:
        return collect(_by_index)


# --- which frames


def _every(shown: Iterable[Timed], stride: int, end: Fraction | None) -> Iterator[Timed]:
    """Every stride-th frame that begins before `end`."""
    for number, frame in enumerate(shown):
        if end is not None and frame.begin >= end - GRACE:
            return
        if number % stride == 0:
            yield frame


def _at(shown: Iterable[Timed], start: Fraction, period: Fraction, end: Fraction | None) -> Iterator[Timed]:
    """The frames shown at start, start + period, ... before `end`."""
    time, current = start, None
    for following in shown:
        while current is not None and time < following.begin - GRACE:
            if end is not None and time >= end - GRACE:
                return
            yield current
            time += period
        current = following
    if current is not None:
        last = current.begin + current.interval
        while time < (last if end is None else min(end, last)) - GRACE:
            yield current
            time += period


# --- PyAV


class _NoTimes(Exception):
    """The file's presentation times are missing or do not grow from frame to frame."""


@dataclass(frozen=True)
class _Window:
    """The wanted start in ticks of a stream's clock, without and with the grace; all of it in ticks of `tick` seconds.

    `origin` is the file's first frame, `interval` the average between two.
    """

    origin: int
    low: Fraction
    high: Fraction
    interval: Fraction
    tick: Fraction

    def timed(self, frames: Iterator[av.VideoFrame]) -> Iterator[Timed]:
        """Frames with their times; damage becomes a `DamagedVideo`."""
        try:
            for frame in frames:
                yield Timed((_pts(frame) - self.origin) * self.tick, self.interval * self.tick, frame)
        except av.FFmpegError as error:
            raise DamagedVideo(
                f"it is damaged at or after {float((self.high - self.origin) * self.tick):.3g} s"
            ) from error


def _by_pyav(media: Media, start: Fraction) -> Iterator[Timed]:
    """Frames in order, from the one shown at `start` on; none if the file ends before."""
    with open_video(media) as (container, stream):
        if not _has_times(container):
            raise _NoTimes
        decoded = decode(container, stream)
        first = next(decoded, None)
        if first is None:
            raise UserError(f"the video {media} holds no frame; give another file")
        window = _window(media, stream, _pts(first), start)
        if start <= _NEAR:
            yield from window.timed(_shown(chain([first], decoded), window))
            return
        frames = _sought(container, stream, window)
        if frames is not None:
            yield from window.timed(frames)
            return
    with open_video(media) as (container, stream):
        yield from window.timed(_shown(decode(container, stream), window))


_NO_TIMESTAMPS = 0x80  # FFmpeg's AVFMT_NOTIMESTAMPS


def _has_times(container: InputContainer) -> bool:
    """Whether a container keeps presentation times; AVI and bare streams do not, and FFmpeg's guesses are wrong."""
    return not (container.format.flags & _NO_TIMESTAMPS or container.format.name == "avi")


def _window(media: Media, stream: av.VideoStream, origin: int, start: Fraction) -> _Window:
    tick = stream.time_base
    if tick is None:
        raise _NoTimes
    interval = 1 / Fraction(frame_rate(stream, media)) / tick
    return _Window(origin, origin + (start - GRACE) / tick, origin + (start + GRACE) / tick, interval, tick)


def _shown(frames: Iterable[av.VideoFrame], window: _Window) -> Iterator[av.VideoFrame]:
    """Of frames in order: from the last one that begins by the window on, or from the very first; `_NoTimes` if a frame
    does not begin after the one before."""
    held: av.VideoFrame | None = None
    try:
        for frame in frames:
            if held is not None:
                if _pts(frame) <= _pts(held):
                    raise _NoTimes
                if _pts(frame) > window.high:
                    yield held
            held = frame
    except av.FFmpegError:
        # Of frames before the window the last is not known to be the one shown: others may be lost.
        if held is not None and _pts(held) >= window.low:
            yield held
        raise
    if held is not None and _pts(held) + window.interval > window.low:
        yield held


def _sought(container: InputContainer, stream: av.VideoStream, window: _Window) -> Iterator[av.VideoFrame] | None:
    """As `_shown`, from a key frame on; None if no seek is early enough and decodes."""
    target, back = int(window.high), int(1 / window.tick)
    while target > window.origin:
        try:
            frames = _shown(_after_key_frame(container, stream, target, window), window)
            first = next(frames, None)
        except av.FFmpegError:
            first = None
        if first is not None and _pts(first) <= window.high:
            return chain([first], frames)
        target, back = target - back, 2 * back
    return None


def _after_key_frame(
    container: InputContainer, stream: av.VideoStream, target: int, window: _Window
) -> Iterator[av.VideoFrame]:
    """Seek to `target`; frames from the key frame there on, none if that is beyond the window."""
    container.seek(target, stream=stream)
    key: int | None = None
    for packet in container.demux(stream):
        if packet.size:
            if packet.pts is None:
                raise _NoTimes
            if key is None:
                if not packet.is_keyframe:
                    continue
                key = packet.pts
                if key > window.high:
                    return
            if packet.pts < key:
                continue
        yield from decode_packet(packet)


def _pts(frame: av.VideoFrame) -> int:
    if frame.pts is None:
        raise _NoTimes
    return frame.pts


def _by_index(media: Media, start: Fraction) -> Iterator[Timed]:
    """As `_by_pyav`, for files without times: frame i of r frames a second begins at i / r."""
    with open_video(media) as (container, stream):
        interval = 1 / Fraction(frame_rate(stream, media))
        frames = enumerate(decode(container, stream))
        try:
            for number, frame in islice(frames, int((start + GRACE) / interval), None):
                yield Timed(number * interval, interval, frame)
        except av.FFmpegError as error:
            raise DamagedVideo(f"it is damaged after {float(start):.3g} s") from error


# --- decord


def _by_decord(media: Media, start: Fraction) -> Iterator[Timed]:
    """As `_by_pyav`, by decord.

    It cannot be told to report damage that its decoder can paint over, and rounds times to 32-bit floating point.
    """
    check_file(media, "video", "one video")
    if Path(media.name).suffix.lower() in _MPEG_TS:
        raise UserError(f"decord gives wrong frames of MPEG-TS such as {media}; use the reader pyav, or remux it")
    decord = _import_decord()
    number = -1
    with media.open() as file:
        try:
            video = decord.VideoReader(file if media.member else str(media.path), ctx=decord.cpu(0))
            interval = 1 / Fraction(video.get_avg_fps())
            times = _growing_times(video.get_frame_timestamp(range(len(video)))[:, 0], interval)
            first = max((i for i, time in enumerate(times) if time <= start + GRACE), default=0)
            for number, time in enumerate(times):
                array = video.next()
                if number > first or (number == first and (number + 1 < len(times) or start < time + interval)):
                    yield Timed(time, interval, av.VideoFrame.from_ndarray(array.asnumpy(), format="rgb24"))
        except (decord.DECORDError, StopIteration) as error:
            if number < 0:
                raise UserError(f"the video {media} cannot be decoded by decord; it is damaged or no video") from error
            raise DamagedVideo(f"it is damaged at {float(times[number]):.3g} s") from error


_MPEG_TS = (".ts", ".mts", ".m2ts")


def _growing_times(stamps: NDArray[np.float32], interval: Fraction) -> list[Fraction]:
    """Times from the first frame on; where they do not grow, those of a constant rate."""
    if len(stamps) > 1 and not (np.diff(stamps) > 0).all():
        return [i * interval for i in range(len(stamps))]
    return [Fraction(float(stamp)) - Fraction(float(stamps[0])) for stamp in stamps]


def _import_decord() -> Any:
    try:
        return importlib.import_module("decord")
    except ImportError:
        raise UserError("decord is not installed; pip install 'fsae[decord]', or use the reader pyav") from None


def check_reader(name: Reader) -> None:
    """UserError, before any work, if a reader is not installed."""
    if name == "decord":
        _import_decord()


_READERS: dict[Reader, Callable[[Media, Fraction], Iterator[Timed]]] = {"pyav": _by_pyav, "decord": _by_decord}
