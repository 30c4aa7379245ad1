"""Training of the autoencoder: L1, and LPIPS if its weights are given (paper §2.2.2, stage 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsae.initialization import start_small
from fsae.losses.perceptual import PerceptualLoss
from fsae.losses.reconstruction import l1_loss
from fsae.metrics import psnr
from fsae.model import FSAE
from fsae.training.loop import Task, train
from fsae.training.runs import finished, read_samples, save_parts
from fsae.training.stages import AutoencoderConfig


class AutoencoderTask(Task):
    """Reconstruct clips: ``{"video": B 3 T H W in [-1, 1]}``.

    The decoder is given the clip's own first frame, from the same encoder pass, where the model injects it.

    Args:
        model: The autoencoder, trained whole.
        perceptual: LPIPS, or None for L1 alone.
        perceptual_weight: Its weight.
        validation: Clips ``N 3 T H W`` to validate on.
    """

    def __init__(
        self,
        model: FSAE,
        perceptual: PerceptualLoss | None = None,
        perceptual_weight: float = 0.1,
        validation: Tensor | None = None,
    ) -> None:
        self.model = model
        self.modules = {"autoencoder": model}
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.validation = validation
        if perceptual is not None:
            self.frozen = {"perceptual": perceptual}
        self.settings: Mapping[str, Any] = {
            "model": {k: v for k, v in model.config.items() if not k.startswith("_")},
            "perceptual": perceptual.trunk.name if perceptual is not None else "none",
            "perceptual_weight": perceptual_weight if perceptual is not None else 0.0,
        }

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """L1 + weight x LPIPS; PSNR in dB beside it."""
        video = batch["video"]
        reconstruction = self.model(video, generator)
        l1 = l1_loss(reconstruction, video)
        terms = {"loss": l1, "l1": l1, "psnr": psnr(reconstruction.detach().clamp(-1, 1), video).mean()}
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(reconstruction, video)
            terms["loss"] = l1 + self.perceptual_weight * terms["perceptual"]
        return terms

    def validate(self, step: int) -> dict[str, Tensor]:
        """Mean PSNR of the validation clips; frames of theirs over their reconstructions."""
        if self.validation is None:
            return {}
        device = next(self.model.parameters()).device
        # One at a time: a validation must not need more memory than training does.
        clips = [clip.unsqueeze(0) for clip in self.validation]
        results = [self.model(clip.to(device)).float().clamp(-1, 1).cpu() for clip in clips]
        quality = torch.cat([psnr(result, clip) for result, clip in zip(results, clips, strict=True)])
        return {"psnr": quality.mean(), "reconstruction": frame_grid([self.validation, torch.cat(results)])}


def frame_grid(rows: Sequence[Tensor]) -> Tensor:
    """Clips ``N 3 T H W`` in [-1, 1], a row each -> first, middle and last frames, ``3 H' W'`` in [0, 1]."""
    frames = rows[0].shape[2]
    shown = sorted({0, frames // 2, frames - 1})
    strips = [torch.cat([clip[:, t] for clip in row for t in shown], dim=-1) for row in rows]
    return (torch.cat(strips, dim=-2).float().cpu() + 1) / 2


@torch.no_grad()
def measure_latent_statistics(
    model: FSAE, dataset: Any, batches: int, batch_size: int = 1
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over clips spread evenly over a dataset.

    Measured on what the encoder gives before normalisation, in fp64; the diffusion transformer needs latents
    of unit variance (one number for all 128 channels is not enough). A channel that never changes gets the
    deviation 1.

    Returns:
        ``latents_mean`` and ``latents_std`` for the model's configuration.
    """
    device = next(model.parameters()).device
    count = min(batches * batch_size, len(dataset))
    indices = [round(i * (len(dataset) - 1) / max(1, count - 1)) for i in range(count)]
    moments = torch.zeros(3, model.config.latent_channels, dtype=torch.float64)
    for start in range(0, count, batch_size):
        video = torch.stack([dataset[i]["video"] for i in indices[start : start + batch_size]])
        latents = model.denormalize(model.encode(video.to(device))).double().transpose(0, 1).flatten(1).cpu()
        moments += torch.stack(
            [torch.full_like(latents[:, 0], latents.shape[1]), latents.sum(1), latents.square().sum(1)]
        )
    number, total, squares = moments
    mean = total / number
    std = (squares / number - mean.square()).clamp(min=0).sqrt()
    return mean.tolist(), torch.where(std < 1e-6, 1.0, std).tolist()


def train_autoencoder(config: AutoencoderConfig, dataset: Any = None) -> Path | None:
    """Train an FSAE and save it, with its latent statistics, in ``output_dir/autoencoder``.

    Args:
        config: The training.
        dataset: Clips to train on; the ``VideoFolder`` that ``config`` describes if None.

    Returns:
        The saved model's folder; None if a signal stopped the run, which then can be resumed.
    """
    loop = config.loop
    torch.manual_seed(loop.seed)
    model = _model(config.model)
    model.latent_shape(config.frames, config.height, config.width)
    if config.channels_last:
        model.to(memory_format=torch.channels_last_3d)
    clips, held_out, batch = read_samples(config, dataset)
    perceptual = PerceptualLoss.from_files(*config.perceptual_weights) if config.perceptual_weights else None
    task = AutoencoderTask(model, perceptual, config.perceptual_weight, None if batch is None else batch["video"])
    result = train(task, clips, loop)
    if not finished(result, loop.max_steps, clips, held_out):
        return None
    trained = result.export("autoencoder")
    assert isinstance(trained, FSAE)
    mean, std = measure_latent_statistics(trained, clips, config.statistics_batches, loop.batch_size)
    trained.register_to_config(latents_mean=mean, latents_std=std)
    return save_parts(result, {"autoencoder": trained})[0]


def _model(name: str) -> FSAE:
    model = FSAE.from_preset_or_folder(name)
    if name in FSAE.presets:
        start_small(model)
    return model
