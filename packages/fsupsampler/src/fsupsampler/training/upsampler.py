"""Training of the latent upsampler, the autoencoder frozen (paper §2.4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from fsae import FSAE
from fsae.errors import UserError
from fsae.losses.perceptual import PerceptualLoss, temporal_slices
from fsae.losses.reconstruction import l1_loss
from fsae.training.logs import frame_grid
from fsae.training.loop import Task, train
from fsae.training.runs import model_to_train, report_end, save_parts
from fsdit.training.data import CachedLatents, to_device_of
from fsupsampler.training.config import UpsamplerConfig, UpsamplerLoss
from fsupsampler.training.data import check_statistics, latent_pair, load_autoencoder, read_pairs
from fsupsampler.upsampler import LatentUpsampler, nearest_upsample

# Frames that LPIPS sees at a time: its value and gradient are those of the whole clip.
SLICE = 4


class UpsamplerTask(Task):
    """Draft the high-resolution latents from the low-resolution ones.

    Batches hold `low` `B C t h w` and `high` `B C t 2h 2w`, or `video` `B 3 T H W`, or, for losses on decoded pixels of
    encoded pairs, all three. The autoencoder, frozen, is needed for batches of videos and for losses on pixels.
    """

    def __init__(
        self,
        upsampler: LatentUpsampler,
        loss: UpsamplerLoss,
        autoencoder: FSAE | None = None,
        perceptual: PerceptualLoss | None = None,
        validation: Mapping[str, Any] | None = None,
    ) -> None:
        if autoencoder is not None:
            check_statistics(upsampler, autoencoder)
        elif loss.pixel > 0 or perceptual is not None:
            raise UserError("a loss on pixels needs the autoencoder that decodes; give it, or set loss.pixel to 0")
        self.upsampler, self.weights, self.autoencoder = upsampler, loss, autoencoder
        self.perceptual, self.validation = perceptual, validation
        self.modules = {"upsampler": upsampler}
        frozen = {"autoencoder": autoencoder, "perceptual": perceptual}
        self.frozen = {name: module for name, module in frozen.items() if module is not None}
        self.settings = {
            "model": upsampler.public_config,
            "loss": asdict(loss),
            "perceptual": perceptual.trunk.name if perceptual is not None else "none",
        }

    def loss(self, batch: Any, generator: Generator) -> dict[str, Tensor]:
        """α1·L1(latents) + α2·L1(pixels) + α3·LPIPS, the last two only where their weight is above 0 (paper eq. 9)."""
        low, high = latent_pair(batch, self.autoencoder)
        draft = self.upsampler(low)
        terms = {"latent_l1": l1_loss(draft, high)}
        total = self.weights.latent * terms["latent_l1"]
        perceptual = self.perceptual if self.weights.perceptual > 0 else None
        if self.weights.pixel > 0 or perceptual is not None:
            decoded = self._decode(draft, batch["video"])
            terms["pixel_l1"] = l1_loss(decoded, batch["video"])
            total = total + self.weights.pixel * terms["pixel_l1"]
            if perceptual is not None:
                terms["perceptual"] = temporal_slices(perceptual, decoded, batch["video"], SLICE)
                total = total + self.weights.perceptual * terms["perceptual"]
        return {"loss": total, **terms}

    def _decode(self, latents: Tensor, video: Tensor) -> Tensor:
        assert self.autoencoder is not None
        return self.autoencoder.decode(latents, first_frame=video[:, :, :1])

    def validate(self, step: int) -> dict[str, Tensor]:
        """The latents' L1 and that of plain copying; the videos over their drafts, if they can be decoded."""
        if self.validation is None:
            return {}
        batch = to_device_of(self.upsampler, self.validation)
        low, high = latent_pair(batch, self.autoencoder)
        draft = self.upsampler(low)
        results = {"latent_l1": l1_loss(draft, high), "nearest_l1": l1_loss(nearest_upsample(low), high)}
        if self.autoencoder is not None and "video" in batch:
            rows = [batch["video"], self._decode(draft, batch["video"])]
            results["drafts"] = frame_grid([row.float().clamp(-1, 1) for row in rows])
        return results


def train_upsampler(config: UpsamplerConfig, dataset: Any = None, validation: Any = None) -> list[Path]:
    """Train a LatentUpsampler and save it in `output_dir/upsampler`; arguments and result as `train_refiner`."""
    torch.manual_seed(config.loop.seed)
    autoencoder = load_autoencoder(config)
    statistics = {name: autoencoder.config[name] for name in ("latent_channels", "latents_mean", "latents_std")}
    upsampler = model_to_train(LatentUpsampler, config.model, config.loop, **statistics)
    if config.gradient_checkpointing:
        upsampler.enable_gradient_checkpointing()
    perceptual = PerceptualLoss.from_files(*config.perceptual_weights) if config.perceptual_weights else None
    pairs = read_pairs(config, autoencoder, dataset, validation)
    if isinstance(pairs.samples, CachedLatents) and (config.loss.pixel > 0 or perceptual is not None):
        raise UserError(
            "a cache holds latents and no videos to compare with; set loss.pixel to 0 and leave perceptual_weights "
            "out, or give videos as data"
        )
    task = UpsamplerTask(upsampler, config.loss, autoencoder, perceptual, pairs.batch)
    result = train(task, pairs.samples, config.loop, pairs.collate)
    if not report_end(result, config.loop.max_steps, pairs.samples, pairs.held_out):
        return []
    return save_parts(result, {"upsampler": "upsampler"})
