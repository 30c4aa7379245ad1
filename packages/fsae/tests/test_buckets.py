"""Buckets: sizes, mixtures, and an order that follows from seed and step, whatever breaks."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fsae.data.buckets import Bucket, BucketedClips, BucketOrder, nearest_size
from fsae.data.config import BucketConfig, ClipsConfig, Mixture, SourceConfig
from fsae.data.order import Cut, EpochItems, MicroBatches
from fsae.data.video import VideoInfo, write_video
from fsae.errors import UserError


def video(path: Path, height: int, width: int, frames: int = 12, level: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, [np.full((height, width, 3), level + 10 * i, np.uint8) for i in range(frames)], 8)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for k in range(3):
        video(folder / "own" / f"wide{k}.mp4", 48, 96)
        video(folder / "own" / f"square{k}.mp4", 64, 60)
    video(folder / "own" / "tall.mp4", 96, 44)
    video(folder / "own" / "short.mp4", 64, 64, frames=3)
    for k in range(2):
        Image.new("RGB", (50, 90), (k, k, k)).save(folder / "own" / f"image{k}.png")
    video(folder / "packed.mp4", 50, 100, level=130)
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for name, data in [("0.mp4", (folder / "packed.mp4").read_bytes()), ("0.txt", b"packed")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (folder / "list.csv").write_text(
        "path,caption\nown/wide0.mp4,listed\nmissing.mp4,\nown/tall.mp4,listed\npacked.mp4,listed\n"
    )
    return folder


def mixture(media: Path, **changes: Any) -> Mixture:
    settings: dict[str, Any] = {
        "sources": [SourceConfig(str(media / "own")), SourceConfig(str(media / "shard.tar"), weight=0.5)],
        "buckets": [
            BucketConfig(frames=5, area=8192, weight=2),
            BucketConfig(frames=1, height=128, width=64, batch_size=3),
        ],
    }
    return Mixture(**{**settings, **changes})


# --- sizes


@pytest.mark.parametrize("area", [4096, 65536, 704 * 704, 1024 * 1024])
@pytest.mark.parametrize("longest", [1.0, 2.0, 3.5])
def test_sizes_are_multiples_of_64_of_about_the_area(area: int, longest: float) -> None:
    sizes = BucketConfig(frames=5, area=area, max_aspect=longest).sizes()
    assert (round(math.sqrt(area) / 64) * 64,) * 2 in sizes
    assert sizes == sorted(set(sizes), key=lambda size: size[0] / size[1])
    assert {(w, h) for h, w in sizes} == set(sizes)
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert max(height, width) <= longest * min(height, width)
        if min(height, width) >= 256:
            assert abs(math.log(height * width / area)) < math.log(1.25)


def test_a_sample_goes_to_the_nearest_aspect_ratio() -> None:
    sizes = BucketConfig(frames=5, area=65536, max_aspect=3).sizes()
    assert len(sizes) >= 5
    for height, width in np.random.default_rng(0).integers(50, 500, (50, 2)).tolist():
        got = nearest_size(VideoInfo(9, height, width, 8.0), sizes)
        quotients = [max(height / width / (h / w), h / w / (height / width)) for h, w in sizes]
        assert quotients[sizes.index(got)] == min(quotients)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"frames": 4, "area": 65536}, "bucket.frames is 4; it must be 1 \\+ 4k"),
        ({"frames": 0, "area": 65536}, "bucket.frames"),
        ({"area": 4000}, "bucket.area"),
        ({"area": 65536, "height": 64}, "without height and width"),
        ({"height": 64}, "bucket.width is None; it must be a multiple of 64"),
        ({"height": 100, "width": 64}, "bucket.height is 100"),
        ({"area": 65536, "weight": 0.0}, "bucket.weight"),
        ({"area": 65536, "batch_size": 0}, "bucket.batch_size"),
        ({"area": 65536, "max_aspect": 0.5}, "bucket.max_aspect"),
    ],
)
def test_impossible_buckets_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        BucketConfig(**settings)


def test_impossible_clips_are_refused() -> None:
    sources, buckets = [SourceConfig("x")], [BucketConfig(area=65536)]
    for settings, words in [
        ({"sources": [], "buckets": buckets}, "clips.sources"),
        ({"sources": sources, "buckets": []}, "clips.buckets"),
        ({"sources": sources, "buckets": buckets, "fps": 0.0}, "clips.fps"),
        ({"sources": sources, "buckets": buckets, "stride": 0}, "clips.stride"),
        ({"sources": sources, "buckets": buckets, "reader": "x"}, "clips.reader"),
    ]:
        with pytest.raises(UserError, match=words):
            Mixture(**settings)  # type: ignore[arg-type]
    for source in ({"path": ""}, {"path": "x", "weight": -1.0}):
        with pytest.raises(UserError, match=r"source\.(path|weight)"):
            SourceConfig(**source)  # type: ignore[arg-type]


def test_what_checkpoints_and_caches_hold_of_clips_stays_as_it_is() -> None:
    """Or runs and caches of earlier versions would not go on."""
    bucket = {
        "frames": 5,
        "area": None,
        "height": 64,
        "width": 128,
        "weight": 1.0,
        "batch_size": None,
        "max_aspect": 2.0,
    }
    clips = ClipsConfig(5, 64, 128, more_data=[SourceConfig("b", 2.0)], fps=8.0)
    assert not clips.plain and asdict(clips.mixture("a")) == {
        "sources": [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 2.0}],
        "buckets": [{**bucket, "max_aspect": 2.0}],
        "fps": 8.0,
        "stride": 1,
        "reader": "pyav",
    }


def test_settings_need_no_torch() -> None:
    code = "import sys, fsae.data.config, fsae.data.sources; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the order


def table() -> list[Bucket]:
    return [
        Bucket(5, (64, 64), None, 0.5, 0, [(0.3, list(range(7))), (0.2, [7, 8])]),
        Bucket(5, (64, 128), None, 0.1, 9, [(0.1, [9, 10, 11])]),
        Bucket(1, (64, 64), 3, 0.4, 12, [(0.1, [12]), (0.3, [13, 14])]),
    ]


def of(index: int) -> int:
    """The bucket of an index of ``table``."""
    return 0 if index < 9 else 1 if index < 12 else 2


def test_mixtures_have_their_weights() -> None:
    """Each count is binomial: within 4.5 standard deviations of its mean."""
    order, count = BucketOrder(table(), Cut(5, 2)), 20_000
    batches = [order.micro_batch(step, 0) for step in range(count)]
    buckets = Counter(of(batch[0][0]) for batch in batches)
    for bucket, share in enumerate([0.5, 0.1, 0.4]):
        assert abs(buckets[bucket] - count * share) < 4.5 * math.sqrt(count * share * (1 - share))
    first = [index for batch in batches if of(batch[0][0]) == 0 for index, _ in batch]
    assert abs(sum(index < 7 for index in first) - 0.6 * len(first)) < 4.5 * math.sqrt(len(first) * 0.24)
    assert order.position(count) == divmod(sum(map(len, batches)), 15)


def test_the_files_of_a_source_come_once_an_epoch() -> None:
    order = BucketOrder(table(), Cut(1, 2))
    stream = [key for step in range(600) for key in order.micro_batch(step, 0)]
    assert len(set(stream)) == len(stream)
    seen = [key for key in stream if key[0] < 7]
    epochs = [[index for index, epoch in seen if epoch == e] for e in range(20)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 15
    assert [epoch for _, epoch in seen] == sorted(epoch for _, epoch in seen)


def test_micro_batches_are_of_one_bucket_and_all_processes_have_the_same() -> None:
    whole = BucketOrder(table()[:2], Cut(3, 6, accumulation=2))
    parts = [BucketOrder(table()[:2], Cut(3, 2, accumulation=2, processes=3, rank=rank)) for rank in range(3)]
    for step in range(200):
        for micro in range(2):
            batches = [part.micro_batch(step, micro) for part in parts]
            assert len({of(index) for batch in batches for index, _ in batch}) == 1
            assert [key for batch in batches for key in batch] == whole.micro_batch(step, micro)
    sized = BucketOrder(table(), Cut(3, 2))
    assert {(of(b[0][0]), len(b)) for b in (sized.micro_batch(s, 0) for s in range(100))} == {(0, 2), (1, 2), (2, 3)}


def test_any_step_can_be_asked_first() -> None:
    def order(seed: int = 8) -> BucketOrder:
        return BucketOrder(table(), Cut(seed, 2, accumulation=2))

    running, steps = order(), [0, 1, 2, 2047, 2048, 2049, 5000, 12_345]
    everything = {step: [running.micro_batch(step, m) for m in range(2)] for step in range(12_346) if step in steps}
    for step in reversed(steps):
        assert [order().micro_batch(step, m) for m in range(2)] == everything[step]
        assert order().position(step) == running.position(step)
    assert [running.micro_batch(3, m) for m in range(2)] == [order().micro_batch(3, m) for m in range(2)]  # back again
    assert order(9).micro_batch(2049, 0) != everything[2049][0]


# --- the data set


def test_clips_are_sorted_into_sizes(media: Path) -> None:
    with pytest.warns(UserWarning, match=r"fit for no bucket: 3 file\(s\) skipped: .*image0.*image1.*short\.mp4"):
        clips = BucketedClips(mixture(media, buckets=[BucketConfig(frames=5, area=8192)]))
    names = {
        bucket.size: [clips.entries[number].media.name for _, numbers in bucket.members for number in numbers]
        for bucket in clips.buckets
    }
    assert names == {
        (64, 128): ["wide0.mp4", "wide1.mp4", "wide2.mp4", "0.mp4"],
        (128, 64): ["tall.mp4"],
        (64, 64): ["square0.mp4", "square1.mp4", "square2.mp4"],
    }
    assert len(clips) == 8 and sum(bucket.share for bucket in clips.buckets) == pytest.approx(1)
    # The folder has two thirds of the samples, a seventh of them each file; the tar the last third.
    wide = next(bucket for bucket in clips.buckets if bucket.size == (64, 128))
    assert wide.share == pytest.approx(2 / 3 * 3 / 7 + 1 / 3)
    assert [share for share, _ in wide.members] == pytest.approx([2 / 3 * 3 / 7, 1 / 3])


def batches(clips: BucketedClips, start: int, stop: int, workers: int = 0, rank: int = 0) -> Iterator[Any]:
    order = clips.order(Cut(4, 2, 2, 2, rank))
    return iter(DataLoader(EpochItems(clips), batch_sampler=MicroBatches(order, 2, start, stop), num_workers=workers))


@pytest.mark.filterwarnings("ignore:broken")
def test_micro_batches_have_one_shape_and_do_not_depend_on_workers_or_the_start(media: Path) -> None:
    clips = BucketedClips(mixture(media, reader="pyav"), seed=2)
    plain = list(batches(clips, 0, 8))
    shapes = [tuple(batch["video"].shape) for batch in plain]
    assert {shape[0] for shape in shapes if shape[2] == 1} == {3} and {s[0] for s in shapes if s[2] == 5} == {2}
    assert len(set(shapes)) >= 3 and {shape[2] for shape in shapes} == {1, 5}
    assert shapes == [tuple(batch["video"].shape) for batch in batches(clips, 0, 8, rank=1)]
    for other in (batches(clips, 3, 8), batches(BucketedClips(mixture(media), seed=2), 3, 8, workers=2)):
        for expected, batch in zip(plain[6:], other, strict=True):
            assert torch.equal(expected["video"], batch["video"]) and expected["caption"] == batch["caption"]
    assert any("packed" in batch["caption"] for batch in plain)


@pytest.mark.filterwarnings("ignore:broken", "ignore:skipped")
def test_what_breaks_changes_no_order_and_is_named(media: Path, tmp_path: Path) -> None:
    sources = [SourceConfig(str(tmp_path))]
    for k in range(4):
        video(tmp_path / f"{k}.mp4", 64, 64, level=20 + 13 * k)
    clips = BucketedClips(mixture(media, sources=sources, buckets=[BucketConfig(frames=5, height=64, width=64)]))
    before = [clips.sample(index, 3)["video"] for index in range(4)]
    keys = [clips.order(Cut(0, 2, 1, 1, 0)).micro_batch(step, 0) for step in range(6)]
    (tmp_path / "1.mp4").write_text("broken")
    loaded = list(batches(clips, 0, 8, workers=1))  # met by a worker process
    assert len(loaded) == 16 and [media.name for media in clips.skipped] == ["1.mp4"]
    assert keys == [clips.order(Cut(0, 2, 1, 1, 0)).micro_batch(step, 0) for step in range(6)]
    after = [clips.sample(index, 3)["video"] for index in range(4)]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True, True]
    assert torch.equal(after[1], after[2])
    (tmp_path / "3.mp4").write_text("broken")
    assert torch.equal(clips.sample(3, 3)["video"], clips.sample(0, 3)["video"])
    assert clips.summary().startswith("2 file(s) skipped: ")
    for k in (0, 2):
        (tmp_path / f"{k}.mp4").write_text("broken")
    with pytest.raises(UserError, match="none of the 4 files"):
        clips.sample(1, 0)


def test_a_list_with_missing_files_is_not_fatal(media: Path) -> None:
    with pytest.warns(UserWarning, match=r"1 file\(s\) skipped: .*missing\.mp4"):
        clips = BucketedClips(
            Mixture([SourceConfig(str(media / "list.csv"))], [BucketConfig(frames=5, height=64, width=64)])
        )
    assert [clips[i]["caption"] for i in range(len(clips))] == ["listed"] * 3
    assert [one.name for one in clips.skipped] == ["missing.mp4"]


def test_what_is_broken_is_said_where_no_file_fits(tmp_path: Path) -> None:
    def refusal(*names: str) -> str:
        (tmp_path / "list.csv").write_text("\n".join(["path", *names]) + "\n")
        with pytest.raises(UserError) as caught:
            BucketedClips(
                Mixture([SourceConfig(str(tmp_path / "list.csv"))], [BucketConfig(frames=5, height=64, width=64)])
            )
        return str(caught.value)

    (tmp_path / "broken.mp4").write_text("broken")
    video(tmp_path / "short.mp4", 64, 64, frames=3)
    first = f"the first: there is no video file {tmp_path / 'missing.mp4'}; check its name"
    assert refusal("missing.mp4", "broken.mp4") == f"none of the sources' 2 file(s) can be read; {first}"
    too_short = (
        "no file of the sources has the 5 frames that the bucket of 5 frames needs; give longer videos, or take the "
        "bucket out"
    )
    assert refusal("short.mp4") == too_short
    assert refusal("short.mp4", "missing.mp4", "broken.mp4") == f"{too_short}; 2 file(s) cannot be read, {first}"


@pytest.mark.filterwarnings("ignore:broken")
def test_rate_and_stride_reach_the_reader(media: Path) -> None:
    def steps(**changes: Any) -> list[int]:
        sources = [SourceConfig(str(media / "packed.mp4"))]
        bucket = BucketConfig(frames=5, height=64, width=64)
        clip = BucketedClips(mixture(media, sources=sources, buckets=[bucket], **changes))[0]["video"]
        levels = (clip.mean((0, 2, 3)) + 1) * 127.5
        return [round(float(step) / 10) for step in levels.diff()]

    assert steps() == [1, 1, 1, 1]
    assert steps(stride=2) == [2, 2, 2, 2]
    assert steps(fps=4.0) == [2, 2, 2, 2]
    assert sum(steps(fps=16.0)) == 2  # each frame twice
    with pytest.raises(UserError, match="no file of the sources has the 13 frames that the bucket of 5 frames needs"):
        steps(stride=3)
    lasts = "no file of the sources lasts the {} seconds that the bucket of 5 frames needs at {} frames a second"
    with pytest.raises(UserError, match=lasts.format("5.00", "1") + "; give longer videos, a higher fps, or take"):
        steps(fps=1.0)
    with pytest.raises(UserError, match=lasts.format("3.60", "2.5")):
        steps(fps=2.5, stride=2)


def test_a_missing_reader_is_said_at_once(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(UserError, match="decord is not installed"):
        BucketedClips(mixture(media, reader="decord"))


@pytest.mark.filterwarnings("ignore:broken")
def test_where_clips_start_follows_from_the_seed(media: Path) -> None:
    def starts(seed: int) -> list[float]:
        clips = BucketedClips(mixture(media), seed)
        return [float(clips.sample(0, epoch)["video"][:, 0].mean()) for epoch in range(8)]

    assert starts(0) == starts(0) and starts(0) != starts(1) and len(set(starts(0))) > 2
