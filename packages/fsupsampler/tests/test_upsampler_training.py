"""Training of the upsampler: what the loss is, that it learns more than copying, from videos to a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from fsae import FSAE
from fsae.data.config import BucketConfig, ClipsConfig
from fsae.errors import UserError
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsae.training.loop import train
from fsdit.preparation.cache import make_cache
from fsdit.preparation.config import CacheConfig
from fsdit.preparation.pairs import encode_pair, halve
from fsupsampler import LatentUpsampler
from fsupsampler.training.config import UpsamplerConfig, UpsamplerLoss
from fsupsampler.training.upsampler import UpsamplerTask, train_upsampler
from fsupsampler.upsampler import nearest_upsample

SMALL: dict[str, Any] = {"latent_channels": 4, "mid_channels": 16}
LATENTS_ONLY = UpsamplerLoss(latent=1.0, pixel=0.0, perceptual=0.0)


def loop(tmp_path: Path, **changes: Any) -> LoopConfig:
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 80,
        "batch_size": 8,
        "optimizer": OptimizerConfig(learning_rate=5e-3),
        "schedule": ScheduleConfig(kind="constant"),
        "ema_decay": 0.0,
        "tensorboard": False,
        "save_every": 0,
    }
    return LoopConfig(**{**settings, **changes})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def structured(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pairs whose detail follows from the low latents: a cell's four quarters differ by its next channel."""
    low = torch.randn(count, 4, 2, 2, 2, generator=generator(seed))
    quarters = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2)
    return low, nearest_upsample(low) + 0.5 * quarters * nearest_upsample(low.roll(1, dims=1))


def pairs(low: Tensor, high: Tensor) -> list[dict[str, Tensor]]:
    return [{"low": a, "high": b} for a, b in zip(low, high, strict=True)]


def video_batch(count: int = 2, frames: int = 5) -> dict[str, Any]:
    torch.manual_seed(1)
    return default_collate([{"video": torch.rand(3, frames, 128, 128) * 2 - 1, "caption": ""} for _ in range(count)])


def small(**options: Any) -> LatentUpsampler:
    return LatentUpsampler.from_preset("tiny", **SMALL, **options)


def tiny_autoencoder(**options: Any) -> FSAE:
    torch.manual_seed(0)
    return FSAE.from_preset("tiny", latent_channels=4, **options).eval().requires_grad_(False)


class Distance(nn.Module):
    """In LPIPS's place."""

    class trunk:
        name = "none"

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        return (reconstruction - target).square().mean()


# --- the loss ----


def test_halving_is_bicubic_frame_by_frame_and_stays_in_range() -> None:
    video = torch.rand(2, 3, 4, 16, 8, generator=generator()) * 2 - 1
    small = halve(video)
    assert small.shape == (2, 3, 4, 8, 4) and small.abs().max() <= 1
    for frame in range(4):
        alone = F.interpolate(video[:, :, frame], scale_factor=0.5, mode="bicubic", antialias=True).clamp(-1, 1)
        assert torch.allclose(small[:, :, frame], alone, atol=1e-6)


def test_loss_is_the_weighted_sum_of_equation_9() -> None:
    autoencoder, batch = tiny_autoencoder(), video_batch()
    upsampler = small()
    nn.init.normal_(upsampler.conv_out.weight, std=0.1)
    video = batch["video"]
    low, high = autoencoder.encode(halve(video)), autoencoder.encode(video)
    draft = upsampler(low)
    decoded = autoencoder.decode(draft, first_frame=video[:, :, :1])
    expected = {
        "latent_l1": (draft - high).abs().mean(),
        "pixel_l1": (decoded - video).abs().mean(),
        "perceptual": (decoded - video).square().mean(),
    }
    weights = UpsamplerLoss(latent=0.3, pixel=0.2, perceptual=0.7)
    terms = UpsamplerTask(upsampler, weights, autoencoder, Distance()).loss(batch, generator())
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5)
    total = 0.3 * expected["latent_l1"] + 0.2 * expected["pixel_l1"] + 0.7 * expected["perceptual"]
    assert terms["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    terms["loss"].backward()
    assert all(p.grad is not None for p in upsampler.parameters())


def test_without_weights_on_pixels_nothing_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = tiny_autoencoder()
    monkeypatch.setattr(FSAE, "decode", None)
    task = UpsamplerTask(small(), LATENTS_ONLY, autoencoder)
    assert set(task.loss(video_batch(), generator())) == {"loss", "latent_l1"}


def test_pairs_give_the_loss_of_their_videos() -> None:
    autoencoder = tiny_autoencoder(latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
    upsampler = small(latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
    batch = video_batch()
    low, high = encode_pair(autoencoder, batch["video"])
    losses = [
        UpsamplerTask(upsampler, LATENTS_ONLY, given).loss(data, generator())["loss"].item()
        for given, data in ((autoencoder, batch), (None, {"low": low, "high": high}))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_mismatched_parts_are_sentences() -> None:
    with pytest.raises(UserError, match="latents_mean is not the autoencoder's"):
        UpsamplerTask(small(), LATENTS_ONLY, tiny_autoencoder(latents_mean=[0.1] * 4))
    with pytest.raises(UserError, match="needs the autoencoder"):
        UpsamplerTask(small(), UpsamplerLoss())
    with pytest.raises(UserError, match="give the autoencoder"):
        UpsamplerTask(small(), LATENTS_ONLY).loss(video_batch(), generator())
    with pytest.raises(UserError, match=r"loss\.pixel"):
        UpsamplerLoss(pixel=-1.0)


# --- learning ----


def test_it_learns_detail_that_copying_and_bicubic_lack(tmp_path: Path) -> None:
    """And not from pairs that do not belong together."""
    low, high = structured(64, seed=0)
    unseen_low, unseen_high = structured(16, seed=1)

    def error(draft: Tensor) -> float:
        return (draft - unseen_high).abs().mean().item()

    def trained(data: list[dict[str, Tensor]], name: str) -> tuple[float, float]:
        torch.manual_seed(0)
        upsampler = small()
        task = UpsamplerTask(upsampler, LATENTS_ONLY)
        before = error(upsampler(unseen_low))
        train(task, data, loop(tmp_path / name))
        return before, error(upsampler.eval()(unseen_low))

    before, after = trained(pairs(low, high), "pairs")
    _, control = trained(pairs(low, high.roll(1, dims=0)), "mismatched")
    nearest = error(nearest_upsample(unseen_low))
    frames = unseen_low.transpose(1, 2).flatten(0, 1)
    cubic = F.interpolate(frames, scale_factor=2, mode="bicubic").unflatten(0, (16, 2)).transpose(1, 2)
    assert before == pytest.approx(nearest, rel=1e-5)  # untrained, it is the copy
    assert after < 0.7 * min(nearest, error(cubic))
    assert control > nearest


def test_validation_measures_against_copying_and_shows_drafts() -> None:
    autoencoder, batch = tiny_autoencoder(), video_batch()
    with torch.no_grad():
        task = UpsamplerTask(small(), UpsamplerLoss(), autoencoder, validation=batch)
        result = task.validate(0)
    assert result["latent_l1"].item() == pytest.approx(result["nearest_l1"].item(), rel=1e-5)
    assert result["drafts"].shape == (3, 2 * 128, 2 * 3 * 128)  # videos over drafts; two clips, three frames
    assert UpsamplerTask(small(), LATENTS_ONLY).validate(0) == {}


# --- from videos to a folder ----


def settings(tmp_path: Path, **changes: Any) -> UpsamplerConfig:
    tiny_autoencoder(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.5] * 4).save_pretrained(tmp_path / "fsae")
    LatentUpsampler.from_preset(
        "tiny", **SMALL, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.5] * 4
    ).save_pretrained(tmp_path / "up")
    options: dict[str, Any] = {
        "clips": ClipsConfig(1, 128, 128),
        "model": str(tmp_path / "up"),
        **changes,
    }
    run = loop(tmp_path, max_steps=2, batch_size=2, validate_every=1, ema_decay=0.9)
    return UpsamplerConfig(data="", autoencoder=str(tmp_path / "fsae"), loop=run, **options)


def test_from_videos_to_a_saved_upsampler(tmp_path: Path) -> None:
    videos = [{"video": torch.rand(3, 1, 128, 128) * 2 - 1, "caption": ""} for _ in range(3)]
    config = settings(tmp_path, gradient_checkpointing=True, validation_samples=2)
    (folder,) = train_upsampler(config, dataset=videos)
    assert folder.name == "upsampler"
    trained, start = LatentUpsampler.from_pretrained(folder), LatentUpsampler.from_pretrained(tmp_path / "up")
    assert not torch.equal(trained.conv_out.weight, start.conv_out.weight)
    assert list((tmp_path / "run" / "validation").glob("*drafts.png"))


def test_from_a_cache_of_pairs_of_several_sizes(tmp_path: Path) -> None:
    config = settings(tmp_path, loss=LATENTS_ONLY)
    (tmp_path / "pictures").mkdir()
    for k in range(3):
        Image.new("RGB", (128, 128), (80 * k, 0, 90)).save(tmp_path / "pictures" / f"{k}.png")
    sizes = [BucketConfig(1, height=128, width=side) for side in (128, 256)]
    made: dict[str, Any] = {"data": str(tmp_path / "pictures"), "clips": ClipsConfig(buckets=sizes), "device": "cpu"}
    made |= {"autoencoder": str(tmp_path / "fsae"), "latents": "fp32", "pairs": True}
    make_cache(CacheConfig(output=str(tmp_path / "pairs"), **made))
    config = replace(config, data=str(tmp_path / "pairs"))
    (folder,) = train_upsampler(config)
    trained, start = LatentUpsampler.from_pretrained(folder), LatentUpsampler.from_pretrained(tmp_path / "up")
    assert not torch.equal(trained.conv_out.weight, start.conv_out.weight)

    with pytest.raises(UserError, match="no videos to compare with; set loss.pixel to 0"):
        train_upsampler(replace(config, loss=UpsamplerLoss()))
    make_cache(CacheConfig(output=str(tmp_path / "single"), **{**made, "pairs": False}))
    with pytest.raises(UserError, match="holds no pairs of latents; make one by 'fsdit cache'"):
        train_upsampler(replace(config, data=str(tmp_path / "single")))
    tiny_autoencoder(latents_mean=[0.5] * 4).save_pretrained(tmp_path / "fsae")
    with pytest.raises(UserError, match="made with another autoencoder"):
        train_upsampler(replace(config, model=str(tmp_path / "up")))


def test_a_preset_takes_the_autoencoders_statistics(tmp_path: Path) -> None:
    videos = [{"video": torch.rand(3, 1, 128, 128) * 2 - 1, "caption": ""} for _ in range(2)]
    (folder,) = train_upsampler(settings(tmp_path, model="tiny"), dataset=videos)
    config = LatentUpsampler.from_pretrained(folder).config
    assert config.latents_mean == [0.1, 0.2, 0.3, 0.4] and config.latents_std == [1.5] * 4


def test_wrong_settings_are_sentences(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with pytest.raises(UserError, match="multiples of 128"):
        train_upsampler(replace(config, clips=ClipsConfig(1, 192, 128)))
    with pytest.raises(UserError, match="clips of 192x192 pixels"):
        train_upsampler(replace(config, clips=ClipsConfig(1, 128, 128, [BucketConfig(5, 192 * 192)])))
    with pytest.raises(UserError, match="neither a preset"):
        train_upsampler(replace(config, model="nanno"))
    with pytest.raises(UserError, match="validation_samples"):
        replace(config, validation_samples=0)
