"""Files as the world has them: damaged, cut, empty, turned, odd. What is whole is used; the rest is a sentence."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from fsae.data.config import Sampling
from fsae.data.datasets import VideoFolder
from fsae.data.media import Media
from fsae.data.readers import DamagedVideo, ShortVideo, draw_clip, frame_times, read_clip
from fsae.data.video import probe, read_video, stream_video, write_video
from fsae.errors import UserError

COUNT, RATE = 72, 8
H, W = 64, 96


def pictures(count: int, height: int = H, width: int = W) -> np.ndarray:
    small = np.random.default_rng(0).integers(0, 256, (8, 16 + count, 3), dtype=np.uint8)
    wide = np.asarray(Image.fromarray(small).resize((width + 3 * count, height), Image.Resampling.BICUBIC))
    return np.stack([wide[:, 3 * i : 3 * i + width] for i in range(count)])


def encode(path: Path, frames: np.ndarray, pixels: str = "yuv420p", options: str = "keyint=12:scenecut=0") -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=RATE, options={"x264-params": options})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        for i, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def damaged(path: Path, target: Path, position: float = 0.5, length: int = 1500) -> Path:
    """A copy with random bytes in its middle."""
    data = bytearray(path.read_bytes())
    begin = int(len(data) * position)
    data[begin : begin + length] = np.random.default_rng(5).integers(0, 256, length, dtype=np.uint8).tobytes()
    target.write_bytes(data)
    return target


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tmp_path_factory.mktemp("whole") / "whole.mp4", pictures(COUNT))


@pytest.mark.parametrize("position", [0.4, 0.5, 0.6])
def test_damage_in_the_middle_never_gives_false_frames(whole: Path, tmp_path: Path, position: float) -> None:
    """FFmpeg's concealment would: pictures that look like video but are made up (the control below)."""
    frames, _ = read_video(whole)
    path = damaged(whole, tmp_path / "a.mp4", position)
    times = frame_times(path)
    assert 12 <= len(times) < COUNT  # what is before the damage is found
    got = []
    with pytest.raises(UserError, match="cannot be decoded"):
        for frame in stream_video(path):
            got.append(frame)
    assert len(times) - 1 <= len(got) <= len(times)
    assert np.array_equal(np.stack(got), frames[: len(got)].numpy())
    with pytest.raises(UserError, match="cannot be decoded"):
        read_video(path)
    assert np.array_equal(read_video(path, frames=len(times) - 1)[0], frames[: len(times) - 1])
    with pytest.raises(DamagedVideo, match="is damaged"):
        read_clip(path, Sampling(24), times[-6])


def test_without_the_decoders_report_damage_would_pass(whole: Path, tmp_path: Path) -> None:
    frames = read_video(whole)[0].numpy().astype(int)
    passed = 0
    for position in (0.4, 0.45, 0.5, 0.55, 0.6):
        try:
            with av.open(str(damaged(whole, tmp_path / "a.mp4", position))) as container:
                decoded = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        except av.FFmpegError:
            continue
        passed += any(np.abs(made - true).mean() > 3 for made, true in zip(decoded, frames, strict=False))
    assert passed


@pytest.mark.parametrize("fps", [None, 4.0])
def test_every_draw_of_a_damaged_video_is_a_clip_of_whole_frames(
    whole: Path, tmp_path: Path, fps: float | None
) -> None:
    frames, _ = read_video(whole)
    path = damaged(whole, tmp_path / "a.mp4")
    before = len(frame_times(path))
    step = 1 if fps is None else int(RATE / fps)
    seen = set()
    for draw in np.linspace(0, 0.999, 13):
        clip, _ = draw_clip(Media(path), probe(path), float(draw), Sampling(5, fps))
        matches = [
            i for i in range(COUNT - 4 * step) if np.array_equal(clip, frames[i : i + 4 * step + 1 : step].numpy())
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert min(seen) == 0 and any(i >= before for i in seen)  # what is after the damage is used, too
    with pytest.raises(DamagedVideo, match="is damaged .*; before, it has"):
        draw_clip(Media(path), probe(path), 0.0, Sampling(COUNT if fps is None else COUNT // 2, fps))


def test_a_truncated_file_is_used_as_far_as_it_goes(whole: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "front.mp4", read_video(whole)[0].numpy(), RATE)  # its index is in front
    data = (tmp_path / "front.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 6 // 10])
    frames, _ = read_video(tmp_path / "front.mp4")
    path = tmp_path / "cut.mp4"
    assert probe(path).frames == COUNT  # the index promises what is gone
    assert 10 < len(frame_times(path)) < COUNT
    for draw in (0.0, 0.4, 0.7, 0.999):
        clip, _ = draw_clip(Media(path), probe(path), draw, Sampling(5))
        assert any(np.array_equal(clip, frames[i : i + 5].numpy()) for i in range(COUNT - 4))
    (tmp_path / "no_index.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])  # its index was at the end
    with pytest.raises(UserError, match="cannot be decoded"):
        read_clip(tmp_path / "no_index.mp4", Sampling(1))


def test_a_video_without_frames_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = H, W, "yuv420p"
        container.start_encoding()
    for read in (probe, read_clip_of_one, frame_times, lambda p: list(stream_video(p)) or read_video(p)):
        with pytest.raises(UserError, match="holds no frame|has 0 frames|cannot be decoded"):
            read(path)
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        audio: Any = container.add_stream("aac", rate=16_000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16_000
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    with pytest.raises(UserError, match="holds no video"):
        read_clip_of_one(tmp_path / "sound.mkv")


def read_clip_of_one(path: Path) -> Any:
    return read_clip(path, Sampling(1))


def test_a_recording_that_begins_within_a_group_is_read_from_its_first_whole_picture(tmp_path: Path) -> None:
    frames = pictures(48)
    path = encode(tmp_path / "a.ts", frames, options="keyint=12:scenecut=0:bframes=2")
    reference = read_video(path)[0].numpy()
    data = path.read_bytes()
    (tmp_path / "cut.ts").write_bytes(data[len(data) // 10 // 188 * 188 :])
    decoded = np.stack(list(stream_video(tmp_path / "cut.ts")))
    assert 24 <= len(decoded) < 48
    assert np.array_equal(decoded, reference[-len(decoded) :])
    assert np.array_equal(read_clip(tmp_path / "cut.ts", Sampling(5), 2.5)[0], decoded[20:25])


def test_ten_bits_become_eight(tmp_path: Path) -> None:
    frames = pictures(32)
    deep, plain = encode(tmp_path / "a.mp4", frames, "yuv420p10le"), encode(tmp_path / "b.mp4", frames)
    with av.open(str(deep)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p10le"
    ten, eight = read_clip(deep, Sampling(8), 3.0)[0], read_clip(plain, Sampling(8), 3.0)[0]
    assert ten.dtype == np.uint8
    other = np.abs(ten.astype(int) - read_clip(plain, Sampling(8), 2.0)[0]).mean()  # another second of it
    assert np.abs(ten.astype(int) - eight).mean() < other / 3


@pytest.mark.parametrize(("height", "width"), [(63, 95), (65, 97), (1, 1), (2, 301)])
def test_odd_sizes(tmp_path: Path, height: int, width: int) -> None:
    path = encode(tmp_path / "a.mp4", pictures(4, height, width), "yuv444p")
    assert (probe(path).height, probe(path).width) == (height, width)
    assert read_clip(path, Sampling(4))[0].shape == (4, height, width, 3)
    assert read_clip(path, Sampling(4, size=(64, 128)))[0].shape == (4, 64, 128, 3)


def test_turned_videos_stand_upright(whole: Path, tmp_path: Path) -> None:
    data = bytearray(whole.read_bytes())
    start = data.index(b"tkhd") + 44
    data[start : start + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(data)
    assert (probe(tmp_path / "a.mp4").height, probe(tmp_path / "a.mp4").width) == (W, H)
    turned, _ = read_clip(tmp_path / "a.mp4", Sampling(5), 4.0)
    assert np.array_equal(turned, np.rot90(read_clip(whole, Sampling(5), 4.0)[0], -1, axes=(1, 2)))


def test_a_video_that_changes_its_size_is_read_at_one(tmp_path: Path) -> None:
    data = b"".join(
        encode(tmp_path / f"{h}.ts", pictures(6, h, W), options="keyint=6:scenecut=0:bframes=0").read_bytes()
        for h in (64, 32)
    )
    (tmp_path / "a.ts").write_bytes(data)
    with pytest.raises(UserError, match="changes its size"):
        read_video(tmp_path / "a.ts")
    assert read_video(tmp_path / "a.ts", size=(32, 32))[0].shape == (12, 32, 32, 3)


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_list_of_bad_media_is_never_fatal(whole: Path, tmp_path: Path) -> None:
    damaged(whole, tmp_path / "damaged.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    encode(tmp_path / "short.mp4", pictures(3))
    (tmp_path / "folder.mp4").mkdir()
    names = ["missing.mp4", "damaged.mp4", "empty.mp4", str(whole), "short.mp4", "folder.mp4"]
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(names) + "\n")
    clips = VideoFolder(tmp_path / "list.csv", Sampling(5, size=(32, 32)))
    videos = [clips.sample(i, epoch)["video"] for epoch in range(3) for i in range(len(names))]
    assert all(video.shape == (3, 5, 32, 32) for video in videos)
    assert {media.name for media in clips.skipped} == {"missing.mp4", "empty.mp4", "short.mp4", "folder.mp4"}
    assert clips.summary().startswith("4 file(s) skipped: ")


@pytest.mark.filterwarnings("ignore:skipped")
def test_what_was_met_before_does_not_change_a_sample(whole: Path, tmp_path: Path) -> None:
    """A clip too long for what is before the damage fits after it, for some draws: others must not forestall these."""
    damaged(whole, tmp_path / "a.mp4", 0.35)
    (tmp_path / "b.mp4").write_bytes(whole.read_bytes())
    assert len(frame_times(tmp_path / "a.mp4")) < 30
    one_by_one = [VideoFolder(tmp_path, Sampling(30, size=(8, 8))).sample(0, epoch)["video"] for epoch in range(5)]
    clips = VideoFolder(tmp_path, Sampling(30, size=(8, 8)))
    in_a_row = [clips.sample(0, epoch)["video"] for epoch in range(5)]
    assert all(a.equal(b) for a, b in zip(one_by_one, in_a_row, strict=True))
    own = [any(v.equal(clips.sample(1, e)["video"]) for e in (epoch,)) for epoch, v in enumerate(in_a_row)]
    assert any(own) and not all(own)  # both happened: replaced, and used


def test_streams_give_single_frames_as_read_video_does(whole: Path) -> None:
    frames, _ = read_video(whole, start=5, frames=20, size=(32, 32))
    assert np.array_equal(np.stack(list(stream_video(whole, (32, 32), 5, 20))), frames.numpy())
    assert len(list(stream_video(whole, start=70, frames=9))) == 2
    assert list(stream_video(whole, start=COUNT)) == []
    with pytest.raises(UserError, match="at least one"):
        stream_video(whole, frames=0)
    with pytest.raises(UserError, match="no video file"):
        next(iter(stream_video(whole.with_name("none.mp4"))))
    with pytest.raises(ShortVideo):
        read_clip(whole, Sampling(COUNT + 1))


def test_a_stream_can_be_written_as_it_comes(whole: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "copy.mp4", stream_video(whole), RATE)
    assert np.abs(read_video(tmp_path / "copy.mp4")[0].numpy().astype(int) - read_video(whole)[0].numpy()).mean() < 4
