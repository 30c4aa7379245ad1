"""Training of the refiner: what it is shown, that it uses the draft, and from videos to folders."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from fsae import FSAE
from fsae.data.config import ClipsConfig
from fsae.data.video import write_video
from fsae.errors import UserError
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsae.training.loop import train
from fsdit import FSDiT
from fsdit.conditioning import Encoders, FlowBatch, ImageEncoder, TextEncoder, first_frame_condition, nano_tokenizer
from fsdit.conditioning.nano import new_image_encoder, new_text_encoder
from fsdit.flow.path import FlowSchedule
from fsdit.preparation.cache import make_cache
from fsdit.preparation.config import CacheConfig
from fsdit.training.data import Samples
from fsupsampler import LatentUpsampler
from fsupsampler.refiner import DynamicMask, deviation_latents, refiner_condition
from fsupsampler.training import refiner as training
from fsupsampler.training.config import MaskConfig, RefinerConfig, RegularizationConfig
from fsupsampler.training.refiner import FrozenParts, RefinerTask, train_refiner
from fsupsampler.upsampler import nearest_upsample

NONE = RegularizationConfig(dropout=0.0, replacement=0.0, shuffle=0.0)


def settings(tmp_path: Path, **changes: Any) -> RefinerConfig:
    loop = LoopConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=changes.pop("max_steps", 2),
        batch_size=8,
        optimizer=OptimizerConfig(learning_rate=3e-3),
        schedule=ScheduleConfig(kind="constant"),
        ema_decay=0.0,
        tensorboard=False,
        save_every=0,
    )
    options: dict[str, Any] = {"regularization": NONE, "caption_dropout": 0.0, **changes}
    return RefinerConfig(data="", autoencoder="", upsampler="", encoders="", loop=loop, **options)


def encoders() -> Encoders:
    torch.manual_seed(0)
    text = TextEncoder(new_text_encoder("tiny"), nano_tokenizer(), 16)
    return Encoders(text, ImageEncoder(new_image_encoder("tiny")))


def transformer(seed: int = 0) -> FSDiT:
    torch.manual_seed(seed)
    return FSDiT.from_preset("tiny", latent_channels=4)


def upsampler() -> LatentUpsampler:
    torch.manual_seed(0)
    model = LatentUpsampler.from_preset("tiny", latent_channels=4)
    nn.init.normal_(model.conv_out.weight, std=0.02)
    return model.eval()


def pairs(count: int = 32, mismatched: bool = False) -> list[dict[str, Any]]:
    """Clips in which only the low latents tell what comes after frame 0."""
    low = torch.randn(count, 4, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    high = nearest_upsample(low)
    if mismatched:
        low = low.roll(1, dims=0)
    image = torch.zeros(3, 64, 64)
    return [{"low": a, "high": b, "caption": "a", "image": image} for a, b in zip(low, high, strict=True)]


def batch(count: int = 4) -> dict[str, Any]:
    data = pairs()
    return default_collate([data[i] for i in range(count)])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Oracle(nn.Module):
    """In the refiner's place: records what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        peer = FSDiT.from_preset("tiny", latent_channels=4)
        self.config, self.public_config = peer.config, peer.public_config

    def forward(self, inputs: Tensor, timestep: Tensor, text: Tensor, image: Tensor) -> Tensor:
        self.seen = inputs, timestep
        return self.weight + torch.zeros_like(inputs[:, :4])

    def shown(self) -> tuple[Tensor, Tensor]:
        """(mask, condition) of the last call."""
        return self.seen[0][:, 4:8], self.seen[0][:, 8:]

    def router_parameters(self) -> list[nn.Parameter]:
        return []


def oracle_task(tmp_path: Path, **changes: Any) -> tuple[Oracle, RefinerTask]:
    base = changes.pop("base", None)
    oracle = Oracle()
    return oracle, RefinerTask(oracle, encoders(), FrozenParts(upsampler(), base=base), settings(tmp_path, **changes))


# --- what the refiner is shown ----


def test_loss_is_flow_matching_of_the_high_latents_on_the_drafts_condition(tmp_path: Path) -> None:
    oracle, task = oracle_task(tmp_path, flow=FlowSchedule(3.0), huber_delta=0.4)
    data = batch()
    task.mask.eval()
    out = task.loss(data, generator(5))
    mask, condition = oracle.shown()
    expected = refiner_condition(data["high"][:, :, :1], upsampler()(data["low"]), DynamicMask())
    assert torch.allclose(condition, expected.latents, atol=1e-6) and torch.allclose(mask, expected.mask, atol=1e-5)
    assert mask[:, :, 0].eq(1).all() and mask[:, :, 1:].max() <= 0.9
    noisy, timestep = oracle.seen[0][:, :4], oracle.seen[1]
    s = (timestep / 1000).view(-1, 1, 1, 1, 1)
    noise = (noisy - (1 - s) * data["high"]) / s
    mse = (noise - data["high"]).square().flatten(1).mean(1)
    assert out["loss"].item() == pytest.approx(((mse + 0.4**2).sqrt() - 0.4).mean().item(), rel=1e-3)
    assert noise.std().item() == pytest.approx(1.0, abs=0.15)


def test_a_prepared_batch_is_the_high_latents_with_their_drafts_condition(tmp_path: Path) -> None:
    text, _ = encoders()
    _, task = oracle_task(tmp_path)
    task.mask.eval()
    data = batch()
    clean = task.prepare(data, generator())
    expected = refiner_condition(data["high"][:, :, :1], upsampler()(data["low"]), DynamicMask())
    assert torch.equal(clean.latents, data["high"])
    assert torch.allclose(clean.condition.latents, expected.latents, atol=1e-6)
    assert torch.allclose(clean.condition.mask, expected.mask, atol=1e-5)
    assert torch.allclose(clean.context.text, text(data["caption"]).embeddings, atol=1e-5)
    assert torch.allclose(clean.context.negative, text([""] * 4).embeddings, atol=1e-5)
    other = {**data, "low": data["low"].roll(1, dims=0)}  # another batch, while the first is still in hand
    assert not torch.equal(task.prepare(other, generator()).condition.latents, clean.condition.latents)


@pytest.mark.parametrize("training_mode", [True, False])
def test_a_still_is_shown_nothing_of_itself(tmp_path: Path, training_mode: bool) -> None:
    base = transformer(seed=3).eval().requires_grad_(False)
    oracle, task = oracle_task(tmp_path, base=base, regularization=RegularizationConfig())
    images: list[Tensor] = []
    oracle.register_forward_pre_hook(lambda _, given: images.append(given[3]))
    data = batch()
    still = {**data, "low": data["low"][:, :, :1], "high": data["high"][:, :, :1]}
    oracle.train(training_mode)
    assert task.loss(still, generator())["loss"].isfinite()
    mask, condition = oracle.shown()
    assert condition.shape == still["high"].shape and not mask.any() and not condition.any()
    assert not images[0].any()
    task.loss(data, generator())  # the control
    mask, condition = oracle.shown()
    assert mask[:, :, 0].eq(1).all() and condition[:, :, 0].any() and images[1].any()


def test_default_noise_levels_are_the_refiners(tmp_path: Path) -> None:
    assert settings(tmp_path).flow.shift == 8.0 and settings(tmp_path).base_flow.shift == 5.0
    assert (settings(tmp_path).validation_steps, settings(tmp_path).validation_guidance) == (8, 1.0)


def test_regularisation_acts_in_training_and_rests_in_validation(tmp_path: Path) -> None:
    oracle, task = oracle_task(tmp_path, regularization=RegularizationConfig(dropout=1.0))
    data = batch()
    task.loss(data, generator())
    mask, condition = oracle.shown()
    assert not mask[:, :, 1:].any() and not condition[:, :, 1:].any() and mask[:, :, 0].eq(1).all()
    oracle.eval()
    task.loss(data, generator())
    mask, condition = oracle.shown()
    assert mask[:, :, 1:].min() > 0 and condition[:, :, 1:].abs().min() > 0


def test_replaced_frames_are_the_true_high_latents(tmp_path: Path) -> None:
    options = RegularizationConfig(dropout=0.0, replacement=1.0, replacement_fraction=1.0, shuffle=0.0)
    oracle, task = oracle_task(tmp_path, regularization=options)
    data = batch(32)
    task.loss(data, generator())
    mask, condition = oracle.shown()
    true = (mask == 1)[:, :1].expand_as(condition)
    assert true[:, :, 1:].any() and torch.equal(condition[true], data["high"][true])


def test_mask_options_reach_the_mask(tmp_path: Path) -> None:
    def shown(**options: Any) -> Tensor:
        oracle, task = oracle_task(tmp_path, mask=MaskConfig(**options))
        with torch.no_grad():
            task.upsampler.conv_out.weight.mul_(20)  # a draft with errors that differ over the frame
        for _ in range(2):
            task.loss(batch(), generator())
        return oracle.shown()[0][:, :, 1:]

    plain = shown()
    assert shown(low=0.3, high=0.6).min() >= 0.3 and shown(low=0.3, high=0.6).max() <= 0.6
    assert torch.allclose(shown(inverted=True) + plain, torch.tensor(1.0), atol=1e-5)
    assert plain[0, 0, 0].std() > 1e-3 and shown(scalar=True)[0, 0, 0].std() < 1e-6
    _, fast = oracle_task(tmp_path, mask=MaskConfig(decay=0.25))
    assert fast.mask.decay == 0.25


def test_the_mask_learns_its_percentiles_in_training_alone(tmp_path: Path) -> None:
    _, task = oracle_task(tmp_path)
    task.loss(batch(), generator())
    assert task.mask.updates == 1 and task.mask.error_95 < 1
    task.mask.eval()
    task.loss(batch(), generator())
    assert task.mask.updates == 1


def test_with_a_base_model_drafts_are_made_of_its_estimates(tmp_path: Path) -> None:
    base = transformer(seed=3).eval().requires_grad_(False)
    nn.init.normal_(base.head.head.weight, std=0.2)
    data = batch()
    oracle, task = oracle_task(tmp_path, base=base, base_flow=FlowSchedule(2.0))
    assert task.frozen["base"] is base
    task.loss(data, generator(9))
    draws = generator(9)
    noise = torch.randn(data["low"].shape, generator=draws)
    sigma = FlowSchedule(2.0).sample(4, draws)
    known = first_frame_condition(data["low"][:, :, :1], 3)
    context = task.context(data, data["caption"], 3)
    estimate = deviation_latents(base, FlowBatch(data["low"], known, context), noise, sigma)
    assert torch.allclose(oracle.shown()[1][:, :, 1:], upsampler()(estimate)[:, :, 1:], atol=1e-5)
    oracle.eval()
    task.loss(data, generator(9))
    assert torch.allclose(oracle.shown()[1][:, :, 1:], upsampler()(data["low"])[:, :, 1:], atol=1e-5)


def test_only_the_refiner_is_trained(tmp_path: Path) -> None:
    model = transformer()
    nn.init.normal_(model.head.head.weight)
    task = RefinerTask(model, encoders(), FrozenParts(upsampler().requires_grad_(False)), settings(tmp_path))
    assert set(task.modules) == {"transformer", "mask"}
    assert set(task.frozen) == {"text_encoder", "image_encoder", "upsampler"}
    task.loss(batch(), generator())["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    frozen = [p for module in task.frozen.values() for p in module.parameters()]
    assert all(p.grad is None for p in frozen)


# --- learning ----


def trained_loss(tmp_path: Path, mismatched: bool) -> tuple[float, float]:
    data = pairs(mismatched=mismatched)
    config = settings(tmp_path / str(mismatched), max_steps=40, flow=FlowSchedule(4.0))
    held_out = default_collate([data[i] for i in range(32)])
    task = RefinerTask(transformer(), encoders(), FrozenParts(upsampler()), config, Samples(batch=held_out))

    def loss() -> float:
        for module in task.modules.values():
            module.eval()
        with torch.no_grad():
            return float(task.validate(0)["loss"])

    before = loss()
    train(task, data, config.loop)
    return before, loss()


def test_it_learns_and_uses_the_draft(tmp_path: Path) -> None:
    before, after = trained_loss(tmp_path, mismatched=False)
    _, control = trained_loss(tmp_path, mismatched=True)
    assert after < 0.6 * before
    assert control > 1.2 * after  # the same clips, each with another one's draft


def test_a_resumed_run_has_the_weights_and_percentiles_of_one_in_a_go(tmp_path: Path) -> None:
    def run(name: str, steps: int) -> RefinerTask:
        config = settings(tmp_path / name, max_steps=steps, regularization=RegularizationConfig(), caption_dropout=0.1)
        task = RefinerTask(transformer(), encoders(), FrozenParts(upsampler()), config)
        train(task, pairs(), config.loop)
        return task

    whole = run("whole", 4)
    run("parts", 2)
    resumed = run("parts", 4)
    for name, module in whole.modules.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, resumed.modules[name].state_dict()[key]), (name, key)
    assert whole.mask.updates == 4


# --- from videos to folders ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An autoencoder, an upsampler, a transformer and encoders, saved."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    FSAE.from_preset("tiny", latent_channels=4).save_pretrained(root / "fsae")
    upsampler().save_pretrained(root / "up")
    transformer().save_pretrained(root / "dit")
    text, image = encoders()
    text.model.save_pretrained(root / "encoders" / "text_encoder")
    text.tokenizer.save_pretrained(root / "encoders" / "tokenizer")
    image.model.save_pretrained(root / "encoders" / "image_encoder")
    yield root


def folder_settings(tmp_path: Path, root: Path) -> RefinerConfig:
    config = settings(tmp_path, clips=ClipsConfig(5, 128, 128), validation_steps=2, validation_samples=1)
    return replace(
        config,
        autoencoder=str(root / "fsae"),
        upsampler=str(root / "up"),
        encoders=str(root / "encoders"),
        model=str(root / "dit"),
        loop=replace(config.loop, batch_size=1, validate_every=1, ema_decay=0.9),
    )


def test_from_videos_to_a_saved_refiner_and_its_mask(tmp_path: Path, folders: Path) -> None:
    videos = [{"video": torch.rand(3, 5, 128, 128) * 2 - 1, "caption": c} for c in ("left", "right")]
    config = replace(folder_settings(tmp_path, folders), base=str(folders / "dit"), gradient_checkpointing=True)
    saved = train_refiner(config, dataset=videos)
    assert [f.name for f in saved] == ["refiner", "dynamic_mask"]
    trained, start = FSDiT.from_pretrained(saved[0]), FSDiT.from_pretrained(folders / "dit")
    assert not torch.equal(trained.head.head.weight, start.head.head.weight)
    mask = DynamicMask.from_pretrained(saved[1]).config
    assert 0 < mask.error_5 < mask.error_95 and (mask.error_5, mask.error_95) != (0.0, 1.0)
    assert list((tmp_path / "run" / "validation").glob("*samples.png"))


def test_a_cache_of_pairs_trains_as_its_videos_do(
    tmp_path: Path, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the encoders' embeddings or without them; embeddings need no encoder, and are refused if of others."""
    config = folder_settings(tmp_path, folders)
    (tmp_path / "clips").mkdir()
    picture = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)
    write_video(tmp_path / "clips" / "0.mp4", [np.roll(picture, 3 * k, 1) for k in range(5)], 8)
    (tmp_path / "clips.csv").write_text("path,caption\nclips/0.mp4,pan left\n")
    made: dict[str, Any] = {"data": str(tmp_path / "clips.csv"), "clips": ClipsConfig(5, 128, 128)}
    made |= {"autoencoder": str(folders / "fsae"), "latents": "fp32", "text_len": 16, "pairs": True, "device": "cpu"}
    made["image_size"] = 16  # as the image encoder takes them
    embedded, plain = str(tmp_path / "embedded"), str(tmp_path / "plain")
    make_cache(CacheConfig(output=embedded, encoders=str(folders / "encoders"), **made))
    make_cache(CacheConfig(output=plain, **made))
    prepared: list[Any] = []

    def prepare(task: RefinerTask, *_: Any) -> None:
        assert task.validation is not None
        for module in task.modules.values():
            module.eval()
        prepared.append(task.prepare(task.validation, generator()))
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(training, "train", prepare)
        for data in (made["data"], plain, embedded):
            if data == embedded:
                patched.setattr(training, "load_encoders", None)
            with pytest.raises(InterruptedError):
                train_refiner(replace(config, data=data))
    videos, *cached = prepared
    assert videos.context.text.any() and videos.context.image.any() and videos.condition.latents[:, :, 1:].any()
    for clean in cached:
        torch.testing.assert_close(clean.latents, videos.latents, rtol=1e-3, atol=1e-4)
        for part, names in (("condition", ("latents", "mask")), ("context", ("text", "image", "negative"))):
            for name in names:
                one, two = (getattr(getattr(batch, part), name) for batch in (clean, videos))
                torch.testing.assert_close(one, two, rtol=0, atol=2e-2)  # the first frame is kept in half precision
    (saved, _) = train_refiner(replace(config, data=embedded, base=str(folders / "dit")))
    assert not torch.equal(FSDiT.from_pretrained(saved).head.head.weight, transformer().head.head.weight)
    others = tmp_path / "others"
    shutil.copytree(folders / "encoders", others)
    new_image_encoder().save_pretrained(others / "image_encoder")
    with pytest.raises(UserError, match="was made with other encoders than"):
        train_refiner(replace(config, data=embedded, encoders=str(others)))


def test_clips_without_captions_are_told(
    tmp_path: Path, folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(training, "RefinerTask", stop)
    (tmp_path / "clips").mkdir()
    write_video(tmp_path / "clips" / "0.mp4", [np.zeros((128, 128, 3), np.uint8)] * 5, 8)
    with pytest.raises(InterruptedError):
        train_refiner(replace(folder_settings(tmp_path, folders), data=str(tmp_path / "clips")))
    assert "none of 1 clip has a caption" in capsys.readouterr().err


def test_wrong_settings_are_sentences(tmp_path: Path, folders: Path) -> None:
    config = folder_settings(tmp_path, folders)
    with pytest.raises(UserError, match="multiples of 128"):
        train_refiner(replace(config, clips=ClipsConfig(5, 128, 192)))
    with pytest.raises(UserError, match="no model folder"):
        train_refiner(replace(config, upsampler=str(tmp_path / "none")))
    with pytest.raises(UserError, match="neither a preset"):
        train_refiner(replace(config, model="nanno"))
    for changes in ({"encoders": "nano"}, {"train_encoders": True}):
        with pytest.raises(UserError, match="leaves them as they are"):
            replace(config, **changes)
    with pytest.raises(UserError, match="mask.low is .*; it must be at most mask.high"):
        MaskConfig(low=0.9, high=0.1)
    with pytest.raises(UserError, match="latents_std is not the autoencoder's"):
        other = LatentUpsampler.from_preset("tiny", latent_channels=4, latents_std=[2.0] * 4)
        parts = FrozenParts(other, FSAE.from_preset("tiny", latent_channels=4))
        RefinerTask(transformer(), encoders(), parts, config)
