"""The files under configs/: each is a training, and the nano ones are run one after the other."""

from __future__ import annotations

import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from fsae import FSAE
from fsdit import FSDiT
from fsdit.cli import main
from fsdit.preparation.config import CacheConfig
from fsdit.presets import PRESETS
from fsdit.training import run as training
from fsdit.training.config import TransformerConfig
from fsdit.training.data import CachedLatents

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = ("pretrain-images", "pretrain-256", "pretrain-512", "sft")


def parsed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> TransformerConfig:
    given: list[TransformerConfig] = []
    monkeypatch.setattr(training, "train_transformer", lambda config: given.append(config) or [Path("run")])
    assert main(["train", *arguments]) == 0
    return given[0]


def stages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[TransformerConfig]:
    return [parsed(["--config", str(folder / f"{stage}.yaml")], monkeypatch) for stage in STAGES]


def test_there_is_a_file_a_stage_at_both_sizes() -> None:
    assert (
        {f.stem for f in CONFIGS.glob("*.yaml")} == set(STAGES) == {f.stem for f in (CONFIGS / "nano").glob("*.yaml")}
    )


@pytest.mark.parametrize("folder", [CONFIGS, CONFIGS / "nano"], ids=["full", "nano"])
def test_each_stage_goes_on_from_the_one_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = stages(folder, monkeypatch)
    for stage, config in zip(STAGES, configs, strict=True):
        assert Path(config.loop.output_dir).name == stage
        assert config.loop.optimizer.betas == (0.9, 0.95)
        assert config.router_rate == 10.0 and config.loop.ema_decay > 0 and config.loop.validate_every
    for before, config in pairwise(configs):
        assert config.model == f"{before.loop.output_dir}/transformer"
        if not config.cache:
            assert config.encoders == before.loop.output_dir and config.trains_encoders
    steps = [config.loop.max_steps for config in configs]
    assert steps[1] == steps[2] == 2 * steps[0]  # paper §2.3.2
    assert configs[-1].loop.optimizer.learning_rate < configs[-2].loop.optimizer.learning_rate


def test_the_full_stages_are_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = stages(CONFIGS, monkeypatch)
    assert configs[0].model == "14b" in PRESETS
    sizes = [config.clips.shapes[0] for config in configs]
    assert [frames for frames, _, _ in sizes] == [1, 121, 121, 121]
    for (_, height, width), side in zip(sizes, (256, 256, 512, 512), strict=True):
        assert 0.9 < height * width / side**2 < 1.1
    for config in configs:
        assert config.gradient_checkpointing and config.loop.sharding == "fsdp2"
        assert (config.huber_delta, config.flow.mean, config.flow.std) == (0.25, 0.0, 1.0)
        assert config.validation_fps == 24
    assert configs[-1].flow.shift == 5.0


def test_a_file_that_reads_a_cache_says_how_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[CacheConfig] = []
    monkeypatch.setattr("fsdit.preparation.cache.make_cache", lambda config: made.append(config) or CacheReport)
    for file in CONFIGS.rglob("*.yaml"):
        config = parsed(["--config", str(file)], monkeypatch)
        comments = [line.lstrip("# ") for line in file.read_text().splitlines() if line.startswith("#")]
        commands = [line for line in "\n".join(comments).replace("\\\n", "").splitlines() if "fsdit cache" in line]
        assert len(commands) == len(config.cache)
        for command in commands:
            assert main(shlex.split(command)[1:]) == 0
            cache = made[-1]
            assert [cache.output] == config.cache and cache.autoencoder == config.autoencoder
            (bucket,), clips = cache.clips.mixture(cache.data).buckets, config.clips
            assert bucket.frames == clips.frames and (clips.height, clips.width) in bucket.sizes()
            assert clips.frames == 1 or cache.clips.fps == config.validation_fps
            assert cache.text_len == PRESETS["nano" if file.parent.name == "nano" else "14b"]["text_len"]
    assert len(made) == 5


class CacheReport:
    folder, samples, made, kept, missing, skipped = Path("cache"), 1, 1, 0, 0, {}


def test_flags_change_what_the_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--flow.shift", "7", "--buckets", "[{frames: 5, area: 4096}]", "--more_data", "[{path: b, weight: 2}]"]
    flags += ["--cache", "[]", "--data", "a", "--fps", "12", "--reader", "decord", "--model_options", "{num_layers: 3}"]
    flags += ["--huber_elements", "true"]
    config = parsed(["--config", str(CONFIGS / "sft.yaml"), *flags], monkeypatch)
    assert config.flow.shift == 7 and config.huber_elements and config.model_options == {"num_layers": 3}
    mixture = config.clips.mixture(config.data)
    assert [(s.path, s.weight) for s in mixture.sources] == [("a", 1.0), ("b", 2.0)]
    assert (mixture.fps, mixture.reader, mixture.buckets[0].area) == (12.0, "decord", 4096)


def test_the_nano_files_run_one_after_the_other(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_nano: None
) -> None:
    """Two steps each, at tiny sizes; each stage starts from what the one before it has left."""
    monkeypatch.chdir(tmp_path)
    FSAE.from_preset("nano").save_pretrained("autoencoder")
    for name in films.iterdir():
        (tmp_path / name.name).symlink_to(name)
    for stage in STAGES:
        settings: dict[str, Any] = yaml.safe_load((CONFIGS / "nano" / f"{stage}.yaml").read_text())
        clips, settings = settings["clips"], settings | {"validation_samples": 1, "validation_steps": 1}
        clips |= {"frames": min(5, clips["frames"]), "height": 64, "width": 64} | (
            {"fps": 24} if "fps" in clips else {}
        )
        settings["loop"] |= {"max_steps": 2, "batch_size": 2, "tensorboard": False, "validate_every": 2}
        for bucket in clips.get("buckets", []):
            bucket |= {"frames": 5, "area": 4096}
        Path(f"{stage}.yaml").write_text(yaml.safe_dump(settings))
        if stage == "sft":
            sizes = ["--frames", "5", "--height", "64", "--width", "64", "--text_len", "128", "--device", "cpu"]
            source = ["--data", "clips.jsonl", "--output", "chosen", "--autoencoder", "autoencoder"]
            assert main(["cache", *source, "--encoders", "runs/nano/pretrain-512", *sizes]) == 0
            assert len(CachedLatents("chosen")) == 24
        assert main(["train", "--config", f"{stage}.yaml"]) == 0
        FSDiT.from_pretrained(f"runs/nano/{stage}/transformer")
        shown = {file.name for file in Path(f"runs/nano/{stage}/samples/step-00000002").iterdir()}
        assert shown == {"captions.json", "00.png" if stage == "pretrain-images" else "00.mp4"}


@pytest.fixture
def tiny_nano(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FSAE, "presets", {"nano": FSAE.presets["tiny"]})
    small = {"dim": 64, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "latent_channels": 8}
    monkeypatch.setattr(FSDiT, "presets", {"nano": {**PRESETS["nano"], **small}})
