"""Training of the refiner; autoencoder, encoders, upsampler and base model are frozen (paper §2.4.2)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from fsae import FSAE
from fsae.training.loop import train
from fsae.training.runs import is_main_process, model_to_train, report_end, save_parts
from fsdit.conditioning.encoders import Encoders
from fsdit.conditioning.folders import load_encoders
from fsdit.conditioning.inputs import Condition, FlowBatch, first_frame_condition, nothing_known
from fsdit.model import FSDiT
from fsdit.training.data import CachedLatents, Samples, report_missing_captions
from fsdit.training.task import FlowMatchingTask
from fsupsampler.refiner import DynamicMask, RunningMask, deviation_latents, refiner_condition
from fsupsampler.regularization import regularize
from fsupsampler.training.config import RefinerConfig
from fsupsampler.training.data import check_statistics, latent_pair, load_autoencoder, read_pairs
from fsupsampler.upsampler import LatentUpsampler


@dataclass(frozen=True)
class FrozenParts:
    """What the refiner's training reads and leaves as it is.

    Attributes:
        upsampler: Makes the drafts.
        autoencoder: Needed for batches of videos, and to show validation samples as images.
        base: The base model; drafts are then made of its one-step estimates (`deviation_latents`).
    """

    upsampler: LatentUpsampler
    autoencoder: FSAE | None = None
    base: FSDiT | None = None


class RefinerTask(FlowMatchingTask):
    """Flow matching at the high resolution, conditioned on the upsampled draft.

    A clip of one frame has no draft: it is learned from its caption alone. Trained are the refiner and the percentiles
    of the dynamic mask.

    Batches hold `low` `B C t h w` and `high` `B C t 2h 2w`, or `video` `B 3 T H W`; `caption`, B strings; and `image`
    or the embeddings as those of `FlowMatchingTask`, whose arguments these are as well.
    """

    config: RefinerConfig

    def __init__(
        self,
        refiner: FSDiT,
        encoders: Encoders | None,
        parts: FrozenParts,
        config: RefinerConfig,
        clips: Samples = Samples(),  # noqa: B008, frozen
    ) -> None:
        upsampler, base, mask = parts.upsampler, parts.base, config.mask
        if parts.autoencoder is not None:
            check_statistics(upsampler, parts.autoencoder)
        super().__init__(refiner, encoders, config, parts.autoencoder, clips)
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

    def conditioned_latents(self, batch: Any, generator: Generator) -> tuple[Tensor, Condition]:
        """High-resolution latents, and the condition that the draft of them makes."""
        low, high = latent_pair(batch, self.autoencoder)
        return high, self.draft_condition(batch, low, high, generator)

    def draft_condition(self, batch: Any, low: Tensor, high: Tensor, generator: Generator) -> Condition:
        """The refiner's condition, regularised while it trains; none for a single frame, which would be the target."""
        training, mask_channels = self.transformer.training, self.transformer.config.mask_channels
        if high.shape[2] == 1:
            self.mask.pass_by()
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
        context = self.context(batch, list(batch["caption"]), low.shape[2])
        return deviation_latents(base, FlowBatch(low, known, context), noise, sigma)


def train_refiner(config: RefinerConfig, dataset: Any = None, validation: Any = None) -> list[Path]:
    """Train a refiner and save it in `output_dir/refiner`, its mask in `output_dir/dynamic_mask`.

    Samples to train on (`fsupsampler.training.data`) and held-out ones are those that `config` describes if None.

    Returns:
        The saved folders; none if a signal stopped the run, which then can be resumed.
    """
    torch.manual_seed(config.loop.seed)
    autoencoder = load_autoencoder(config)
    refiner = model_to_train(FSDiT, config.model, config.loop)
    if config.gradient_checkpointing:
        refiner.enable_gradient_checkpointing()
    upsampler = LatentUpsampler.from_pretrained(config.upsampler).requires_grad_(False)
    base = None if config.base is None else FSDiT.from_pretrained(config.base).requires_grad_(False)
    pairs = read_pairs(config, autoencoder, dataset, validation)
    if isinstance(pairs.samples, CachedLatents):
        pairs.samples.check_fits(refiner.config)
        pairs.samples.check_encoders(config.encoders)
    elif dataset is None and is_main_process():
        report_missing_captions(pairs.samples.entries)
    embedded = pairs.empty_text is not None
    encoders = None if embedded else load_encoders(config.encoders, refiner.config.text_len)
    task = RefinerTask(refiner, encoders, FrozenParts(upsampler, autoencoder, base), config, pairs)
    result = train(task, pairs.samples, config.loop, pairs.collate)
    if not report_end(result, config.loop.max_steps, pairs.samples, pairs.held_out):
        return []
    return save_parts(result, {"refiner": "transformer", "dynamic_mask": task.mask.frozen()})
