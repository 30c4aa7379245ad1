"""The index of a source: the same entries as the files, made once, kept up to date, shared and resumed."""

from __future__ import annotations

import getpass
import io
import json
import math
import multiprocessing
import os
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from fsae.data import index as indices
from fsae.data.buckets import BucketedClips, BucketOrder
from fsae.data.config import BucketConfig, Mixture, SourceConfig
from fsae.data.index import Entries, Index
from fsae.data.media import Entry, Media
from fsae.data.order import Cut, derived_generator
from fsae.data.sources import read_source
from fsae.data.video import VideoInfo, probe, write_video
from fsae.errors import UserError
from fsae.storage.columns import Table, Texts


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the videos that are looked into."""
    names: list[str] = []

    def look(media: Media, count: bool) -> VideoInfo:
        names.append(media.name)
        return probe(media, count)

    monkeypatch.setattr(indices, "probe", look)
    return names


def video_bytes(folder: Path, frames: int = 3) -> bytes:
    write_video(folder / "made.mp4", [np.full((32, 48, 3), 90 + 10 * i, np.uint8) for i in range(frames)], 8)
    data = (folder / "made.mp4").read_bytes()
    (folder / "made.mp4").unlink()
    return data


def image_bytes() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 10)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def videos(folder: Path, *names: str, frames: int = 3) -> list[Path]:
    folder.mkdir(exist_ok=True)
    data = video_bytes(folder, frames=frames)
    for name in names:
        (folder / name).write_bytes(data)
    return [folder / name for name in names]


def mixed(folder: Path) -> list[list[Entry]]:
    """A folder with videos, images and a tar, and a list with spans and a missing file; what is in them."""
    inner = folder / "media" / "inner"
    inner.mkdir(parents=True)
    long, short, picture = video_bytes(folder, frames=12), video_bytes(folder, frames=3), image_bytes()
    for path, data in [("b.mp4", long), ("inner/a.mp4", short), ("inner.png", picture), ("bad.mp4", b"no video")]:
        (folder / "media" / path).write_bytes(data)
    shard = write_tar(folder / "media" / "t.tar", [("0.mp4", long), ("0.txt", b"said"), ("1.png", picture)])
    rows = [{"path": "media/b.mp4", "start": 0.5, "caption": "später"}, {"path": "none.mp4"}]
    rows += [{"path": "media/b.mp4", "end": 0.5}, {"path": "media/inner.png", "caption": " "}]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = [shard.read_bytes().find(data) for data in (long, picture)]
    files = [Entry(Media(folder / "media" / name)) for name in ("b.mp4", "bad.mp4", "inner/a.mp4", "inner.png")]
    packed = [Media(shard, "0.mp4", places[0], len(long)), Media(shard, "1.png", places[1], len(picture))]
    listed = [Entry(Media(folder / "media/b.mp4", start=0.5), "später"), Entry(Media(folder / "none.mp4"))]
    listed += [Entry(Media(folder / "media/b.mp4", end=0.5)), Entry(Media(folder / "media/inner.png"), " ")]
    return [[*files, Entry(packed[0], "said"), Entry(packed[1])], listed]


def plain_buckets(sources: list[list[Entry]], weights: Sequence[float], config: BucketConfig) -> dict[Any, Any]:
    """(share, numbers) of each size's sources, file by file: a video of 8 frames a second fits by its frames."""
    found: dict[Any, Any] = {size: [] for size in config.sizes()}
    first, fitting = 0, []
    for entries in sources:
        own = []
        for number, (media, _) in enumerate(entries, first):
            try:
                height, width, frames = (10, 20, 1) if media.is_image else (32, 48, probe(media.file).frames)
            except UserError:
                continue
            length = (min(frames / 8, media.end or math.inf) - media.start) * 8
            if config.frames == 1 if media.is_image else length >= config.frames:
                ratio = math.log(height / width)
                own.append((number, min(found, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))))
        fitting.append(own)
        first += len(entries)
    total = sum(weight for weight, own in zip(weights, fitting, strict=True) if own)
    for weight, own in zip(weights, fitting, strict=True):
        for size, members in found.items():
            numbers = [number for number, its in own if its == size]
            if numbers:
                members.append((weight / total * len(numbers) / len(own), numbers))
    return {size: members for size, members in found.items() if members}


@pytest.mark.filterwarnings("ignore:broken")
def test_entries_buckets_and_draws_are_those_of_a_plain_look_at_every_file(tmp_path: Path) -> None:
    sources = mixed(tmp_path)
    configs = [BucketConfig(frames=5, area=65536), BucketConfig(frames=1, area=65536, weight=2)]
    paths = [str(tmp_path / "media"), str(tmp_path / "list.jsonl")]
    mixture = Mixture([SourceConfig(paths[0]), SourceConfig(paths[1], 0.5)], configs)
    for _ in range(2):  # as it is made, and as it is opened
        clips = BucketedClips(mixture)
        assert list(clips.entries) == [*sources[0], *sources[1]]
        assert [list(read_source(path)) for path in paths] == sources
        expected = [plain_buckets(sources, (1, 0.5), config) for config in configs]
        got = [(b.frames, b.size, [(share, list(rows)) for share, rows in b.members]) for b in clips.buckets]
        assert got == [(c.frames, *item) for c, sizes in zip(configs, expected, strict=True) for item in sizes.items()]
        items = [n for sizes in expected for members in sizes.values() for _, numbers in members for n in numbers]
        assert [clips.entry(place) for place in range(len(clips))] == [clips.entries[number] for number in items]

        bucket = max(clips.buckets, key=len)
        count = len(bucket.members[0][1])
        alone = BucketOrder([bucket], Cut(3, 1))
        drawn = [alone.micro_batch(step, 0)[0] for step in range(40)]
        of_first = [index - bucket.first for index, epoch in drawn if epoch == 0 and index - bucket.first < count]
        assert of_first == torch.randperm(count, generator=derived_generator(3, 2, 0, 0, 0)).tolist()


def test_an_index_is_opened_and_not_made_again(tmp_path: Path, probed: list[str]) -> None:
    videos(tmp_path / "data", "a.mp4", "b.mp4")
    made = read_source(tmp_path / "data", probed=True)
    assert sorted(probed) == ["a.mp4", "b.mp4"] and made.info(0) == VideoInfo(3, 32, 48, 8.0)
    again = read_source(tmp_path / "data", probed=True)
    assert len(probed) == 2 and again.rows.folder == made.rows.folder
    assert all(not column.flags.owndata and not column.flags.writeable for column in again.rows.numbers.values())
    copy = pickle.loads(pickle.dumps(again))
    assert list(copy) == list(made) and len(pickle.dumps(again)) < 500


@pytest.mark.filterwarnings("ignore:the tar")
def test_what_changed_is_looked_at_anew_and_nothing_else(
    tmp_path: Path, probed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    videos(folder, "a.mp4", "c.mp4", "d.mp4", "e.mp4")
    write_tar(folder / "t.tar", [("0.mp4", (folder / "a.mp4").read_bytes())])
    read_source(folder, probed=True)
    assert capsys.readouterr().err == ""
    probed.clear()
    videos(folder, "b.mp4")
    videos(folder, "c.mp4", frames=7)
    (folder / "d.mp4").unlink()
    index = read_source(folder, probed=True)
    assert [(media.name, index.info(row).frames) for row, (media, _) in enumerate(index)] == [  # type: ignore[union-attr]
        *(("a.mp4", 3), ("b.mp4", 3), ("c.mp4", 7), ("e.mp4", 3), ("0.mp4", 3)),
    ]
    assert sorted(probed) == ["b.mp4", "c.mp4"]
    told = f"{folder} has changed since it was indexed: of 5 files it is made of, 2 are looked at anew"
    assert told in capsys.readouterr().err
    assert len(list(folder.iterdir())) == 5  # nothing is written among the data
    probed.clear()
    (folder / "t.tar").unlink()
    assert [media.name for media, _ in read_source(folder, probed=True)] == ["a.mp4", "b.mp4", "c.mp4", "e.mp4"]
    assert not probed


def test_a_longer_list_has_its_new_files_probed(tmp_path: Path, probed: list[str]) -> None:
    videos(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "list.csv").write_text("path,start\na.mp4,\na.mp4,0.1\n")
    assert len(read_source(tmp_path / "list.csv", probed=True)) == 2 and probed == ["a.mp4"]
    (tmp_path / "list.csv").write_text("path,start\nb.mp4,\na.mp4,\na.mp4,0.1\nb.mp4,0.1\n")
    index = read_source(tmp_path / "list.csv", probed=True)
    assert probed == ["a.mp4", "b.mp4"] and {index.info(row) for row in range(4)} == {VideoInfo(3, 32, 48, 8.0)}


def test_what_cannot_be_read_is_tried_again(tmp_path: Path, probed: list[str]) -> None:
    videos(tmp_path, "a.mp4")
    (tmp_path / "list.csv").write_text("path\na.mp4\nb.mp4\n")
    source = tmp_path / "list.csv"
    index = read_source(source, probed=True)
    assert index.info(1) == f"there is no video file {tmp_path / 'b.mp4'}; check its name"
    assert read_source(source, probed=True).rows.folder == index.rows.folder  # nothing new is known
    assert [read_source(source).info(row) for row in range(2)] == [index.info(0), index.info(1)]
    videos(tmp_path, "b.mp4", frames=4)
    assert read_source(source, probed=True).info(1) == VideoInfo(4, 32, 48, 8.0)
    assert probed.count("a.mp4") == 1


def test_probing_that_is_interrupted_goes_on(
    tmp_path: Path, probed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    videos(tmp_path / "data", *(f"{k}.mp4" for k in range(9)))
    monkeypatch.setattr(indices, "_PROBED_TOGETHER", 2)
    monkeypatch.setattr(indices, "_SAVE_EVERY", 0.0)
    look = indices.probe

    def interrupted(media: Media, count: bool) -> VideoInfo:
        if media.name == "7.mp4":
            raise KeyboardInterrupt
        return look(media, count)

    monkeypatch.setattr(indices, "probe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_source(tmp_path / "data", probed=True)
    monkeypatch.setattr(indices, "probe", look)
    index = read_source(tmp_path / "data", probed=True)
    assert sorted(probed) == sorted(f"{k}.mp4" for k in range(9))  # none twice
    assert {index.info(row) for row in range(9)} == {VideoInfo(3, 32, 48, 8.0)}


def _open(source: Path, log: Path, start: Any) -> None:
    def look(media: Media, count: bool) -> VideoInfo:
        with log.open("a") as file:
            file.write(f"{media.name}\n")
        return probe(media, count)

    def listed(folder: Path) -> list[str]:
        with log.open("a") as file:
            file.write("listed\n")
        return files(folder)

    from fsae.data import sources

    files, sources._files = sources._files, listed
    indices.probe = look
    start.wait()
    assert len(read_source(source, probed=True)) == 6


def test_processes_that_start_together_make_it_once(tmp_path: Path) -> None:
    videos(tmp_path / "data", *(f"{k}.mp4" for k in range(6)))
    forked = multiprocessing.get_context("fork")
    start = forked.Barrier(3)
    processes = [forked.Process(target=_open, args=(tmp_path / "data", tmp_path / "log", start)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    lines = (tmp_path / "log").read_text().split()
    assert sorted(set(lines)) == sorted([*(f"{k}.mp4" for k in range(6)), "listed"])
    assert len(lines) - lines.count("listed") == 6


def test_a_maker_that_does_nothing_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos(tmp_path / "data", "a.mp4")
    version = read_source(tmp_path / "data").rows.folder
    assert version is not None
    folder = version.parent.parent
    monkeypatch.setattr(indices, "_PATIENCE", 0.2)
    said = rf"another process has the index of .*data .*end it, or remove {folder}"
    with FileLock(folder / "lock"), pytest.raises(UserError, match=said):
        read_source(tmp_path / "data")
    assert len(read_source(tmp_path / "data")) == 1


def test_a_damaged_index_is_made_anew(tmp_path: Path, probed: list[str]) -> None:
    videos(tmp_path / "data", "a.mp4")
    version = read_source(tmp_path / "data", probed=True).rows.folder
    assert version is not None
    (version / "frames.npy").write_bytes((version / "frames.npy").read_bytes()[:-3])
    assert read_source(tmp_path / "data", probed=True).info(0) == VideoInfo(3, 32, 48, 8.0)
    assert probed == ["a.mp4", "a.mp4"]


def test_it_lies_where_the_user_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos(tmp_path / "data", "a.mp4")
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(indices.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    folder = read_source(tmp_path / "data").rows.folder
    assert folder is not None and folder.is_relative_to(
        tmp_path / "temporary" / f"fsvideo-{getpass.getuser()}" / "index"
    )
    monkeypatch.setattr(indices.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    with pytest.raises(UserError, match="takes files; set XDG_CACHE_HOME to a folder that does"):
        read_source(tmp_path / "data")


def test_old_versions_go(tmp_path: Path) -> None:
    for k in range(6):
        videos(tmp_path / "data", f"{k}.mp4")
        index = read_source(tmp_path / "data")
    assert index.rows.folder is not None and len(index) == 6
    versions = [path for path in index.rows.folder.parent.parent.iterdir() if path.is_dir()]
    assert len(versions) == 3 and index.rows.folder.parent in versions


@pytest.mark.parametrize(
    ("captions", "missing"), [(["a", "", " "], 2), (["", ""], 2), (["ä", "\u3000x"], 0), (["x"], 0), ([" \n", " y"], 1)]
)
def test_missing_captions_are_counted(tmp_path: Path, captions: list[str], missing: int) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps({"path": "a.mp4", "caption": caption}) + "\n" for caption in captions))
    assert Entries([read_source(path), read_source(path)]).without_caption() == 2 * missing


# --- columns


def test_tables_are_what_went_in_whole_cut_and_joined(tmp_path: Path) -> None:
    schema = {"name": str, "number": np.int64, "shape": np.int32}
    rows = [("ä", 2**40, (1, 2)), ("", -1, (3, 4)), ("nö\udc80", 0, (5, 6)), ("日本", 7, (7, 8))]
    table = Table.of(rows, schema)

    def values(table: Table) -> list[tuple[Any, ...]]:
        return [tuple(table.value(name, row) for name in schema) for row in range(len(table))]

    expected = [(name, number, list(shape)) for name, number, shape in rows]
    assert values(table) == expected
    assert values(table.slice(1, 3)) == expected[1:3]
    joined = Table.join([table.slice(2, 4), table.slice(0, 0), table.slice(0, 3)])
    assert values(joined) == expected[2:] + expected[:3]
    joined.save(tmp_path / "t")
    assert values(Table.open(tmp_path / "t")) == values(joined)
    assert Texts.of(["a", "bc"]).equals(Texts.of(["a", "bc"])) and not Texts.of(["ab", "c"]).equals(
        Texts.of(["a", "bc"])
    )


def test_names_that_are_not_utf8_are_kept(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "data") + b"/\xff.png")).write_bytes(image_bytes())
    index: Index = read_source(tmp_path / "data", probed=True)
    assert index[0].media.path.exists() and index.info(0) == VideoInfo(1, 10, 20, 1.0)
