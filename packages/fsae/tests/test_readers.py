"""Clips by time: every way into a file gives the frames that decoding all of it gives."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from fsae.data import readers
from fsae.data.config import Sampling
from fsae.data.media import Media
from fsae.data.readers import ShortVideo, draw_clip, frame_times, read_clip
from fsae.data.video import VideoInfo, probe
from fsae.errors import UserError

COUNT, RATE = 90, 8

CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "closed": ("libx264", {"x264-params": "keyint=12:bframes=2:scenecut=0"}),
    "open": ("libx264", {"x264-params": "keyint=12:open-gop=1:bframes=3:b-adapt=0:scenecut=0"}),
    "pyramid": (
        "libx264",
        {"x264-params": "keyint=16:open-gop=1:bframes=7:b-adapt=0:scenecut=0:b-pyramid=normal:ref=4"},
    ),
    "refresh": ("libx264", {"x264-params": "keyint=12:intra-refresh=1:bframes=0"}),
    "one-key": ("libx264", {"x264-params": "keyint=infinite:bframes=3"}),
    "mpeg2": ("mpeg2video", {"bf": "2", "g": "12"}),
    "mpeg4": ("mpeg4", {"bf": "2", "g": "12"}),
}
FILES = [(codec, "mp4") for codec in CODECS]
FILES += [(codec, suffix) for codec in ("open", "pyramid", "mpeg2") for suffix in ("mkv", "ts")]
FILES += [("open", "avi"), ("mpeg4", "avi")]


def pictures(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """A landscape that pans, so that frames lean on each other, told apart by where they are in it."""
    small = np.random.default_rng(0).integers(0, 256, (4, 8 + count // 4, 3), dtype=np.uint8)
    wide = np.asarray(Image.fromarray(small).resize((width + 3 * count, height), Image.Resampling.BICUBIC))
    return np.stack([wide[:, 3 * i : 3 * i + width] for i in range(count)])


def encode(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    milliseconds: Sequence[int] | None = None,
) -> Path:
    """Write frames at RATE a second, or each at its time."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=RATE, options=options or {})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24").reformat(format="yuv420p")
            frame.pts = i if milliseconds is None else milliseconds[i]
            frame.time_base = Fraction(1, RATE) if milliseconds is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def brute_force(path: Path) -> tuple[np.ndarray, list[Fraction]]:
    """All frames and their times since the first, by decoding the whole file; at a constant rate for AVI."""
    with av.open(str(path)) as container:
        decoded = list(container.decode(video=0))
    if path.suffix == ".avi":
        times = [Fraction(i, RATE) for i in range(len(decoded))]
    else:
        times = [(f.pts - decoded[0].pts) * f.time_base for f in decoded]  # type: ignore[operator]
    return np.stack([f.to_ndarray(format="rgb24") for f in decoded]), times


def shown(times: Sequence[Fraction], time: float) -> int:
    """The frame that began last at or before a time, with a millisecond of grace."""
    return max(i for i, begin in enumerate(times) if begin <= Fraction(time) + Fraction(1, 1000))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder, frames = tmp_path_factory.mktemp("videos"), pictures(COUNT)
    made = {}
    for codec, suffix in FILES:
        name, options = CODECS[codec]
        made[codec, suffix] = encode(folder / f"{codec}.{suffix}", frames, name, options)
    return made


@pytest.mark.parametrize("key", FILES, ids="-".join)
def test_sought_clips_equal_brute_force(files: dict[tuple[str, str], Path], key: tuple[str, str]) -> None:
    path = files[key]
    frames, times = brute_force(path)
    assert len(frames) == COUNT and times == sorted(times)
    starts = [0.0, 0.06, 2.5, *np.random.default_rng(1).uniform(2, COUNT / RATE - 0.5, 3), 88 / RATE]
    for start in starts:
        first = shown(times, start)
        count = min(5, COUNT - first)
        clip, begins = read_clip(path, Sampling(count), start)
        assert np.array_equal(clip, frames[first : first + count]), (start, first)
        assert begins == [float(time) for time in times[first : first + count]]
    for start, fps in [(0.0, 3.0), (4.3, 3.0), (6.01, 20.0)]:
        wanted = [shown(times, start + k / fps) for k in range(6)]
        clip, begins = read_clip(path, Sampling(6, fps=fps), start)
        assert begins == [float(times[i]) for i in wanted]
        assert np.array_equal(clip, frames[wanted])
    assert frame_times(path) == [float(time) for time in times]


def test_open_groups_need_the_care(files: dict[tuple[str, str], Path]) -> None:
    """The control: a plain seek and decode does give other frames here than decoding from the start."""
    path = files["open", "mp4"]
    frames, times = brute_force(path)
    wrong = 0
    for number in range(20, 80):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            container.seek(int(times[number] / stream.time_base), stream=stream)  # type: ignore[operator]
            got = next(container.decode(stream)).to_ndarray(format="rgb24")
            wrong += not np.array_equal(got, frames[number])
    assert wrong > 30


def test_seeks_read_only_what_they_need(files: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    actual = readers.open_video

    def count(media: Media) -> Any:
        opened.append(media.path)
        return actual(media)

    monkeypatch.setattr(readers, "open_video", count)
    read_clip(files["open", "mp4"], Sampling(3), 9.0)
    assert len(opened) == 1  # the seek sufficed
    read_clip(files["one-key", "mp4"], Sampling(3), 9.0)
    assert len(opened) == 2
    monkeypatch.setattr(readers, "_sought", lambda *_: None)
    frames, _ = brute_force(files["open", "mp4"])
    assert np.array_equal(read_clip(files["open", "mp4"], Sampling(3), 9.0)[0], frames[72:75])
    assert len(opened) == 4  # no seek sufficed: read again from the beginning


def test_stride_takes_every_other_frame(files: dict[tuple[str, str], Path]) -> None:
    frames, times = brute_force(files["open", "mp4"])
    clip, _ = read_clip(files["open", "mp4"], Sampling(4, stride=3), 3.0)
    assert np.array_equal(clip, frames[24:36:3])
    clip, begins = read_clip(files["open", "mp4"], Sampling(4, fps=4.0, stride=2), 3.0)
    assert begins == [float(times[i]) for i in (24, 28, 32, 36)]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rates_are_sampled_by_time(tmp_path: Path, suffix: str) -> None:
    gaps = np.random.default_rng(3).choice([20, 33, 50, 120, 700], 60)
    path = encode(tmp_path / f"a.{suffix}", pictures(60), milliseconds=[0, *np.cumsum(gaps)[:-1].tolist()])
    frames, times = brute_force(path)
    assert len({b - a for a, b in pairwise(times)}) > 3
    for start, fps in [(0.0, 10.0), (0.333, 24.0), (3.017, 5.0)]:
        wanted = [shown(times, start + k / fps) for k in range(16)]
        clip, begins = read_clip(path, Sampling(16, fps=fps), start)
        assert begins == [float(times[i]) for i in wanted]
        assert np.array_equal(clip, frames[wanted])
    by_index = [shown(times, 0) + k for k in range(16)]
    assert [shown(times, k / 10) for k in range(16)] != by_index  # index and time differ: the test tells


def test_gifs_keep_their_delays(tmp_path: Path) -> None:
    levels = [0, 60, 120, 180, 240]
    images = [Image.new("L", (16, 16), level) for level in levels]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=[100, 300, 100, 500, 100])
    clip, _ = read_clip(tmp_path / "a.gif", Sampling(10, fps=10))
    assert clip[:, 0, 0, 0].tolist() == [0, 60, 60, 60, 120, 180, 180, 180, 180, 180]


def test_a_span_bounds_the_clip(files: dict[tuple[str, str], Path]) -> None:
    path = files["closed", "mp4"]
    span = Media(path, start=4.0, end=5.0)
    assert frame_times(span) == [i / RATE for i in range(32, 40)]
    assert read_clip(span, Sampling(8))[1] == frame_times(span)
    assert read_clip(span, Sampling(20, fps=20))[1][-1] == 39 / RATE
    with pytest.raises(ShortVideo, match="has 8 frames from 4 s on, 9 are wanted"):
        read_clip(span, Sampling(9))
    with pytest.raises(ShortVideo, match="has 20 frames"):
        read_clip(span, Sampling(21, fps=20))
    info = probe(path)
    for draw in (0.0, 0.5, 0.99):
        first = 32 + int(draw * 4)
        assert np.array_equal(
            draw_clip(span, info, draw, Sampling(5))[0], read_clip(path, Sampling(5), first / RATE)[0]
        )
    with pytest.raises(ShortVideo, match="it has 8 frames, 9 are wanted"):
        draw_clip(span, info, 0.0, Sampling(9))
    with pytest.raises(ShortVideo, match="it has 1 s, 2 s are wanted"):
        draw_clip(span, info, 0.0, Sampling(8, fps=4))


@pytest.mark.parametrize("fps", [None, 4.0])
def test_draws_reach_the_whole_file_and_no_further(files: dict[tuple[str, str], Path], fps: float | None) -> None:
    path = files["closed", "mp4"]
    frames, _ = brute_force(path)
    info = probe(path)
    (first, _), (last, _) = (draw_clip(Media(path), info, draw, Sampling(5, fps)) for draw in (0.0, 1 - 1e-9))
    assert np.array_equal(first[0], frames[0])
    assert np.array_equal(last[-1], frames[-1] if fps is None else frames[-2])


def test_a_header_that_promises_too_much_is_not_believed(files: dict[tuple[str, str], Path]) -> None:
    path = files["open", "mkv"]
    frames, _ = brute_force(path)
    lie = VideoInfo(400, 32, 48, float(RATE))
    assert np.array_equal(draw_clip(Media(path), lie, 0.999, Sampling(5))[0], frames[-5:])
    assert np.array_equal(draw_clip(Media(path), lie, 0.999, Sampling(5, fps=8))[0][0], frames[-6])
    with pytest.raises(ShortVideo, match="it has 90 frames, 91 are wanted"):
        draw_clip(Media(path), lie, 0.0, Sampling(91))


@pytest.mark.parametrize("start", [11.3, 40.0])
def test_beyond_the_end_there_is_nothing(files: dict[tuple[str, str], Path], start: float) -> None:
    for key in (("open", "mp4"), ("open", "avi")):
        with pytest.raises(ShortVideo, match="has 0 frames"):
            read_clip(files[key], Sampling(1), start)
        with pytest.raises(ShortVideo, match="has 0 frames"):
            read_clip(files[key], Sampling(1, fps=3), start)


def test_sizes_are_covered_and_cropped(files: dict[tuple[str, str], Path]) -> None:
    clip, _ = read_clip(files["open", "mp4"], Sampling(2, size=(16, 16)), 5.0)
    whole, _ = read_clip(files["open", "mp4"], Sampling(2), 5.0)
    assert clip.shape == (2, 16, 16, 3)
    errors = [
        np.abs(clip - whole[:, :, left : left + 32].reshape(2, 16, 2, 16, 2, 3).mean((2, 4))).mean()
        for left in range(0, 17, 2)
    ]
    assert int(np.argmin(errors)) == 4 and errors[4] < 10


@pytest.mark.parametrize("changes", [{"frames": 0}, {"stride": 0}, {"fps": 0.0}, {"size": (0, 64)}])
def test_impossible_clips_are_refused(files: dict[tuple[str, str], Path], changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(changes))} is .*; it must be .*(1 or more|above 0)"):
        Sampling(**{"frames": 1, **changes})
    with pytest.raises(UserError, match="start is -1.0; it must be 0 or more"):
        read_clip(files["open", "mp4"], Sampling(1), -1.0)


# --- decord


def test_an_unknown_or_missing_reader_is_named(
    files: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match='reader is \'opencv\'; it must be "pyav" or "decord"'):
        Sampling(1, reader="opencv")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(UserError, match=r"decord is not installed; pip install 'fsae\[decord\]'"):
        read_clip(files["open", "mp4"], Sampling(1, reader="decord"))


class _Array:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def asnumpy(self) -> np.ndarray:
        return self.array


class _VideoReader:
    """decord's interface as the reader uses it, over PyAV; ``damaged_at`` makes it fail as decord does."""

    damaged_at = -1

    def __init__(self, file: Any, ctx: Any) -> None:
        with av.open(file) as container:
            stream = container.streams.video[0]
            self.fps = float(stream.average_rate or 0)
            decoded = list(container.decode(stream))
        self.frames = [f.to_ndarray(format="rgb24") for f in decoded]
        self.stamps = np.array([f.time for f in decoded], np.float32)
        self.position = 0

    def __len__(self) -> int:
        return len(self.frames)

    def get_avg_fps(self) -> float:
        return self.fps

    def get_frame_timestamp(self, numbers: range) -> np.ndarray:
        return np.stack([self.stamps[list(numbers)], self.stamps[list(numbers)]], 1)

    def next(self) -> _Array:
        if self.position == self.damaged_at:
            raise _DECORDError("avcodec_send_packet")
        self.position += 1
        return _Array(self.frames[self.position - 1])


class _DECORDError(Exception):
    pass


@pytest.fixture
def decord(monkeypatch: pytest.MonkeyPatch) -> type[_VideoReader]:
    """A stand-in, so that the reader is tested where decord has no wheel."""
    module: Any = ModuleType("decord")
    reader = type("VideoReader", (_VideoReader,), {})
    module.VideoReader, module.DECORDError, module.cpu = reader, _DECORDError, lambda index: index
    monkeypatch.setitem(sys.modules, "decord", module)
    return reader


@pytest.mark.parametrize("key", [("open", "mp4"), ("pyramid", "mkv"), ("open", "avi")], ids="-".join)
def test_decord_gives_what_pyav_gives(
    files: dict[tuple[str, str], Path], decord: type[_VideoReader], key: tuple[str, str]
) -> None:
    path = files[key]
    for start, fps in [(0.0, None), (5.06, 3.0), (11.0, None)]:
        ours, begins = read_clip(path, Sampling(2 if start > 10 else 5, fps=fps), start)
        theirs, times = read_clip(path, Sampling(len(ours), fps=fps, reader="decord"), start)
        assert np.array_equal(ours, theirs)
        assert times == pytest.approx(begins, abs=1e-5)
    for start in (11.3, 40.0):
        with pytest.raises(ShortVideo):
            read_clip(path, Sampling(1, reader="decord"), start)


def test_decord_says_what_it_cannot_read(
    files: dict[tuple[str, str], Path], decord: type[_VideoReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="decord gives wrong frames of MPEG-TS"):
        read_clip(files["open", "ts"], Sampling(1, reader="decord"))
    monkeypatch.setattr(decord, "damaged_at", 30)
    path = files["open", "mp4"]
    assert len(frame_times(path, "decord")) == 30
    assert np.array_equal(
        draw_clip(Media(path), probe(path), 0.999, Sampling(5, reader="decord"))[0],
        read_clip(path, Sampling(5), 25 / RATE)[0],
    )
