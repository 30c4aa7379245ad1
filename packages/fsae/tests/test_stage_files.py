"""A training from its configuration: models, parts, clips; and the files under configs/."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from fsae.cli import main
from fsae.data.buckets import BucketedClips
from fsae.data.config import BucketConfig, ClipsConfig, SourceConfig
from fsae.data.datasets import VideoFolder
from fsae.data.video import write_video
from fsae.errors import CheckpointError, UserError
from fsae.losses.alignment import TrunkTeacher
from fsae.model import FSAE
from fsae.stages import start
from fsae.stages import task as autoencoder
from fsae.stages.config import (
    AdversarialConfig,
    AlignmentConfig,
    AutoencoderConfig,
    DistillationConfig,
    PatchConfig,
)
from fsae.stages.objective import Adversary, Objective
from fsae.stages.start import prepared_model
from fsae.stages.task import AutoencoderTask, train_autoencoder
from fsae.training.config import LoopConfig

CONFIGS = Path(__file__).parents[1] / "configs"


class Clips(torch.utils.data.Dataset[dict[str, Any]]):
    """A few clips of noise."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"video": torch.rand(3, 5, 64, 64, generator=generator) * 2 - 1}


def one_step(folder: Path, **changes: Any) -> LoopConfig:
    return LoopConfig(str(folder), **{"max_steps": 1, "ema_decay": 0.0, "tensorboard": False, **changes})


def configuration(folder: Path, **changes: Any) -> AutoencoderConfig:
    clips = ClipsConfig(
        **{
            "frames": 5,
            "height": 64,
            "width": 64,
            **{k: changes.pop(k) for k in list(changes) if k in vars(ClipsConfig())},
        }
    )
    return AutoencoderConfig("clips", one_step(folder), clips, **{"model": "tiny", "statistics_batches": 1, **changes})


def test_presets_take_options_and_saved_models_conversions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    causal = prepared_model(
        configuration(tmp_path, model_options={"decoder_kind": "causal", "first_frame_injection": False})
    )
    assert causal.config.decoder_kind == "causal" and not causal.is_gradient_checkpointing
    causal.save_pretrained(tmp_path / "causal")
    options = {"noise": 0.1, "injection_head_dim": 4}
    standard = prepared_model(
        configuration(
            tmp_path,
            model=str(tmp_path / "causal"),
            convert="standard",
            model_options=options,
            gradient_checkpointing=True,
            channels_last=False,
        )
    )
    assert (standard.config.decoder_kind, standard.config.noise, standard.config.injection_head_dim) == (
        "standard",
        0.1,
        4,
    )
    assert standard.is_gradient_checkpointing and "carried" in capsys.readouterr().err
    standard.save_pretrained(tmp_path / "standard")
    lite_options = {"decoder_widths": [4, 4, 8, 8, 8, 8, 8]}
    lite = prepared_model(
        configuration(tmp_path, model=str(tmp_path / "standard"), convert="lite", model_options=lite_options)
    )
    assert lite.config.decoder_kind == "lite" and list(lite.config.decoder_widths) == lite_options["decoder_widths"]
    asked: list[Any] = []
    monkeypatch.setattr(start, "from_dc_ae", lambda *a, **k: asked.append((a, k)) or (causal, "report"))
    prepared_model(configuration(tmp_path, model="dc", convert="dc-ae", model_options={"latent_channels": 4}))
    assert asked == [(("dc",), {"seed": 0, "progress": True, "latent_channels": 4})]
    with pytest.raises(UserError, match="cannot change the saved model"):
        prepared_model(configuration(tmp_path, model=str(tmp_path / "causal"), model_options={"noise": 0.1}))
    with pytest.raises(UserError, match="made with decoder_widths alone"):
        prepared_model(
            configuration(tmp_path, model=str(tmp_path / "standard"), convert="lite", model_options={"noise": 0.1})
        )


def test_a_configuration_becomes_a_task(tmp_path: Path, lpips_state: dict[str, Tensor]) -> None:
    save_file(lpips_state, tmp_path / "lpips.safetensors")
    torch.manual_seed(0)
    weights = Adversary(AdversarialConfig(weight=1, width=2, scales=1)).discriminator.state_dict()
    save_file(weights, tmp_path / "discriminator.safetensors")
    parts = {
        "adversarial": AdversarialConfig(0.2, 5, 2, 1, 3.0, 7, str(tmp_path / "discriminator.safetensors")),
        "alignment": AlignmentConfig("lpips", 0.4, 0.1, 0.2, 99, 0.3),
        "patch": PatchConfig(20, 5),
    }
    files = [str(tmp_path / "lpips.safetensors")]
    config = configuration(tmp_path, perceptual_weights=files, perceptual_weight=0.3, perceptual_slice=3, **parts)
    model = prepared_model(config)
    task = AutoencoderTask(config, model)
    objective = task.objective
    assert objective.perceptual is not None
    assert (objective.perceptual.weight, objective.perceptual.slice_frames) == (0.3, 3)
    assert objective.adversary is not None and objective.adversary.config == parts["adversarial"]
    assert all(torch.equal(v, weights[k]) for k, v in task.opponents["discriminator"].state_dict().items())
    assert objective.alignment is not None and objective.alignment.config == parts["alignment"]
    loss = objective.alignment.loss
    assert (loss.cosine_margin, loss.distance_margin, loss.positions) == (0.1, 0.2, 99)
    assert loss.projection.weight.shape == (256, 8) and isinstance(objective.alignment.teacher, TrunkTeacher)
    assert task.settings["adversarial"]["r1_every"] == 7 and task.settings["alignment"]["adaptive"] == 0.3
    plain = AutoencoderTask(configuration(tmp_path), model)
    assert plain.objective == Objective() and not plain.opponents and not plain.frozen
    model.save_pretrained(tmp_path / "teacher")
    distillation = DistillationConfig(str(tmp_path / "teacher"), 0.5, 0.0)
    imitating = AutoencoderTask(configuration(tmp_path, distillation=distillation, freeze_encoder=True), model)
    imitation = imitating.objective.distillation
    assert imitation is not None and imitation.config == distillation and imitation.stages == []
    assert set(imitating.frozen) == {"distilled"} and imitating.settings["freeze_encoder"]
    save_file({k: v for k, v in list(weights.items())[1:]}, tmp_path / "discriminator.safetensors")
    with pytest.raises(CheckpointError, match=r"scales\.0"):
        AutoencoderTask(config, model)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"convert": "lit"}, "convert is 'lit'"),
        ({"fps": 0.0}, "clips.fps is 0.0; it must be a number above 0, or null"),
        ({"alignment": AlignmentConfig("lpips")}, "no perceptual_weights"),
        ({"alignment": AlignmentConfig("x"), "freeze_encoder": True}, "which is frozen"),
        ({"distillation": DistillationConfig("x")}, "set freeze_encoder to true"),
        ({"perceptual_slice": -1}, "perceptual_slice is -1"),
    ],
    ids=str,
)
def test_options_that_exclude_each_other(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        configuration(tmp_path, **changes)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: AdversarialConfig(weight=-1), r"adversarial\.weight is -1"),
        (lambda: AdversarialConfig(r1_every=0), r"adversarial\.r1_every is 0"),
        (lambda: AlignmentConfig(positions=1), r"alignment\.positions is 1"),
        (lambda: DistillationConfig(pixel_weight=-1), r"distillation\.pixel_weight is -1"),
        (lambda: PatchConfig(cells=-1), r"patch\.cells is -1"),
    ],
)
def test_parts_refuse_what_cannot_be(make: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make()


def test_a_frozen_encoders_statistics_are_kept(tmp_path: Path) -> None:
    model = prepared_model(configuration(tmp_path))
    model.register_to_config(latents_mean=[0.5] * 8, latents_std=[3.0] * 8)
    model.save_pretrained(tmp_path / "model")
    saved = str(tmp_path / "model")
    adversarial = AdversarialConfig(weight=0.1, width=2, scales=1)
    folder = train_autoencoder(
        configuration(tmp_path / "frozen", model=saved, freeze_encoder=True, adversarial=adversarial), Clips()
    )
    assert FSAE.from_pretrained(folder).config.latents_mean == [0.5] * 8
    assert set(load_file(tmp_path / "frozen" / "discriminator.safetensors")) == set(
        Adversary(adversarial).discriminator.state_dict()
    )
    folder = train_autoencoder(configuration(tmp_path / "trained", model=saved), Clips())
    assert FSAE.from_pretrained(folder).config.latents_mean != [0.5] * 8


# --- mixtures of clips, and the files under configs/


def films(folder: Path, *sizes: tuple[int, int, int]) -> Path:
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for number, (frames, height, width) in enumerate(sizes):
        pixels = generator.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
        write_video(folder / f"{number}.mp4", pixels, 8)
    return folder


def test_buckets_reach_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stop_here(*arguments: Any) -> None:
        seen.extend(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(autoencoder, "train", stop_here)
    data, more = films(tmp_path / "a", (9, 64, 64)), films(tmp_path / "b", (9, 64, 128))
    buckets = [BucketConfig(1, 64 * 64, batch_size=3), BucketConfig(5, height=64, width=128, weight=2.0)]
    config = replace(
        configuration(tmp_path / "run", buckets=buckets, more_data=[SourceConfig(str(more), 4.0)], fps=8.0, stride=2),
        data=str(data),
    )
    config = replace(config, loop=replace(config.loop, validate_every=1))
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(config)
    task, clips, _ = seen
    assert isinstance(clips, BucketedClips) and clips.config == config.clips.mixture(str(data))
    assert (clips.config.fps, clips.config.stride, clips.config.reader) == (8.0, 2, "pyav")
    assert [(source.path, source.weight) for source in clips.config.sources] == [(str(data), 1.0), (str(more), 4.0)]
    assert task.validation.shape == (1, 3, 5, 64, 64)  # of data, at the configuration's own size
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(replace(config, clips=replace(config.clips, buckets=[], more_data=[], fps=None)))
    assert isinstance(seen[1], VideoFolder)


def parsed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> AutoencoderConfig:
    given: list[AutoencoderConfig] = []
    monkeypatch.setattr(autoencoder, "train_autoencoder", lambda config: given.append(config) or Path("run"))
    assert main(["train", *arguments]) == 0
    return given[0]


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_each_file_is_a_training(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parsed(["--config", str(file)], monkeypatch)
    assert config.loop.output_dir.endswith(file.stem)
    assert config.perceptual_weight == 0.1 and config.perceptual_weights
    assert config.freeze_encoder == (file.stem in ("standard", "lite"))
    assert config.convert == {"standard": "standard", "lite": "lite"}.get(
        file.stem, "dc-ae" if (file.stem, file.parent.name) == ("stage1", "configs") else "none"
    )
    if config.adversarial.weight:
        assert config.adversarial.weight == 0.1
    if config.alignment.teacher:
        assert (config.alignment.weight, config.alignment.cosine_margin, config.alignment.distance_margin) == (
            0.5,
            0.5,
            0.25,
        )


def test_there_is_a_file_a_stage_at_both_sizes() -> None:
    stages = {"stage1", "stage2", "stage3", "vf", "standard", "lite"}
    assert {f.stem for f in CONFIGS.glob("*.yaml")} == stages == {f.stem for f in (CONFIGS / "nano").glob("*.yaml")}


def test_flags_change_what_the_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--adversarial.start", "7", "--patch.cells", "50", "--buckets", "[{frames: 5, area: 4096}]"]
    flags += ["--model_options", "{noise: 0.1}", "--fps", "null"]
    config = parsed(["--config", str(CONFIGS / "stage3.yaml"), *flags], monkeypatch)
    assert (config.adversarial.start, config.adversarial.weight) == (7, 0.1)
    assert config.patch == PatchConfig(50, 495616) and config.clips.buckets == [BucketConfig(5, 4096)]
    assert config.model_options == {"noise": 0.1} and config.clips.fps is None


def test_the_nano_files_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lpips_state: dict[str, Tensor]
) -> None:
    """Two steps each, at tiny sizes; each stage starts from what the one before it has left."""
    monkeypatch.chdir(tmp_path)
    films(tmp_path / "data", (13, 128, 128), (13, 64, 64))
    (tmp_path / "weights").mkdir()
    save_file(lpips_state, tmp_path / "weights" / "lpips-alexnet.safetensors")
    kinds = []
    for stage in ("stage1", "stage2", "stage3", "vf", "standard", "lite"):
        settings = yaml.safe_load((CONFIGS / "nano" / f"{stage}.yaml").read_text())
        settings["clips"] |= {"frames": 5, "height": 64, "width": 64}
        settings["statistics_batches"] = 1
        settings["loop"] |= {"max_steps": 2, "tensorboard": False, "validate_every": 2}
        for bucket in settings["clips"].get("buckets", []):
            large = bucket["height"] > 128
            bucket |= {
                "frames": min(bucket["frames"], 5),
                "height": 128 if large else 64,
                "width": 128 if large else 64,
            }
        if stage == "stage1":
            settings["model"] = "tiny"
        if stage == "stage2":
            settings["adversarial"]["start"] = 1
        if stage == "stage3":
            settings["patch"] = {"cells": 13, "above": 4096}
        if stage == "lite":
            settings["model_options"]["decoder_widths"] = [4, 4, 8, 8, 8, 8, 8]
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(settings))
        assert main(["train", "--config", f"{stage}.yaml"]) == 0
        model = FSAE.from_pretrained(tmp_path / "runs" / "nano" / stage / "autoencoder")
        kinds.append(model.config.decoder_kind)
        assert (tmp_path / "runs" / "nano" / stage / "discriminator.safetensors").exists() == (
            stage in ("stage2", "stage3")
        )
    assert kinds == ["causal"] * 4 + ["standard", "lite"]
