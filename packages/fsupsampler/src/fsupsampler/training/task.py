"""Training of the latent upsampler (paper §2.4.1) and the refiner (paper §2.4.2), the autoencoder frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from fsae import FSAE
from fsae.errors import UserError
from fsae.losses.perceptual import PerceptualLoss
from fsae.losses.reconstruction import l1_loss
from fsae.training.logs import frame_grid
from fsae.training.loop import Task, train
from fsae.training.runs import finished, is_main_process, read_samples, save_parts
from fsdit.conditioning.encoders import ImageEncoder, TextEncoder
from fsdit.conditioning.folders import load_encoders
from fsdit.conditioning.inputs import Condition, first_frame_condition, nothing_known
from fsdit.model import FSDiT
from fsdit.training.data import tell_missing_captions
from fsdit.training.task import FlowMatchingTask
from fsupsampler.refiner import DynamicMask, RunningMask, deviation_latents, refiner_condition
from fsupsampler.regularization import regularize
from fsupsampler.training.config import RefinerConfig, UpsamplerConfig, UpsamplerLoss
from fsupsampler.training.data import encode_pair
from fsupsampler.upsampler import LatentUpsampler, nearest_upsample


class UpsamplerTask(Task):
    """Draft the high-resolution latents from the low-resolution ones.

    Batches hold ``low`` ``B C t h w`` and ``high`` ``B C t 2h 2w``, or ``video`` ``B 3 T H W``, or, for
    losses on decoded pixels of encoded pairs, all three.

    Args:
        upsampler: Trained.
        loss: Weights.
        autoencoder: Frozen; needed for batches of videos and for losses on pixels.
        perceptual: LPIPS, or None.
        validation: A batch to validate on.
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
        """α1·L1(latents) + α2·L1(pixels) + α3·LPIPS, each where its weight asks for it (paper eq. 9)."""
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
                terms["perceptual"] = perceptual(decoded, batch["video"])
                total = total + self.weights.perceptual * terms["perceptual"]
        return {"loss": total, **terms}

    def _decode(self, latents: Tensor, video: Tensor) -> Tensor:
        assert self.autoencoder is not None
        return self.autoencoder.decode(latents, first_frame=video[:, :, :1])

    def validate(self, step: int) -> dict[str, Tensor]:
        """The latents' L1 and that of plain copying; the videos over their drafts, if they can be decoded."""
        if self.validation is None:
            return {}
        batch = _to_device(self.validation, self.upsampler)
        low, high = latent_pair(batch, self.autoencoder)
        draft = self.upsampler(low)
        results = {"latent_l1": l1_loss(draft, high), "nearest_l1": l1_loss(nearest_upsample(low), high)}
        if self.autoencoder is not None and "video" in batch:
            rows = [batch["video"], self._decode(draft, batch["video"])]
            results["drafts"] = frame_grid([row.float().clamp(-1, 1) for row in rows])
        return results


class RefinerTask(FlowMatchingTask):
    """Flow matching at the high resolution, on the condition that the upsampled draft makes.

    A clip of one frame has none: it is learned from its caption alone.

    Batches hold ``low`` ``B C t h w``, ``high`` ``B C t 2h 2w`` and ``image`` ``B 3 S S``, or ``video`` ``B 3
    T H W``; and ``caption``, B strings.

    Args:
        refiner: Trained, and with it the percentiles of the dynamic mask.
        text_encoder: The base model's, only read.
        image_encoder: Likewise.
        upsampler: Frozen.
        config: Loss, noise levels, mask, regularisation, validation sampling.
        autoencoder: Frozen; needed for batches of videos, and to show validation samples as images.
        base: The base model, frozen; drafts are then made of its one-step estimates (`deviation_latents`).
        validation: A batch to validate on.
    """

    config: RefinerConfig

    def __init__(
        self,
        refiner: FSDiT,
        text_encoder: TextEncoder,
        image_encoder: ImageEncoder,
        upsampler: LatentUpsampler,
        config: RefinerConfig,
        autoencoder: FSAE | None = None,
        base: FSDiT | None = None,
        validation: Mapping[str, Any] | None = None,
    ) -> None:
        if autoencoder is not None:
            check_statistics(upsampler, autoencoder)
        super().__init__(refiner, text_encoder, image_encoder, config, autoencoder, validation)
        mask = config.mask
        self.mask = RunningMask(
            DynamicMask(mask.low, mask.high, scalar=mask.scalar, inverted=mask.inverted), mask.decay
        )
        self.upsampler, self.base = upsampler, base
        self.modules = {**self.modules, "mask": self.mask}
        frozen: dict[str, nn.Module] = (
            {"upsampler": upsampler} if base is None else {"upsampler": upsampler, "base": base}
        )
        self.frozen = {**self.frozen, **frozen}
        self.settings = {
            **self.settings,
            "upsampler": upsampler.public_config,
            "mask": asdict(mask),
            "regularization": asdict(config.regularization),
            "base": "none" if base is None else {**base.public_config, "flow": asdict(config.base_flow)},
        }
        self._condition: Condition | None = None

    def _flow_matching(self, batch: Any, generator: Generator, dropout: float) -> dict[str, Tensor]:
        """Flow matching of the high-resolution latents, after their condition is made of the whole batch."""
        low, high = latent_pair(batch, self.autoencoder)
        self._condition = self.draft_condition(batch, low, high, generator)
        return super()._flow_matching({**batch, "latents": high}, generator, dropout)

    def draft_condition(self, batch: Any, low: Tensor, high: Tensor, generator: Generator) -> Condition:
        """The refiner's condition, regularised while it trains; none for a single frame, which would be the target."""
        training, mask_channels = self.transformer.training, self.transformer.config.mask_channels
        if high.shape[2] == 1:
            return nothing_known(high, mask_channels)
        with torch.no_grad():
            if self.base is not None and training:
                low = self._deviate(self.base, batch, low, generator)
            draft = self.upsampler(low).to(high)
        condition = refiner_condition(high[:, :, :1], draft, self.mask, mask_channels)
        return regularize(condition, high, self.config.regularization, generator) if training else condition

    def _deviate(self, base: FSDiT, batch: Any, low: Tensor, generator: Generator) -> Tensor:
        noise = torch.randn(low.shape, generator=generator).to(low)
        sigma = self.config.base_flow.sample(len(low), generator).to(low)
        known = first_frame_condition(low[:, :, :1], low.shape[2], base.config.mask_channels)
        return deviation_latents(base, low, noise, sigma, known, self.context(batch, list(batch["caption"])))

    def condition(self, latents: Tensor) -> Condition:
        """The condition of the batch at hand."""
        assert self._condition is not None
        return self._condition

    def latents(self, batch: Any) -> Tensor:
        """The batch's high-resolution latents."""
        return batch["high"] if "high" in batch else super().latents(batch)

    def frames(self, batch: Any) -> int:
        """t, the latent frames of the batch's clips."""
        return int(batch["high"].shape[2]) if "high" in batch else super().frames(batch)


def latent_pair(batch: Any, autoencoder: FSAE | None) -> tuple[Tensor, Tensor]:
    """(low, high) latents of a batch, encoded now if it holds only videos."""
    if "low" in batch:
        return batch["low"], batch["high"]
    if autoencoder is None:
        raise UserError("the batch holds videos and no latents; give the autoencoder that encodes them")
    return encode_pair(autoencoder, batch["video"])


def check_statistics(upsampler: LatentUpsampler, autoencoder: FSAE) -> None:
    """UserError unless the upsampler un-normalises latents as the autoencoder normalises them."""
    for name in ("latent_channels", "latents_mean", "latents_std"):
        if not np.array_equal(upsampler.config[name], autoencoder.config[name]):
            raise UserError(f"the upsampler's {name} is not the autoencoder's; give parts that belong together")


def train_upsampler(config: UpsamplerConfig, dataset: Any = None, validation: Any = None) -> list[Path]:
    """Train a LatentUpsampler and save it in ``output_dir/upsampler``.

    Args:
        config: The training.
        dataset: Samples to train on (`fsupsampler.training.data`); the ``VideoFolder`` that ``config`` describes if
            None.
        validation: Likewise the held-out samples.

    Returns:
        The saved folder; none if a signal stopped the run, which then can be resumed.
    """
    torch.manual_seed(config.loop.seed)
    autoencoder = _autoencoder(config)
    statistics = {name: autoencoder.config[name] for name in ("latent_channels", "latents_mean", "latents_std")}
    upsampler = _model(LatentUpsampler, config.model, config.gradient_checkpointing, statistics)
    perceptual = PerceptualLoss.from_files(*config.perceptual_weights) if config.perceptual_weights else None
    clips, held_out, batch = read_samples(config, dataset, validation)
    task = UpsamplerTask(upsampler, config.loss, autoencoder, perceptual, batch)
    result = train(task, clips, config.loop)
    if not finished(result, config.loop.max_steps, clips, held_out):
        return []
    return save_parts(result, {"upsampler": result.export("upsampler")})


def train_refiner(config: RefinerConfig, dataset: Any = None, validation: Any = None) -> list[Path]:
    """Train a refiner and save it in ``output_dir/refiner``, its mask in ``output_dir/dynamic_mask``.

    Args:
        config: The training.
        dataset: Samples to train on (`fsupsampler.training.data`); the ``VideoFolder`` that ``config`` describes if
            None.
        validation: Likewise the held-out samples.

    Returns:
        The saved folders; none if a signal stopped the run, which then can be resumed.
    """
    torch.manual_seed(config.loop.seed)
    autoencoder = _autoencoder(config)
    refiner = _model(FSDiT, config.model, config.gradient_checkpointing)
    text_encoder, image_encoder = load_encoders(config.encoders, refiner.config.text_len)
    upsampler = LatentUpsampler.from_pretrained(config.upsampler).requires_grad_(False)
    base = None if config.base is None else FSDiT.from_pretrained(config.base).requires_grad_(False)
    clips, held_out, batch = read_samples(config, dataset, validation)
    if dataset is None and is_main_process():
        tell_missing_captions(clips.entries)
    task = RefinerTask(refiner, text_encoder, image_encoder, upsampler, config, autoencoder, base, batch)
    result = train(task, clips, config.loop)
    if not finished(result, config.loop.max_steps, clips, held_out):
        return []
    return save_parts(result, {"refiner": result.export("transformer"), "dynamic_mask": task.mask.frozen()})


def _autoencoder(config: UpsamplerConfig | RefinerConfig) -> FSAE:
    """The frozen autoencoder, after a look whether clips of this size and of half of it suit it."""
    autoencoder = FSAE.from_pretrained(config.autoencoder).requires_grad_(False)
    step = 2 * autoencoder.spatial_compression
    if config.height % step or config.width % step:
        raise UserError(
            f"clips of {config.width}x{config.height} pixels given; width and height must be multiples of "
            f"{step}, so that half of them still suits the autoencoder"
        )
    autoencoder.latent_shape(config.frames, config.height, config.width)
    return autoencoder


def _model(cls: Any, name: str, gradient_checkpointing: bool, options: Mapping[str, Any] | None = None) -> Any:
    """A model of a preset, with ``options``, or of a folder."""
    model = cls.from_preset_or_folder(name, **(options or {}))
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def _to_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
