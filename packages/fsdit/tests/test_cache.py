"""The cache of encoded clips: what it holds, that nothing disturbs it, and what it refuses."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from fsae import FSAE
from fsae.data.buckets import BucketedClips
from fsae.data.config import BucketConfig, ClipsConfig, SourceConfig
from fsae.data.media import Entry, Media
from fsae.data.order import Cut, EpochItems, MicroBatches, order_of
from fsae.data.video import read_video, to_video_tensor, write_video
from fsae.errors import UserError
from fsdit.cli import main
from fsdit.conditioning import load_encoders, nano_tokenizer
from fsdit.conditioning.encoders import pad_text
from fsdit.conditioning.nano import new_image_encoder, new_text_encoder
from fsdit.preparation import cache, shards
from fsdit.preparation.config import CacheConfig
from fsdit.training.data import CachedLatents, report_missing_captions

TEXT_LEN = 16
CAPTIONS = ("a wide one", "a square one", "", "a caption that has more bytes than there are rows")


def save_encoders(folder: Path, seed: int = 0, text_dim: int = 8) -> None:
    torch.manual_seed(seed)
    new_text_encoder("tiny", d_model=text_dim).eval().save_pretrained(folder / "text_encoder")
    nano_tokenizer().save_pretrained(folder / "tokenizer")
    new_image_encoder("tiny").eval().save_pretrained(folder / "image_encoder")


def save_autoencoder(folder: Path, seed: int = 0) -> FSAE:
    torch.manual_seed(seed)
    model = FSAE.from_preset(
        "tiny", latent_channels=4, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[0.5, 1.0, 2.0, 3.0]
    ).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Media with their list, an autoencoder and encoders."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    rows = []
    for k in range(4):
        size = (64, 128) if k % 2 == 0 else (64, 64)
        pictures = rng.integers(0, 255, (12, *size, 3), dtype=np.uint8)
        write_video(folder / f"{k}.mp4", list(pictures), 8)
        rows.append({"path": f"{k}.mp4", "caption": CAPTIONS[k % 4]})
    Image.new("RGB", (64, 64), "red").save(folder / "picture.png")
    rows.append({"path": "picture.png", "caption": CAPTIONS[1]})
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "picture.jsonl").write_text(json.dumps(rows[-1]) + "\n", encoding="utf-8")
    save_autoencoder(folder / "autoencoder")
    save_encoders(folder / "encoders")
    return folder


BUCKETS = [
    BucketConfig(frames=5, height=64, width=128, weight=2),
    BucketConfig(frames=1, height=64, width=64, batch_size=3),
]


def settings(world: Path, output: Path, **changes: Any) -> CacheConfig:
    values: dict[str, Any] = {
        "data": str(world / "list.jsonl"),
        "output": str(output),
        "autoencoder": str(world / "autoencoder"),
        "encoders": str(world / "encoders"),
        "clips": ClipsConfig(
            **{"buckets": BUCKETS, **{k: changes.pop(k) for k in list(changes) if k in vars(ClipsConfig())}}
        ),
        "text_len": TEXT_LEN,
        "latents": "fp32",
        "shard_size": 5,
        "batch_size": 4,
        "clips_per_file": 2,
        "device": "cpu",
    }
    return CacheConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """A cache made in one go."""
    cache.make_cache(settings(world, world / "whole"))
    return world / "whole"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- what it holds


def test_holds_what_encoding_on_the_fly_gives(world: Path, whole: Path) -> None:
    data = CachedLatents(whole)
    assert len(data) == 4 * 2 + 5 * 2 and len(list(whole.glob("shard-*.safetensors"))) == 4
    autoencoder = FSAE.from_pretrained(world / "autoencoder").eval()
    text, image = load_encoders(world / "encoders", TEXT_LEN)
    starts = set()
    for index, known in list(enumerate(data.samples))[::3]:
        frames, height, width = (5, 64, 128) if known.bucket == 0 else (1, 64, 64)
        if known.path.endswith(".png"):
            pixels = torch.full((1, 64, 64, 3), 0).to(torch.uint8)
            pixels[..., 0] = 255
        else:
            pixels, fps = read_video(known.path, round(known.start * 8), frames, size=(height, width))
            assert fps == 8 and known.end - known.start == pytest.approx((frames - 1) / 8)
        starts.add(known.start)
        video = to_video_tensor(pixels)[None]
        item = data[index]
        with torch.no_grad():
            encoding = text([known.caption])
            assert torch.allclose(item["latents"], autoencoder.encode(video)[0], atol=1e-5)
            assert torch.allclose(item["image_embedding"], image(video[:, :, 0])[0], atol=1e-5)
        assert torch.allclose(pad_text([item["text"]], TEXT_LEN), encoding.embeddings, atol=1e-5)
        assert len(item["text"]) == encoding.tokens[0] and item["caption"] == known.caption
        assert (
            tuple(data.shapes[index])
            == known.shape
            == tuple(item["latents"].shape)
            == (4, 2 - known.bucket, 1, width // 64)
        )
        assert torch.equal(data.sample(index, 7)["latents"], item["latents"])
    assert len(starts) > 2  # clips of one file start at different places
    with torch.no_grad():
        assert torch.allclose(pad_text([data.empty_text], TEXT_LEN), text([""]).embeddings, atol=1e-5)


def test_half_precision_is_that_of_the_latents_alone(world: Path, whole: Path, tmp_path: Path) -> None:
    one = settings(world, tmp_path / "half", data=str(world / "picture.jsonl"), latents="fp16")
    cache.make_cache(replace(one, clips=ClipsConfig(buckets=BUCKETS[1:]), prompts=str(whole / "prompts")))
    half, full = CachedLatents(tmp_path / "half"), CachedLatents(whole)
    a, b = half[0], full[17]
    assert a["latents"].dtype == torch.float32
    assert torch.allclose(a["latents"], b["latents"], rtol=1e-3, atol=1e-4)
    assert torch.equal(a["latents"], a["latents"].half().float()) and not torch.equal(a["latents"], b["latents"])
    assert torch.equal(a["text"], b["text"]) and torch.allclose(a["image_embedding"], b["image_embedding"], atol=1e-5)
    assert half.settings["cache"] != full.settings["cache"]
    assert not (tmp_path / "half" / "prompts").exists()  # they came from where it was told


PAIRS = [BucketConfig(frames=5, height=128, width=256, weight=2), BucketConfig(frames=1, height=128, width=128)]


def test_pairs_are_a_clip_and_its_half_size_copy(world: Path, whole: Path, tmp_path: Path) -> None:
    config = settings(world, tmp_path / "pairs", buckets=PAIRS, pairs=True, prompts=str(whole / "prompts"))
    cache.make_cache(config)
    data, autoencoder = CachedLatents(tmp_path / "pairs"), FSAE.from_pretrained(world / "autoencoder").eval()
    clips = BucketedClips(config.clips.mixture(config.data))
    assert len(data) == 18 and set(data[0]) == {"low", "high", "text", "image_embedding", "caption"}
    for index in (0, 3, 8, 17):
        video = to_video_tensor(torch.from_numpy(clips.read(index // 2, index % 2)[0]))[None]
        frames = video.transpose(1, 2).flatten(0, 1)
        half = F.interpolate(frames, scale_factor=0.5, mode="bicubic", antialias=True).clamp(-1, 1)
        with torch.no_grad():
            low, high = autoencoder.encode(half.unflatten(0, (1, -1)).transpose(1, 2)), autoencoder.encode(video)
        torch.testing.assert_close(data[index]["low"], low[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(data[index]["high"], high[0], rtol=1e-4, atol=1e-5)
    order = data.order(Cut(0, batch=2))
    batches = [data.collate([data.sample(*key) for key in order.micro_batch(step, 0)]) for step in range(20)]
    sizes = {(tuple(batch["low"].shape[1:]), tuple(batch["high"].shape[1:])) for batch in batches}
    assert sizes == {((4, 2, 1, 2), (4, 2, 2, 4)), ((4, 1, 1, 1), (4, 1, 2, 2))}

    left = content(tmp_path / "pairs")
    (tmp_path / "pairs" / "shard-00002.json").unlink()  # as a killed process would have left it
    assert cache.make_cache(config).made == 1 and content(tmp_path / "pairs") == left
    with pytest.raises(UserError, match="holds pairs of latents, which .* without --pairs true"):
        data.check_pairs(False)
    with pytest.raises(UserError, match="holds no pairs of latents; make one by 'fsdit cache' with --pairs true"):
        CachedLatents(whole).check_pairs(True)
    with pytest.raises(UserError, match="128x64 pixels given; width and height must be multiples of 128"):
        cache.make_cache(settings(world, tmp_path / "odd", pairs=True))


def test_without_encoders_it_keeps_captions_and_first_frames(world: Path, whole: Path, tmp_path: Path) -> None:
    cache.make_cache(settings(world, tmp_path / "plain", encoders="", image_size=16))
    assert not (tmp_path / "plain" / "prompts").exists() and not (tmp_path / "plain" / "empty.safetensors").exists()
    data, embedded = CachedLatents(tmp_path / "plain"), CachedLatents(whole)
    _, image = load_encoders(world / "encoders", TEXT_LEN)
    assert data.empty_text is None and set(data[0]) == {"latents", "image", "caption"}
    for index in range(0, len(data), 5):
        item, other = data[index], embedded[index]
        torch.testing.assert_close(item["latents"], other["latents"], rtol=1e-4, atol=1e-5)
        assert item["caption"] == other["caption"] and item["image"].shape == (3, 16, 16)
        with torch.no_grad():  # the frame is kept in half precision
            torch.testing.assert_close(image(item["image"][None])[0], other["image_embedding"], rtol=0, atol=2e-2)
    with pytest.raises(UserError, match="another text encoder than"):
        CachedLatents([tmp_path / "plain", whole])


def test_a_cache_made_before_there_were_pairs_is_read_and_finished(world: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "old")
    header = json.loads((tmp_path / "old" / "cache.json").read_text())
    older = {name: value for name, value in header.items() if name not in ("pairs", "image_size")}
    (tmp_path / "old" / "cache.json").write_text(json.dumps(older))
    (tmp_path / "old" / "shard-00001.json").unlink()
    assert cache.make_cache(settings(world, tmp_path / "old")).made == 1
    old, new = CachedLatents(tmp_path / "old"), CachedLatents(whole)
    assert old.settings == new.settings and torch.equal(old[7]["latents"], new[7]["latents"])


# --- stopped, and by several processes


def test_stopped_at_every_file_and_continued(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt makes four files more, then dies before the next is in its place."""
    config = settings(world, tmp_path / "cache")
    rename, count = os.replace, 0

    def dying(temporary: Path, target: Path) -> None:
        nonlocal count
        if count == 0:
            raise KeyboardInterrupt
        count -= 1
        rename(temporary, target)

    attempts = 0
    monkeypatch.setattr(os, "replace", dying)
    while True:
        count = 5  # of which one is the empty prompt's, written each time
        attempts += 1
        try:
            report = cache.make_cache(config)
            break
        except KeyboardInterrupt:
            pass
    assert attempts > 2 and report.kept > 0 and report.missing == 0
    assert content(tmp_path / "cache") == content(whole)


def test_remains_of_a_killed_process_go(world: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "cache")
    (tmp_path / "cache" / "shard-00001.json").unlink()
    remains = tmp_path / "cache" / ".shard-00001.tmp-1-ab.safetensors"
    remains.write_bytes(b"half")
    others = tmp_path / "cache" / ".shard-00010.tmp-1-ab.json"  # not of this cache's process
    others.write_bytes(b"half")
    with pytest.raises(UserError, match="not finished: it lacks shard-00001; run the same"):
        CachedLatents(tmp_path / "cache")
    report = cache.make_cache(settings(world, tmp_path / "cache"))
    assert (report.made, report.kept) == (1, 3) and not remains.exists()
    others.unlink()
    assert content(tmp_path / "cache") == content(whole)


# Waits in the second shard until it is interrupted.
WAITING = """
import sys, signal, time
from fsdit.preparation import shards
from fsdit.cli import main

def waiting(folder, number, *content):
    if number == 1:
        print("waiting", flush=True)
        for _ in range(600):
            time.sleep(0.1)  # short, since a signal just before a sleep does not end it
    write_shard(folder, number, *content)

signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever this process was started with
write_shard, shards.write_shard = shards.write_shard, waiting
sys.exit(main(sys.argv[1:]))
"""


def test_interrupted_by_the_keyboard_and_continued(world: Path, whole: Path, tmp_path: Path) -> None:
    config = settings(world, tmp_path / "cache", buckets=[], height=64, width=64, frames=5)
    flags = [f"--{k}={v}" for k, v in vars(config).items() if k != "clips" and v is not None]
    flags += ["--clips.height=64", "--clips.width=64", "--clips.frames=5"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WAITING, "cache", *flags], **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        told, said = process.communicate(timeout=60)
    assert process.returncode == 130 and told == ""
    assert said.splitlines()[-1] == "fsdit: interrupted" and "Traceback" not in said
    left = content(tmp_path / "cache")
    assert {name for name in left if "shard" in name} == {"shard-00000.safetensors", "shard-00000.json"}
    report = cache.make_cache(config)
    assert (report.made, report.kept, report.missing) == (1, 1, 0)
    now = content(tmp_path / "cache")
    assert {name: now[name] for name in left} == left and CachedLatents(tmp_path / "cache").samples


def test_two_processes_make_what_one_makes(world: Path, whole: Path, tmp_path: Path) -> None:
    first = cache.make_cache(settings(world, tmp_path / "two", rank=1, ranks=2))
    assert (first.made, first.missing) == (2, 2)
    with pytest.raises(UserError, match="not finished"):
        CachedLatents(tmp_path / "two")
    second = cache.make_cache(settings(world, tmp_path / "two", rank=0, ranks=2))
    assert (second.made, second.missing) == (2, 0) and first.samples + second.samples == 18
    assert content(tmp_path / "two") == content(whole)
    assert CachedLatents(tmp_path / "two").settings == CachedLatents(whole).settings


def test_options_of_the_encoding_reach_it(world: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, Any]] = []
    threads: list[int] = []
    encode, ahead = FSAE.encode, cache.ahead

    def spy(self: FSAE, video: torch.Tensor, memory: int | None = None) -> torch.Tensor:
        seen.append((len(video), memory))
        return encode(self, video)

    def spied(function: Any, items: Any, count: int) -> Iterator[Any]:
        threads.append(count)
        return ahead(function, items, count)

    monkeypatch.setattr(FSAE, "encode", spy)
    monkeypatch.setattr(cache, "ahead", spied)
    output = world / "options"
    config = settings(world, output, memory_gb=2.0, batch_size=2, readers=3, prompts=str(whole / "prompts"))
    cache.make_cache(config)
    assert threads == [3]
    assert {memory for _, memory in seen} == {2 * 10**9}
    # shards of 5; at 8 of 18 the bucket changes
    assert [count for count, _ in seen] == [2, 2, 1, 2, 1, 2, 2, 2, 1, 2, 1]
    a, b = CachedLatents(output), CachedLatents(whole)
    for index in range(len(b)):
        assert torch.allclose(a[index]["latents"], b[index]["latents"], atol=1e-5)
    with pytest.raises(UserError, match="abacus cannot be used"):
        cache.make_cache(replace(config, device="abacus"))


def test_readers_stay_a_little_ahead() -> None:
    done: list[int] = []
    stream = cache.ahead(lambda x: done.append(x) or 10 * x, range(100), 3)  # type: ignore[func-returns-value]
    assert [next(stream), next(stream)] == [0, 10]
    stream.close()  # type: ignore[attr-defined]
    assert set(done) <= set(range(5))
    assert list(cache.ahead(str, range(7), 2)) == [*"0123456"]


# --- unreadable files


def test_unreadable_files_are_left_out_and_counted(world: Path, whole: Path, tmp_path: Path, capsys: Any) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for k in range(3):
        shutil.copy(world / f"{k}.mp4", media)
    damaged = (media / "1.mp4").read_bytes()
    (media / "1.mp4").write_bytes(damaged[: len(damaged) // 3])  # the header promises more
    (media / "none.mp4").write_bytes(b"no video")
    config = settings(world, tmp_path / "cache", data=str(media), buckets=[BucketConfig(9, height=64, width=64)])
    flags = [f"--{k}={v}" for k, v in vars(config).items() if k != "clips" and v is not None]
    (tmp_path / "config.yaml").write_text("clips: {buckets: [{frames: 9, height: 64, width: 64}]}\n")
    assert main(["cache", "--config", str(tmp_path / "config.yaml"), *flags]) == 0
    told = capsys.readouterr()
    assert "none.mp4" in told.err and "1 file(s) skipped" in told.err and "1.mp4" in told.err.split("skipped")[-1]
    assert f"saved {tmp_path / 'cache'}: 4 samples, 2 shards made, 0 there before" in told.out
    data = CachedLatents(tmp_path / "cache")
    assert len(data) == 4 and {Path(s.path).name for s in data.samples} == {"0.mp4", "2.mp4"}
    order = data.order(Cut(0, 4, 1, 1, 0))
    assert sorted(order.micro_batch(0, 0)) == [(i, 0) for i in range(4)]


def test_a_cache_of_nothing_is_refused(world: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    damaged = (world / "0.mp4").read_bytes()
    (tmp_path / "media" / "0.mp4").write_bytes(damaged[: len(damaged) // 3])
    buckets = [BucketConfig(9, height=64, width=64)]
    config = settings(world, tmp_path / "cache", data=str(tmp_path / "media"), buckets=buckets)
    try:
        report = cache.make_cache(config)
    except UserError:
        return  # found before anything was encoded
    assert report.samples == 0 and len(report.skipped) == 1
    with pytest.raises(UserError, match="holds no sample"):
        CachedLatents(tmp_path / "cache")


# --- captions


@pytest.mark.parametrize(
    ("captions", "line"),
    [
        (["a", "", " "], "2 of 3 clips have no caption"),
        (["a", "", "b"], "1 of 3 clips has no caption"),
        (["", "", ""], "none of 3 clips has a caption"),
        ([""], "none of 1 clip has a caption"),
        (["a", "b", "c"], ""),
    ],
)
def test_missing_captions_are_counted(captions: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    report_missing_captions([Entry(Media(Path("clip.mp4")), caption) for caption in captions])
    assert capsys.readouterr() == ("", f"{line}; 'fsdit caption' writes captions\n" if line else "")


def test_a_cache_without_captions_is_told_once(
    world: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"ranks": 2, "prompts": str(whole / "prompts"), "clips_per_file": 1}
    cache.make_cache(settings(world, tmp_path / "cache", rank=0, **changes))
    assert capsys.readouterr().err.count("1 of 5 clips has no caption") == 1
    cache.make_cache(settings(world, tmp_path / "cache", rank=1, **changes))
    assert "no caption" not in capsys.readouterr().err


# --- refusals


def test_another_autoencoder_or_encoder_is_refused(world: Path, whole: Path, tmp_path: Path) -> None:
    other = save_autoencoder(tmp_path / "autoencoder", seed=1)
    save_encoders(tmp_path / "encoders", seed=1)
    alike = {"output": str(whole)}
    for changes, names in (
        ({"autoencoder": str(tmp_path / "autoencoder")}, "autoencoder"),
        ({"encoders": str(tmp_path / "encoders")}, "text encoder and image encoder"),
        ({"shard_size": 4}, "shard_size"),
        ({"latents": "fp16", "text_len": 8}, "text_len and precision of the latents"),
        ({"seed": 1}, "seed"),
        ({"encoders": ""}, "text encoder and image encoder and text_len and image_size"),
        ({"fps": 4.0}, "sources or clip settings"),
        (
            {"data": str(world / "picture.jsonl"), "buckets": [BucketConfig(1, height=64, width=64)]},
            "data and buckets and sources or clip settings and number of samples",
        ),
    ):
        with pytest.raises(UserError, match=f"is a cache that differs in its {names}; give what it was made with"):
            cache.make_cache(settings(world, **{**alike, **changes}))
    data = CachedLatents(whole)
    data.check_autoencoder(FSAE.from_pretrained(world / "autoencoder"))
    with pytest.raises(UserError, match="made with another autoencoder than the one that is given"):
        data.check_autoencoder(other)


def test_several_caches_are_one(world: Path, whole: Path, tmp_path: Path) -> None:
    one = settings(
        world, tmp_path / "one", data=str(world / "picture.jsonl"), frames=1, height=64, width=64, buckets=[]
    )
    one = replace(one, prompts=str(whole / "prompts"))
    cache.make_cache(one)
    data = CachedLatents([whole, tmp_path / "one"])
    assert len(data) == 18 + 2
    assert data[19]["caption"] == CAPTIONS[1] and torch.equal(data[0]["latents"], CachedLatents(whole)[0]["latents"])
    shares = [bucket.share for bucket in data.buckets]
    assert shares == pytest.approx([18 * 2 / 3, 18 / 3, 2])
    order = data.order(Cut(0, 1, 1, 1, 0))
    seen = {order.micro_batch(step, 0)[0][0] for step in range(300)}
    assert seen == set(range(20))

    save_autoencoder(tmp_path / "autoencoder", seed=1)
    changed = {"output": str(tmp_path / "other"), "autoencoder": str(tmp_path / "autoencoder")}
    cache.make_cache(replace(one, **changed))
    with pytest.raises(UserError, match="was cached with another autoencoder than"):
        CachedLatents([whole, tmp_path / "other"])
    with pytest.raises(UserError, match="no cache is given"):
        CachedLatents([])


def test_damage_is_named(world: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    shard = folder / "shard-00002.safetensors"
    good = shard.read_bytes()

    shard.write_bytes(good[:-100])
    with pytest.raises(UserError, match="shard-00002.safetensors is cut short or changed.*makes it anew"):
        CachedLatents(folder)
    shard.unlink()
    with pytest.raises(UserError, match="shard-00002.safetensors is missing; run"):
        CachedLatents(folder)
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    CachedLatents(folder)  # its size is right
    assert cache.make_cache(settings(world, folder)).made == 0
    assert cache.make_cache(settings(world, folder, verify=True)).made == 1
    assert content(folder) == content(whole)

    data = CachedLatents(folder)
    shard.write_bytes(good[: len(good) // 2])  # while the data set is open
    with pytest.raises(UserError, match="shard-00002.safetensors cannot be read"):
        data[12]
    (folder / "shard-00002.json").write_text('{"size": 1}')
    with pytest.raises(UserError, match="shard-00002.json is damaged"):
        CachedLatents(folder)
    (folder / "empty.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="empty.safetensors cannot be read"):
        CachedLatents(folder)
    header = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps({**header, "version": 0}))
    with pytest.raises(UserError, match="of version 0, not 1"):
        CachedLatents(folder)
    (folder / "cache.json").unlink()
    with pytest.raises(UserError, match="is no cache of clips"):
        CachedLatents(folder)


def test_a_transformer_that_does_not_fit_is_refused(whole: Path) -> None:
    data = CachedLatents(whole)
    fits = {"latent_channels": 4, "text_dim": 8, "text_len": TEXT_LEN, "image_dim": 16}
    data.check_fits(SimpleNamespace(**fits))
    for name, words in (
        ("latent_channels", "latents have 4 channels"),
        ("text_dim", "text embeddings have 8 channels"),
        ("image_dim", "image embeddings have 16 channels"),
        ("text_len", "text is cut at 16 tokens"),
    ):
        with pytest.raises(UserError, match=f"the cache's {words}, the transformer takes 9; give"):
            data.check_fits(SimpleNamespace(**{**fits, name: 9}))
    with pytest.raises(UserError, match="image embeddings have 16 channels, the transformer takes none"):
        data.check_fits(SimpleNamespace(**{**fits, "image_dim": None}))


def test_latents_that_half_precision_cannot_hold_are_refused(world: Path, whole: Path, tmp_path: Path) -> None:
    FSAE.from_preset("tiny", latent_channels=4, latents_std=[1e-9] * 4).save_pretrained(tmp_path / "autoencoder")
    one = settings(
        world, tmp_path / "one", data=str(world / "picture.jsonl"), autoencoder=str(tmp_path / "autoencoder")
    )
    one = replace(one, clips=ClipsConfig(buckets=BUCKETS[1:]), prompts=str(whole / "prompts"), latents="fp16")
    with pytest.raises(UserError, match="the latents of .*picture.png are not finite numbers in fp16; keep them"):
        cache.make_cache(one)


def test_bad_settings_are_refused(world: Path, tmp_path: Path) -> None:
    for bad, message in (
        ({"encoders": "nano"}, "trained with the transformer"),
        ({"rank": 2, "ranks": 2}, "rank is 2; it must be 0 to 1"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"data": ""}, "^data is ''"),
        ({"stride": 0}, "^clips.stride is 0"),
        ({"fps": 0.0}, "^clips.fps is 0.0"),
        ({"buckets": [], "frames": 6}, "^clips.frames is 6; it must be 1 \\+ 4k"),
        ({"buckets": [], "width": 100}, "^clips.width is 100; it must be a multiple of 64"),
    ):
        with pytest.raises(UserError, match=message):
            settings(world, tmp_path / "c", **bad)
    with pytest.raises(UserError, match="is a file"):
        cache.make_cache(settings(world, world / "list.jsonl"))
    with pytest.raises(UserError, match="encoders 'nothere' is no folder; give that of saved encoders"):
        cache.make_cache(settings(world, tmp_path / "c", encoders="nothere"))
    assert not (tmp_path / "c").exists()


def test_a_folder_of_other_things_is_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    media = tmp_path / "media"
    shutil.copytree(world, media, ignore=lambda folder, names: [name for name in names if "." not in name])
    before = content(media)
    with pytest.raises(UserError, match="media is no cache but holds 0.mp4; give a new or empty folder"):
        cache.make_cache(settings(world, media, data=str(media)))
    assert content(media) == before
    shards.check_place(tmp_path / "none")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".cache.tmp-1-ab.json").write_text("")  # another process is about to begin the cache
    shards.check_place(tmp_path / "begun")

    listed = Path.iterdir

    def while_another_begins(folder: Path) -> Iterator[Path]:
        for name in ("cache.json", "shard-00000.safetensors"):
            (folder / name).write_text("")
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", while_another_begins)
    shards.check_place(tmp_path / "begun")


# --- reading it in a training


def test_order_is_a_function_of_the_step_and_of_one_shape(whole: Path) -> None:
    data = CachedLatents(whole)
    order = order_of(data, Cut(3, 2, 2, 2, 1))
    batches = [order.micro_batch(step, micro) for step in range(60) for micro in range(2)]
    again = order_of(CachedLatents(whole), Cut(3, 2, 2, 2, 1))
    for step in reversed(range(60)):
        assert [again.micro_batch(step, micro) for micro in range(2)] == batches[2 * step : 2 * step + 2]
    shapes = [{tuple(data.shapes[index]) for index, _ in batch} for batch in batches]
    assert all(len(shape) == 1 for shape in shapes)
    wide = sum((4, 2, 1, 2) in shape for shape in shapes)
    assert 60 < wide < 100  # two of three
    assert {len(b) for b, shape in zip(batches, shapes, strict=True) if (4, 1, 1, 1) in shape} == {3}
    other = order_of(data, Cut(3, 2, 2, 2, 0))
    for number, batch in enumerate(batches):
        assert not set(batch) & set(other.micro_batch(*divmod(number, 2)))


def test_batches_by_loader_processes(whole: Path) -> None:
    data = CachedLatents(whole)
    order = order_of(data, Cut(0, 2, 1, 1, 0))
    data[0]  # a shard is open when the workers start
    loader: DataLoader[Any] = DataLoader(
        EpochItems(data), batch_sampler=MicroBatches(order, 1, 0, 4), collate_fn=data.collate, num_workers=1
    )
    for step, batch in enumerate(loader):
        items = [data.sample(*key) for key in order.micro_batch(step, 0)]
        assert batch["text"].shape == (len(items), TEXT_LEN, 8) and batch["caption"] == [i["caption"] for i in items]
        assert torch.equal(batch["latents"], torch.stack([item["latents"] for item in items]))
        assert torch.equal(batch["image_embedding"][-1], items[-1]["image_embedding"])
        used = len(items[0]["text"])
        assert torch.equal(batch["text"][0, :used], items[0]["text"]) and not batch["text"][0, used:].any()
    assert torch.equal(pickle.loads(pickle.dumps(data))[5]["latents"], data[5]["latents"])
    with pytest.raises(IndexError):
        data[len(data)]


def test_items_of_the_clips_are_those_of_the_list(world: Path) -> None:
    """`Places` counts along with the clips' own items."""
    config = settings(world, world, more_data=[SourceConfig(str(world / "picture.jsonl"), weight=2.0)])
    clips = BucketedClips(config.clips.mixture(config.data))
    places = list(cache.Places(clips, 2))
    assert [place.number for place in places] == list(range(len(places))) and len(places) == 2 * len(clips)
    assert [place.item for place in places[::2]] == list(range(len(clips)))
    for place in places:
        assert clips.bucket(place.item) is clips.buckets[place.bucket]
    assert [p.source for p in places if p.bucket == 1 and p.epoch == 0] == [0] * 5 + [1]


# --- the command


def test_help_needs_no_torch() -> None:
    code = """
import sys
from fsdit.cli import main
for argv in (["--help"], ["cache", "--help"], ["caption", "--help"]):
    assert main(argv) == 0
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for flag in ("--clips_per_file", "--latents", "--ranks", "--max_pixels"):
        assert flag in done.stdout
