"""Videos: what is written is read back, frame by frame, and every failure is a sentence."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from fsae.data.video import (
    VideoInfo,
    check_video_target,
    probe,
    read_video,
    to_frames,
    to_video_tensor,
    write_video,
)
from fsae.errors import UserError


def smooth_frames(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames told apart by their brightness, 12 levels a frame, with a gradient across."""
    columns = np.linspace(0, 30, width)[None, None, :, None]
    levels = 20 + 12 * np.arange(count)[:, None, None, None]
    return np.broadcast_to(levels + columns, (count, height, width, 3)).astype(np.uint8)


def error(read: torch.Tensor, wanted: np.ndarray) -> int:
    return int(np.abs(read.numpy().astype(int) - wanted.astype(int)).max())


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".m4v", ".MP4"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    frames = smooth_frames(9)
    path = tmp_path / f"a{suffix}"
    write_video(path, frames, fps=16)
    read, fps = read_video(path)
    assert read.dtype == torch.uint8
    assert fps == 16
    assert read.shape == (9, 32, 48, 3)
    assert error(read, frames) <= 3
    assert probe(path) == VideoInfo(frames=9, height=32, width=48, fps=16.0)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 40), (255, 255, 255)])
def test_colours_survive_and_are_tagged_as_encoded(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    frames = np.full((2, 32, 32, 3), colour, dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, fps=8)
    read, _ = read_video(tmp_path / "a.mp4")
    assert error(read, frames) <= 4
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)
        assert context.color_range == 1
        assert context.pix_fmt == "yuv420p"
        assert context.name == "h264"


def test_the_index_stands_in_front_and_metadata_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, smooth_frames(3), 16, {"comment": "a cat; seed 7", "prompt": "héllo", "steps": 8})
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(path)) as container:
        tags = container.metadata
        assert (tags["comment"], tags["prompt"], tags["steps"]) == ("a cat; seed 7", "héllo", "8")


@pytest.mark.parametrize("start, count", [(0, 1), (3, 4), (11, 1), (5, None)])
def test_exactly_the_asked_frames_come(tmp_path: Path, start: int, count: int | None) -> None:
    frames = smooth_frames(12)
    write_video(tmp_path / "a.mp4", frames, 24)
    read, _ = read_video(tmp_path / "a.mp4", start=start, frames=count)
    wanted = frames[start:] if count is None else frames[start : start + count]
    assert read.shape[0] == len(wanted)
    assert error(read, wanted) <= 3  # a neighbouring frame would differ by 12


@pytest.mark.parametrize("start, count", [(0, 13), (12, None), (12, 1), (40, 2), (-1, 2), (0, 0)])
def test_frames_beyond_the_end_are_refused(tmp_path: Path, start: int, count: int | None) -> None:
    write_video(tmp_path / "a.mp4", smooth_frames(12), 24)
    with pytest.raises(UserError, match=rf"has {max(12 - start, 0)} frames from frame {start} on|at least one"):
        read_video(tmp_path / "a.mp4", start=start, frames=count)


@pytest.mark.parametrize("height, width", [(31, 48), (32, 47), (1, 1), (33, 33)])
def test_odd_sizes_grow_by_a_repeated_edge(tmp_path: Path, height: int, width: int) -> None:
    frames = smooth_frames(2, height, width)
    write_video(tmp_path / "a.mp4", frames, 16)
    read, _ = read_video(tmp_path / "a.mp4")
    even = (height + height % 2, width + width % 2)
    assert tuple(read.shape[1:3]) == even
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    assert error(read, padded) <= 4


def test_resizing_covers_and_crops_around_the_centre(tmp_path: Path) -> None:
    frames = np.zeros((1, 64, 128, 3), dtype=np.uint8)
    frames[:, :, 32:96] = 200  # the middle square
    write_video(tmp_path / "a.mp4", frames, 16)
    read, _ = read_video(tmp_path / "a.mp4", size=(32, 32))
    assert read.shape == (1, 32, 32, 3)
    assert read[:, 2:-2, 2:-2].min() > 190
    read, _ = read_video(tmp_path / "a.mp4", size=(128, 256))
    assert read.shape == (1, 128, 256, 3)
    assert read[0, 64, 128].min() > 190
    assert read[0, 64, 8].max() < 10


def with_rotation(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Write a display matrix into an mp4's track header, as telephones do."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # version and flags, times and ids, reserved, layer ...
    a, b, c, d = (value << 16 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("matrix", "clockwise"), [((0, 1, -1, 0), 1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 3), ((1, 0, 0, 1), 0)]
)
def test_rotation_metadata_is_honoured(tmp_path: Path, matrix: tuple[int, int, int, int], clockwise: int) -> None:
    stored = np.zeros((1, 32, 64, 3), dtype=np.uint8)
    stored[:, :16, :32] = 200  # the top left quarter is bright
    path = tmp_path / "a.mp4"
    write_video(path, stored, 16)
    with_rotation(path, matrix)
    shown = np.rot90(stored, -clockwise, axes=(1, 2))
    read, _ = read_video(path)
    assert read.shape == shown.shape
    assert np.abs(read.numpy().astype(int) - shown).mean() < 3
    info = probe(path)
    assert (info.height, info.width) == shown.shape[1:3]
    small, _ = read_video(path, size=(shown.shape[1] // 2, shown.shape[2] // 2))
    assert np.abs(small.numpy().astype(int) - shown[:, ::2, ::2]).mean() < 6


def test_frames_are_counted_where_the_container_does_not_say(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", smooth_frames(7), 16)
    with av.open(str(tmp_path / "a.mkv")) as container:
        assert container.streams.video[0].frames == 0  # the case at hand
    assert probe(tmp_path / "a.mkv").frames == 7


def test_fractional_rates(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", smooth_frames(3), 30_000 / 1001)
    assert probe(tmp_path / "a.mp4").fps == pytest.approx(30_000 / 1001, rel=1e-6)


def test_bad_targets_are_refused_before_the_first_frame_is_taken(tmp_path: Path) -> None:
    def frames() -> Iterator[np.ndarray]:
        raise AssertionError("work was done")
        yield

    (tmp_path / "folder.mp4").mkdir()
    for name, words in [
        ("a.avi", "ends in .mp4"),
        ("a", "ends in .mp4"),
        ("folder.mp4", "it is a folder"),
        ("nowhere/a.mp4", "no folder"),
    ]:
        with pytest.raises(UserError, match=words):
            write_video(tmp_path / name, frames(), 16)
        with pytest.raises(UserError, match=words):
            check_video_target(tmp_path / name)
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="positive number"):
            write_video(tmp_path / "a.mp4", frames(), fps)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.mp4"]


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([], "at least one frame"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 10, 3), np.uint8)], "frame 1 is uint8"),
        ([np.zeros((8, 8, 3), np.float32)], "frame 0 is float32"),
        ([np.zeros((8, 8), np.uint8)], "frame 0 is uint8"),
    ],
    ids=["none", "sizes", "type", "grey"],
)
def test_bad_frames_leave_nothing_behind(tmp_path: Path, frames: list[np.ndarray], words: str) -> None:
    with pytest.raises(UserError, match=words):
        write_video(tmp_path / "a.mp4", frames, 16)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_generator_leaves_nothing_behind(tmp_path: Path) -> None:
    def frames() -> Iterator[np.ndarray]:
        yield np.zeros((8, 8, 3), np.uint8)
        raise RuntimeError("the decoder stopped")

    with pytest.raises(RuntimeError, match="the decoder stopped"):
        write_video(tmp_path / "a.mp4", frames(), 16)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_videos_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("this is not a video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    write_video(tmp_path / "whole.mp4", smooth_frames(5), 16)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:600])
    for name, words in [
        ("none.mp4", "there is no video file"),
        (".", "is not a file"),
        ("text.mp4", "cannot be decoded"),
        ("empty.mp4", "cannot be decoded"),
        ("cut.mp4", "cannot be decoded"),
    ]:
        for reader in (probe, read_video):
            with pytest.raises(UserError, match=words):
                reader(tmp_path / name)


def test_a_video_cut_in_its_data_gives_no_false_frames(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", noise, 16)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(UserError, match=r"frames from frame 0 on, where 8 are|cannot be decoded"):
        read_video(tmp_path / "a.mp4", frames=8)


def test_tensor_conversions_are_exact_and_clamp() -> None:
    frames = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.reshape(1, 16, 16, 3)
    video = to_video_tensor(frames)
    assert video.shape == (3, 1, 16, 16)
    assert video.dtype == torch.float32
    assert (video.min(), video.max()) == (-1, 1)
    assert torch.equal(to_frames(video), frames)
    assert torch.equal(to_frames(video.to(torch.float64)), frames)
    assert to_frames(torch.tensor([-3.0, 0.0, 3.0]).reshape(3, 1, 1, 1)).flatten().tolist() == [0, 128, 255]
    assert to_video_tensor(frames.numpy()).shape == (3, 1, 16, 16)  # type: ignore[arg-type]
