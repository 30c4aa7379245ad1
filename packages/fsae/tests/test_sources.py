"""Where clips come from: folders, lists with spans, tars, patterns of them; what is missing or damaged is not fatal."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fsae.data.config import Sampling
from fsae.data.image import image_size, load_image
from fsae.data.media import Media
from fsae.data.readers import read_clip
from fsae.data.sources import read_source
from fsae.data.video import probe, read_video, write_video
from fsae.errors import UserError


def video_bytes(folder: Path, level: int = 90, frames: int = 3) -> bytes:
    path = folder / "made.mp4"
    write_video(path, [np.full((32, 48, 3), level + 10 * i, np.uint8) for i in range(frames)], 8)
    data = path.read_bytes()
    path.unlink()
    return data


def image_bytes(level: int = 200) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 10), (level, level, level)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_tar_samples_give_the_bytes_that_went_in(tmp_path: Path) -> None:
    clip, picture = video_bytes(tmp_path), image_bytes()
    shard = write_tar(
        tmp_path / "shard.tar",
        [
            ("a/0001.mp4", clip),
            ("a/0001.txt", b"a slow zoom\n"),
            ("a/0002.json", json.dumps({"caption": "héllo", "start": 0.1, "end": 0.3}).encode()),
            ("a/0002.thumb.png", picture),
            ("a/0002.MP4", clip),
            ("b/0001.png", picture),
            ("b/0001.json", b'{"caption": "not this"}'),
            ("b/0001.txt", b"this"),
            ("b/0003.txt", b"words without a picture"),
            ("README", b"no sample"),
        ],
    )
    entries = read_source(shard)
    assert [(media.name, caption) for media, caption in entries] == [
        ("0001.mp4", "a slow zoom"),
        ("0002.MP4", "héllo"),
        ("0001.png", "this"),
    ]
    assert [media.open().read() for media, _ in entries] == [clip, clip, picture]
    assert (entries[1].media.start, entries[1].media.end) == (0.1, 0.3)
    assert str(entries[0].media) == f"{shard}/a/0001.mp4"

    (tmp_path / "a.mp4").write_bytes(clip)
    (tmp_path / "a.png").write_bytes(picture)
    member, image = entries[0].media, entries[2].media
    assert read_video(member)[0].equal(read_video(tmp_path / "a.mp4")[0])
    assert probe(member) == probe(tmp_path / "a.mp4")
    assert np.array_equal(load_image(image), load_image(tmp_path / "a.png"))
    assert image_size(image) == (10, 20) and image.is_image and not member.is_image
    pixels, times = read_clip(entries[1].media, Sampling(1))
    assert times == [0.0] and np.array_equal(pixels[0], read_video(member)[0][0].numpy())


def test_a_window_into_a_tar_is_a_file(tmp_path: Path) -> None:
    data = bytes(range(200))
    entry = read_source(write_tar(tmp_path / "a.tar", [("x.txt", b"before"), ("x.mp4", data), ("y.txt", b"after")]))[0]
    with entry.media.open() as file:
        assert file.read(3) == data[:3] and file.tell() == 3
        assert file.seek(-2, 2) == 198 and file.read() == data[198:]
        assert file.seek(50) == 50 and file.seek(10, 1) == 60 and file.read(4) == data[60:64]
        assert file.seek(500) == 500 and file.read() == b""


def test_folders_and_patterns_find_tars_in_order(tmp_path: Path) -> None:
    for name in ("s2", "s1"):
        write_tar(tmp_path / "shards" / f"{name}.tar", [(f"{name}{k}.png", image_bytes()) for k in "ab"])
    (tmp_path / "shards" / "z.png").write_bytes(image_bytes())
    names = ["s1a.png", "s1b.png", "s2a.png", "s2b.png"]
    assert [media.name for media, _ in read_source(tmp_path / "shards")] == [*names, "z.png"]
    assert [media.name for media, _ in read_source(str(tmp_path / "shards" / "s*.tar"))] == names
    assert [media.name for media, _ in read_source(tmp_path / "shards" / "z.png")] == ["z.png"]


def test_a_damaged_tar_gives_what_is_before_and_names_itself(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [(f"{k}.png", image_bytes()) for k in range(3)])
    data = bytearray(shard.read_bytes())
    data[2048:2560] = b"\xff" * 512  # the header of the third member
    shard.write_bytes(data)
    with pytest.warns(UserWarning, match=r"a\.tar is damaged"):
        entries = read_source(shard)
    assert [media.name for media, _ in entries] == ["0.png", "1.png", "a.tar"]
    with pytest.raises(UserError, match="cannot be decoded"):
        probe(entries[-1].media)

    broken_words = write_tar(tmp_path / "b.tar", [("0.json", b"{broken"), ("0.png", image_bytes())])
    with pytest.warns(UserWarning, match=r"b\.tar says about 0\.png cannot be used"):
        assert [(media.name, caption) for media, caption in read_source(broken_words)] == [("0.png", "")]


def test_lists_give_spans_and_may_name_missing_files(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,caption,start,end\na.mp4,,1.5,\nnone.mp4,words,,2\n")
    (tmp_path / "list.jsonl").write_text(
        '{"path": "a.mp4", "start": 1.5}\n{"path": "none.mp4", "caption": "words", "end": 2}\n'
    )
    for name in ("list.csv", "list.jsonl"):
        first, second = read_source(tmp_path / name)
        assert first == (Media(tmp_path / "a.mp4", start=1.5), "")
        assert second == (Media(tmp_path / "none.mp4", end=2.0), "words")
        assert second.media.file == Media(tmp_path / "none.mp4")


@pytest.mark.parametrize("span", ['"start": -1', '"start": 2, "end": 1', '"end": "soon"', '"start": [1]', '"end": NaN'])
def test_impossible_spans_are_refused(tmp_path: Path, span: str) -> None:
    (tmp_path / "list.jsonl").write_text(f'{{"path": "a.mp4", {span}}}\n')
    with pytest.raises(UserError, match="line 1: .*give seconds with start before end"):
        read_source(tmp_path / "list.jsonl")


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl"])
def test_a_list_that_is_not_utf8_is_refused(tmp_path: Path, name: str) -> None:
    header = "path,caption" if name == "list.csv" else ""
    # More than the decoder takes at once, so that the line is not one of the first block.
    good = "a.mp4,words" if name == "list.csv" else '{"path": "a.mp4", "caption": "words"}'
    bad = good.replace("words", "wörter")
    path = tmp_path / name
    path.write_bytes("\n".join([header, *[good] * 2000, bad]).encode("latin-1"))
    with pytest.raises(UserError, match=f"{name}, line 2002 is not UTF-8; lists are read as UTF-8, so save it as that"):
        read_source(path)
    path.write_bytes("\n".join([header, bad]).encode("utf-16"))
    with pytest.raises(UserError, match="line 1 is not UTF-8"):
        read_source(path)
    path.write_bytes("\n".join([header, bad]).encode("utf-8-sig"))
    assert [entry.caption for entry in read_source(path)] == ["wörter"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('b.mp4,"not closed', "unexpected end of data"),
        ('b.mp4,"said "so" to me"', "expected after"),
        (f"b.mp4,{'x' * 131073}", "field larger than field limit"),
    ],
)
def test_rows_that_are_not_csv_are_refused(tmp_path: Path, row: str, reason: str) -> None:
    path = tmp_path / "list.csv"
    path.write_text(f'path,caption\na.mp4,"of two\nlines, ""quoted"""\n{row}\nc.mp4,\n')
    with pytest.raises(UserError, match=rf"list\.csv cannot be read as CSV from line 4 on \(.*{reason}.*\); close"):
        read_source(path)
    path.write_text(f"path,caption\n{row}\n")
    with pytest.raises(UserError, match="from line 2 on"):
        read_source(path)
    path.write_text(f'path,"caption\n{row}\n')
    with pytest.raises(UserError, match="from line 1 on"):
        read_source(path)
    path.write_text('path,caption\na.mp4,"of two\nlines, ""quoted"""\nc.mp4,\n')
    assert [entry.caption for entry in read_source(path)] == ['of two\nlines, "quoted"', ""]


def test_unusable_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    write_tar(tmp_path / "empty.tar", [("a.txt", b"x")])
    for name, words in [
        ("none", "neither a folder nor"),
        ("*.webp", "neither a folder nor"),
        ("notes.txt", "neither a folder nor"),
        ("empty.tar", "holds no video or image"),
    ]:
        with pytest.raises(UserError, match=words):
            read_source(str(tmp_path / name))
