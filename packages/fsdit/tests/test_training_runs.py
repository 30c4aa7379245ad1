"""Whole trainings: from files and from a cache, what they leave behind, that they learn, and what they refuse."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fsae import FSAE
from fsae.data.buckets import BucketedClips
from fsae.data.config import BucketConfig, ClipsConfig, Sampling, SourceConfig
from fsae.data.datasets import VideoFolder
from fsae.data.video import write_video
from fsae.errors import UserError
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsdit import FSDiT
from fsdit.conditioning.encoders import pad_text
from fsdit.flow.path import FlowSchedule
from fsdit.preparation.cache import make_cache
from fsdit.preparation.config import CacheConfig
from fsdit.training import run as training
from fsdit.training.config import TransformerConfig
from fsdit.training.data import CachedLatents, Samples
from fsdit.training.run import train_transformer
from fsdit.training.task import FlowMatchingTask


def configuration(films: Path, parts: Path, output: Path, **changes: Any) -> TransformerConfig:
    loop = LoopConfig(
        output_dir=str(output),
        max_steps=changes.pop("max_steps", 2),
        batch_size=changes.pop("batch_size", 4),
        optimizer=OptimizerConfig(learning_rate=changes.pop("learning_rate", 1e-3)),
        schedule=ScheduleConfig("constant"),
        ema_decay=changes.pop("ema_decay", 0.9),
        save_every=changes.pop("save_every", 0),
        validate_every=changes.pop("validate_every", 0),
        tensorboard=False,
    )
    source: dict[str, Any] = {"data": str(films / "clips.jsonl"), "encoders": str(parts / "encoders")}
    if "cache" in changes:
        source = {}
    settings = {
        "autoencoder": str(parts / "autoencoder"),
        "model": str(parts / "transformer"),
        "clips": ClipsConfig(
            **{
                "frames": 5,
                "height": 64,
                "width": 64,
                **{k: changes.pop(k) for k in list(changes) if k in vars(ClipsConfig())},
            }
        ),
        "validation_steps": 2,
        "validation_samples": 2,
    }
    return TransformerConfig(loop=loop, **{**settings, **source, **changes})


def cached(films: Path, parts: Path, output: Path, **changes: Any) -> Path:
    settings = {"clips": ClipsConfig(5, 64, 64), "text_len": 32, "latents": "fp32", "device": "cpu"}
    made_by = {"autoencoder": str(parts / "autoencoder"), "encoders": str(parts / "encoders")}
    made_of = {"data": str(films / "clips.jsonl"), **made_by, **settings, **changes}
    make_cache(CacheConfig(output=str(output), **made_of))
    return output


def task_of(parts: Path, config: TransformerConfig, cache: Path, **options: Any) -> FlowMatchingTask:
    transformer = FSDiT.from_pretrained(parts / "transformer")
    torch.manual_seed(1)
    torch.nn.init.normal_(transformer.head.head.weight, std=0.2)
    data = CachedLatents(cache)
    empty = pad_text([data.empty_text], data.text_len)[0]
    return FlowMatchingTask(transformer, None, config, clips=Samples(empty_text=empty, **options))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- from a cache


def test_a_cache_trains_as_the_files_do(films: Path, parts: Path, cache: Path, tmp_path: Path) -> None:
    config = configuration(films, parts, tmp_path, caption_dropout=0.5)
    data = CachedLatents(cache)
    indices = [0, 5, 10, 15, 20, 23]
    kept = data.collate([data[i] for i in indices])
    clips = BucketedClips(ClipsConfig(5, 64, 64).mixture(str(films / "clips.jsonl")))
    fresh = torch.utils.data.default_collate([clips[i] for i in indices])
    assert kept["caption"] == fresh["caption"]

    task = task_of(parts, config, cache)
    encoders = training.load_encoders(config.encoders, 32)
    autoencoder = FSAE.from_pretrained(parts / "autoencoder")
    other = FlowMatchingTask(task.transformer, encoders, config, autoencoder)
    for seed in range(3):  # which drops several captions
        losses = [t.loss(b, seeded(seed))["loss"].item() for t, b in ((task, kept), (other, fresh))]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    contexts = [t.context(b, ["", *b["caption"][1:]], 2, negative=True) for t, b in ((task, kept), (other, fresh))]
    for name in ("text", "image", "negative"):
        one, two = (getattr(context, name) for context in contexts)
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert not contexts[0].text[0].allclose(contexts[0].text[1], atol=1e-3)


def test_from_a_cache_no_encoder_is_read(
    films: Path, parts: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "load_encoders", None)
    folders = train_transformer(configuration(films, parts, tmp_path / "run", cache=[str(cache)], autoencoder=""))
    assert [folder.name for folder in folders] == ["transformer"]
    trained = FSDiT.from_pretrained(folders[0])
    assert not torch.equal(trained.head.head.weight, FSDiT.from_pretrained(parts / "transformer").head.head.weight)
    assert trained.head.head.weight.abs().sum() > 0
    assert not (tmp_path / "run" / "samples").exists()


def test_from_a_cache_without_embeddings_encoders_are_trained(films: Path, parts: Path, tmp_path: Path) -> None:
    plain = cached(films, parts, tmp_path / "plain", encoders="")
    FSDiT(**{**FSDiT.load_config(parts / "transformer"), "text_dim": 128, "image_dim": 128}).save_pretrained(
        tmp_path / "dit"  # as wide as the nano encoders
    )
    config = configuration(films, parts, tmp_path / "run", cache=[str(plain)], model=str(tmp_path / "dit"))
    folders = train_transformer(config)
    assert [folder.name for folder in folders] == ["transformer", "text_encoder", "image_encoder", "tokenizer"]


def test_encoders_beside_their_embeddings_are_refused(films: Path, parts: Path, cache: Path, tmp_path: Path) -> None:
    config = configuration(films, parts, tmp_path / "run", cache=[str(cache)])
    for changes in ({"encoders": str(parts / "encoders")}, {"train_encoders": True}):
        with pytest.raises(UserError, match="holds what encoders gave; leave them out"):
            train_transformer(replace(config, **changes))
    pairs = cached(films, parts, tmp_path / "pairs", encoders="", pairs=True, clips=ClipsConfig(5, 128, 128))
    with pytest.raises(UserError, match="holds pairs of latents"):
        train_transformer(replace(config, cache=[str(pairs)]))
    plain = cached(films, parts, tmp_path / "plain", encoders="")
    with pytest.raises(UserError, match="plain was cached with another text encoder than"):
        train_transformer(replace(config, validation_data=str(plain)))


# --- from files


class Stop(Exception):
    pass


def test_buckets_and_frame_rate_reach_the_clips(
    films: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(training, "train", lambda *arguments: seen.append(arguments) or (_ for _ in ()).throw(Stop))
    base = configuration(films, parts, tmp_path, validate_every=1)

    def clips(**changes: Any) -> Any:
        with pytest.raises(Stop):
            train_transformer(replace(base, clips=replace(base.clips, **changes)))
        return seen[-1][1]

    assert isinstance(clips(), VideoFolder) and clips().sampling == Sampling(5, size=(64, 64))
    at_rate = clips(fps=12.0, frames=1)
    assert isinstance(at_rate, BucketedClips) and at_rate.config.fps == 12.0
    assert [(bucket.frames, bucket.size) for bucket in at_rate.buckets] == [(1, (64, 64))]
    mixed = clips(
        buckets=[BucketConfig(1, 64 * 64, batch_size=3), BucketConfig(5, height=64, width=64)],
        more_data=[SourceConfig(str(films), 2.0)],
        stride=1,
        reader="pyav",
    )
    assert [source.weight for source in mixed.config.sources] == [1.0, 2.0]
    assert {(bucket.frames, bucket.size, bucket.batch_size) for bucket in mixed.buckets} == {
        (1, (64, 64), 3),
        (5, (64, 64), None),
    }
    assert seen[-1][0].validation["video"].shape == (2, 3, 5, 64, 64)


def test_clips_come_at_the_rate_that_is_asked_for(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 frames a second every other one is 12, in training and in validation."""
    seen: list[Any] = []
    monkeypatch.setattr(training, "train", lambda *arguments: seen.append(arguments) or (_ for _ in ()).throw(Stop))
    (tmp_path / "films").mkdir()
    grey = [np.full((64, 64, 3), 10 + 20 * i, np.uint8) for i in range(12)]
    write_video(tmp_path / "films" / "clips.mp4", grey, 24)
    config = configuration(tmp_path, parts, tmp_path / "run", data=str(tmp_path / "films"), validate_every=1)
    for fps, step in ((None, 1), (12.0, 2)):
        with pytest.raises(Stop):
            train_transformer(replace(config, clips=replace(config.clips, fps=fps)))
        task, clips = seen[-1][:2]
        for clip in (clips[0]["video"], task.validation["video"][0]):
            numbers = ((clip.mean((0, 2, 3)) + 1) * 127.5 - 10) / 20
            assert numbers.diff().round().tolist() == [step] * 4


# --- what a run leaves


def test_samples_are_written_as_videos_with_their_captions(
    films: Path, parts: Path, cache: Path, tmp_path: Path
) -> None:
    for name, changes in {"files": {}, "cache": {"cache": [str(cache)]}}.items():
        output = tmp_path / name
        train_transformer(configuration(films, parts, output, validate_every=1, validation_fps=6.0, **changes))
        assert [path.name for path in sorted((output / "samples").iterdir())] == ["step-00000001", "step-00000002"]
        folder = output / "samples" / "step-00000002"
        captions = json.loads((folder / "captions.json").read_text())
        assert captions == {"00.mp4": "the camera pans left", "01.mp4": "the camera pans right"}
        with av.open(str(folder / "01.mp4")) as container:
            frames = list(container.decode(video=0))
            assert container.streams.video[0].average_rate == 6
        assert len(frames) == 5 and (frames[0].height, frames[0].width) == (64, 64)
        assert len(list((output / "validation").glob("*-samples.png"))) == 2


@pytest.fixture
def told(
    films: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What a training says before it loads its encoders."""

    def stop(*_: Any) -> None:
        raise Stop

    def call(**changes: Any) -> str:
        with pytest.raises(Stop):
            train_transformer(configuration(films, parts, tmp_path / "run", **changes))
        return capsys.readouterr().err

    monkeypatch.setattr(training, "_encoders", stop)
    return call


@pytest.mark.parametrize("mixture", [False, True])
def test_clips_without_captions_are_told_by_one_process(
    films: Path, cache: Path, tmp_path: Path, mixture: bool, told: Callable[..., str]
) -> None:
    source = {"buckets": [BucketConfig(5, height=64, width=64)]} if mixture else {}
    rows = [{"path": str(films / "coffee-up.mp4"), "caption": caption} for caption in ("up", "", " ")]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "2 of 3 clips have no caption" in told(data=str(tmp_path / "list.jsonl"), **source)
    assert "none of 24 clips has a caption" in told(data=str(films), **source)
    assert "caption" not in told(**source)
    assert "caption" not in told(cache=[str(cache)])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RANK", "1")
        assert "caption" not in told(data=str(films), **source)


def test_single_frames_are_pictures(films: Path, parts: Path, tmp_path: Path) -> None:
    train_transformer(configuration(films, parts, tmp_path, validate_every=2, frames=1))
    (folder,) = (tmp_path / "samples").iterdir()
    assert {path.name for path in folder.iterdir()} == {"00.png", "01.png", "captions.json"}


def test_a_place_that_takes_no_samples_ends_no_training(
    films: Path, parts: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "samples").write_text("a file where a folder should be")
    config = configuration(films, parts, tmp_path, cache=[str(cache)], validate_every=1)
    assert train_transformer(config)
    assert "samples could not be written" in capsys.readouterr().err


def test_held_out_clips_come_from_a_cache_as_well(films: Path, parts: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(
        json.dumps({"path": str(films / "coffee-up.mp4"), "caption": "held out"}) + "\n"
    )
    held_out = cached(tmp_path, parts, tmp_path / "held-out", data=str(tmp_path / "list.jsonl"))
    config = configuration(
        films, parts, tmp_path / "run", cache=[str(cache)], validation_data=str(held_out), validate_every=2
    )
    train_transformer(config)
    captions = json.loads((tmp_path / "run" / "samples" / "step-00000002" / "captions.json").read_text())
    assert captions == {"00.mp4": "held out"}


def test_a_step_leaves_nothing_behind(films: Path, parts: Path, cache: Path, tmp_path: Path) -> None:
    losses: list[weakref.ref[Tensor]] = []

    class Watched(FlowMatchingTask):
        def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
            assert not any(loss() is not None for loss in losses[:-1])
            output = super().loss(batch, generator)
            losses.append(weakref.ref(output["loss"]))
            return output

    config = configuration(films, parts, tmp_path, cache=[str(cache)], max_steps=4, validate_every=2)
    task, data = task_of(parts, config, cache), CachedLatents(cache)
    watched = Watched(
        task.transformer, None, config, clips=Samples(batch=data.collate([data[0]]), empty_text=task.empty_text)
    )
    training.train(watched, data, config.loop, data.collate)
    assert len(losses) == 4


# --- learning


class Mute(Dataset[Any]):
    """A cache whose captions and pictures are those of other clips, drawn anew in each epoch."""

    def __init__(self, cache: CachedLatents) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def sample(self, index: int, epoch: int) -> Any:
        order = torch.randperm(len(self), generator=seeded(epoch)).tolist()
        other = self.cache[order[index]]
        return {**other, "latents": self.cache[index]["latents"]}


def test_it_learns_real_clips_and_needs_their_conditions(films: Path, parts: Path, cache: Path, tmp_path: Path) -> None:
    """The noise is so strong that only first latent, picture and caption tell what the clip is."""
    data = CachedLatents(cache)
    batch = data.collate([data[i] for i in range(len(data))])
    shuffled = {**batch, **{name: batch[name].roll(1, 0) for name in ("text", "image_embedding")}}
    losses = {}
    for name, samples in {"own": data, "others'": Mute(data)}.items():
        config = configuration(
            films,
            parts,
            tmp_path / name,
            cache=[str(cache)],
            flow=FlowSchedule(20.0),
            caption_dropout=0.0,
            max_steps=150,
            batch_size=12,
            learning_rate=4e-3,
            ema_decay=0.0,
        )
        task = task_of(parts, config, cache)
        torch.nn.init.zeros_(task.transformer.head.head.weight)

        def loss(clips: Any, task: FlowMatchingTask = task) -> float:
            with torch.no_grad():
                return sum(task.loss(clips, seeded(seed))["loss"].item() for seed in range(4)) / 4

        before = loss(batch)
        training.train(task, samples, config.loop, data.collate)
        losses[name] = before, loss(batch), loss(shuffled)
    before, after, misled = losses["own"]
    assert after < 0.6 * before
    assert misled > 1.3 * after
    assert losses["others'"][1] > 1.3 * after


# --- what is refused


@pytest.mark.filterwarnings("ignore:skipped")
def test_what_does_not_fit_is_refused_before_the_model_is_built(
    films: Path, parts: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FSDiT, "from_preset_or_folder", lambda *_: pytest.fail("the model was built"))
    torch.manual_seed(3)
    other = FSAE.from_pretrained(parts / "autoencoder")
    torch.nn.init.normal_(other.encoder.conv_out.weight)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "file").write_text("")
    from_files = configuration(films, parts, tmp_path / "run", validate_every=1)
    from_cache = configuration(films, parts, tmp_path / "run", validate_every=1, cache=[str(cache)])
    shutil.copytree(cache, tmp_path / "torn")
    (tmp_path / "torn" / "shard-00000.safetensors").write_bytes(b"torn")
    cases: list[tuple[TransformerConfig, dict[str, Any], str]] = [
        (from_files, {"model": "nanno"}, "neither a preset"),
        (from_files, {"model_options": {"dim": 32}}, "model_options dim cannot change the saved model"),
        (from_files, {"model": "nano", "model_options": {"dym": 32}}, "has no option 'dym'"),
        (from_files, {"autoencoder": str(tmp_path / "none")}, "no model folder"),
        (from_files, {"autoencoder": ""}, "autoencoder is not given"),
        (from_files, {"data": ""}, "neither data nor cache is given"),
        (from_files, {"data": str(tmp_path / "none")}, "neither a folder nor a list"),
        (from_files, {"encoders": str(tmp_path / "none")}, 'neither "nano" nor a folder'),
        (from_files, {"model": "nano"}, "text encoder gives 32 channels, the transformer takes 128"),
        (from_files, {"clips": ClipsConfig(9, 64, 64)}, "none of the 24 files"),
        (from_files, {"loop": replace(from_files.loop, output_dir=str(tmp_path / "file"))}, "is a file"),
        (from_cache, {"cache": [str(films)]}, "is no cache"),
        (from_cache, {"cache": [str(tmp_path / "torn")]}, "is cut short"),
        (from_cache, {"autoencoder": str(tmp_path / "other")}, "another autoencoder"),
        (from_cache, {"model": "nano"}, "latents have 4 channels, the transformer takes 128"),
        (from_cache, {"clips": ClipsConfig(5, 128, 64)}, r"no clip .* 64x128 .* \(5 of 64x64\)"),
        (from_cache, {"validation_data": str(films)}, "is no cache"),
        (from_cache, {"clips": ClipsConfig(5, 64, 64, fps=24.0)}, "leave clips.fps out"),
        (from_cache, {"clips": ClipsConfig(5, 64, 64, stride=2)}, "leave clips.stride out"),
        (from_cache, {"clips": ClipsConfig(5, 64, 64, [BucketConfig(1, 4096)])}, "leave clips.buckets out"),
    ]
    for config, changes, reason in cases:
        with pytest.raises(UserError, match=reason):
            train_transformer(replace(config, **changes))
    with pytest.raises(pytest.fail.Exception):  # and otherwise it is built
        train_transformer(from_cache)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"clips": {"frames": 6}}, "^clips.frames is 6; it must be 1"),
        ({"clips": {"height": 100}}, "^clips.height is 100; it must be a multiple of 64"),
        ({"clips": {"fps": 0.0}}, "^clips.fps is 0.0"),
        ({"clips": {"reader": "none"}}, "^clips.reader is 'none'"),
        ({"cache": ["a"], "data": "b"}, "reads one of them"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        TransformerConfig(loop=LoopConfig("run"), **changes | {"clips": ClipsConfig(**changes.get("clips", {}))})
