"""A long video written in segments, and joined without encoding it again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av

from fsae.data.video import check_video_target
from fsae.errors import UserError
from fsae.storage.files import atomic_path


def join_videos(segments: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> None:
    """Join videos that `fsae.data.video.write_video` wrote with one size and frame rate, one after the other.

    The compressed pictures are copied as they are: the result holds the very pictures of the segments, and takes hardly
    longer than copying a file. UserError if `path` cannot be written, or a segment cannot be read.
    """
    check_video_target(path)
    try:
        with atomic_path(path) as temporary:
            options = {"movflags": "faststart"} if temporary.suffix.lower() != ".mkv" else {}
            with av.open(os.fspath(temporary), "w", options=options) as output:
                _copy(segments, output)
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"cannot write the video {path}: {error.strerror or error}") from error


def _copy(segments: Sequence[str | os.PathLike[str]], output: av.container.OutputContainer) -> None:
    """Mux all packets, each segment's times moved behind those before."""
    stream: av.VideoStream | None = None
    passed = Fraction(0)  # seconds
    for segment in segments:
        with av.open(os.fspath(Path(segment)), "r") as source:
            video = source.streams.video[0]
            if stream is None:
                stream = output.add_stream_from_template(video)
            offset = round(passed / _tick(video))
            for packet in source.demux(video):
                if packet.dts is None:  # the mark of the end
                    continue
                packet.pts = (packet.pts or 0) + offset
                packet.dts += offset
                packet.stream = stream
                output.mux(packet)
            passed += video.frames / Fraction(video.average_rate or 1)


def _tick(video: av.VideoStream) -> Fraction:
    assert video.time_base is not None  # mp4 states it
    return video.time_base
