"""Clips from folders and lists: which frames, which size, and what becomes of files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from fsae.data.config import Sampling
from fsae.data.datasets import VideoFolder
from fsae.data.image import cover
from fsae.data.video import write_video
from fsae.errors import UserError

FRAMES = 16


def video(path: Path, frames: int = FRAMES) -> None:
    """A clip whose frame i is grey of level 10 + 15 i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, [np.full((32, 48, 3), 10 + 15 * i, np.uint8) for i in range(frames)], 8)


def numbers(clip: Tensor) -> list[int]:
    """Which frames of ``video`` a clip ``3 T H W`` consists of."""
    return [round((float(frame) - 10) / 15) for frame in (clip.mean((0, 2, 3)) + 1) * 127.5]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    video(tmp_path / "b.mp4")
    video(tmp_path / "deep" / "a.mp4")
    return tmp_path


def test_clips_are_consecutive_frames_of_the_right_size(folder: Path) -> None:
    clips = VideoFolder(folder, Sampling(5, size=(16, 20)))
    assert len(clips) == 2
    clip = clips[0]
    assert clip["video"].shape == (3, 5, 16, 20) and clip["caption"] == ""
    assert clip["video"].dtype == torch.float32 and clip["video"].abs().max() <= 1
    first, *rest = numbers(clip["video"])
    assert rest == [first + i for i in range(1, 5)]


def test_stride_takes_every_other_frame(folder: Path) -> None:
    first, *rest = numbers(VideoFolder(folder, Sampling(5, stride=3, size=(16, 16)))[0]["video"])
    assert rest == [first + 3 * i for i in range(1, 5)] and 0 <= first <= 3


def test_a_frame_rate_is_by_time(folder: Path) -> None:
    first, *rest = numbers(VideoFolder(folder, Sampling(5, fps=4.0, size=(16, 16)))[0]["video"])  # of 8 frames a second
    assert rest == [first + 2 * i for i in range(1, 5)]
    assert VideoFolder(folder, Sampling(5, fps=4.0, size=(16, 16))).settings["fps"] == 4.0
    with pytest.raises(UserError, match="'none'"):
        VideoFolder(folder, Sampling(5, size=(16, 16), reader="none"))


def test_a_clip_follows_from_seed_index_and_epoch(folder: Path) -> None:
    def starts(seed: int) -> list[int]:
        clips = VideoFolder(folder, Sampling(3, size=(16, 16)), seed=seed)
        return [numbers(clips.sample(index, epoch)["video"])[0] for index in range(2) for epoch in range(6)]

    assert starts(0) == starts(0)
    assert starts(0) != starts(1)
    assert len(set(starts(0))) > 3  # epochs differ
    assert all(0 <= start <= FRAMES - 3 for start in starts(0))


def test_single_frames_come_from_images_and_videos(folder: Path) -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 40:] = 200
    Image.fromarray(pixels).save(folder / "a.png")
    clips = VideoFolder(folder, Sampling(1, size=(16, 16)))
    assert [path.name for path, _ in clips.entries] == ["a.png", "b.mp4", "a.mp4"]
    image = (clips[0]["video"] + 1) * 127.5
    assert image.shape == (3, 1, 16, 16)
    assert image[..., 0].mean() == pytest.approx(0, abs=3) and image[..., -1].mean() == pytest.approx(200, abs=3)
    assert clips[1]["video"].shape == (3, 1, 16, 16)


def test_lists_give_captions_and_paths_relative_to_them(folder: Path) -> None:
    rows = [{"path": "deep/a.mp4", "caption": "zoom in, slowly"}, {"path": str(folder / "b.mp4")}]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (folder / "list.csv").write_text('path,caption\ndeep/a.mp4,"zoom in, slowly"\nb.mp4,\n')
    for name in ("list.jsonl", "list.csv"):
        clips = VideoFolder(folder / name, Sampling(2, size=(16, 16)))
        assert [clips[i]["caption"] for i in range(2)] == ["zoom in, slowly", ""]
        assert [path.name for path, _ in clips.entries] == ["a.mp4", "b.mp4"]


def test_unusable_files_are_replaced_named_and_counted(folder: Path) -> None:
    (folder / "a_text.mp4").write_text("no video")
    (folder / "c.png").write_bytes(b"")
    video(folder / "d_short.mp4", frames=3)
    (folder / "e.jsonl").write_text(
        "".join(f'{{"path": "{n}"}}\n' for n in ("a_text.mp4", "c.png", "none.mp4", "b.mp4"))
    )
    clips = VideoFolder(folder, Sampling(5, size=(16, 16)))
    names = [path.name for path, _ in clips.entries]
    assert names == ["a_text.mp4", "b.mp4", "c.png", "d_short.mp4", "a.mp4"]
    with pytest.warns(UserWarning, match="skipped .*a_text.mp4"):
        replaced = clips[0]["video"]
    assert torch.equal(replaced, clips[1]["video"])
    assert clips.summary() == f"1 file(s) skipped: {folder / 'a_text.mp4'}"
    with pytest.warns(UserWarning, match=r"c.png: an image gives one frame|d_short.mp4: it has 3 frames, 5 are wanted"):
        clips[2]
    assert [path.name for path in clips.skipped] == ["a_text.mp4", "c.png", "d_short.mp4"]
    with pytest.warns(UserWarning, match="none.mp4"):
        VideoFolder(folder / "e.jsonl", Sampling(5, size=(16, 16)))[2]


@pytest.mark.filterwarnings("ignore:skipped")
def test_what_worker_processes_skip_is_known_in_the_end(folder: Path) -> None:
    (folder / "z.mp4").write_text("no video")
    clips = VideoFolder(folder, Sampling(2, size=(16, 16)))
    assert len(list(DataLoader(clips, num_workers=1))) == 3
    assert [path.name for path in clips.skipped] == ["z.mp4"]


def test_unusable_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a folder nor"):
        VideoFolder(tmp_path / "none", Sampling(1, size=(16, 16)))
    with pytest.raises(UserError, match="holds no video or image"):
        VideoFolder(tmp_path, Sampling(1, size=(16, 16)))
    (tmp_path / "bad.jsonl").write_text('{"path": "a.mp4"}\n{"path":')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        VideoFolder(tmp_path / "bad.jsonl", Sampling(1, size=(16, 16)))
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match="line 1 is not an object"):
        VideoFolder(tmp_path / "list.jsonl", Sampling(1, size=(16, 16)))
    (tmp_path / "list.csv").write_text("file\na.mp4\n")
    with pytest.raises(UserError, match="line 2: there is no path"):
        VideoFolder(tmp_path / "list.csv", Sampling(1, size=(16, 16)))
    (tmp_path / "a.png").write_text("no image")
    clips = VideoFolder(tmp_path, Sampling(1, size=(16, 16)))
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(UserError, match="none of the 1 files"):
        clips[0]
    with pytest.raises(UserError, match="must be 1 or more"):
        VideoFolder(tmp_path, Sampling(0, size=(16, 16)))


@pytest.mark.parametrize("shape", [(10, 200), (200, 10), (7, 7), (64, 64)])
def test_cover_fills_any_size_and_keeps_the_centre(shape: tuple[int, int]) -> None:
    image = np.zeros((*shape, 3), np.uint8)
    image[shape[0] // 2 - 1 : shape[0] // 2 + 1, shape[1] // 2 - 1 : shape[1] // 2 + 1] = 255
    result = cover(image, (32, 48))
    assert result.shape == (32, 48, 3)
    brightest = np.argwhere(result[..., 0] > 128).mean(0)
    assert abs(brightest - (15.5, 23.5)).max() <= 3.5
