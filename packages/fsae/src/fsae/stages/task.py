"""Training of the autoencoder, every stage of it (paper §2.2.1 to §2.2.3).

L = L1 + 0.1 LPIPS [+ 0.1 GAN] [+ alpha (v-mcos + v-mdms)] [+ distillation]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fsae.decoder import FirstFrame
from fsae.errors import UserError
from fsae.evaluation.metrics import psnr
from fsae.losses.perceptual import PerceptualLoss, temporal_slices
from fsae.losses.reconstruction import l1_loss
from fsae.model import FSAE
from fsae.stages.config import AutoencoderConfig, PatchConfig
from fsae.stages.objective import Adversary, Alignment, Distillation
from fsae.stages.patches import Patch, decode, draw_patch
from fsae.stages.start import prepared_model
from fsae.storage.checkpoint import save_state
from fsae.training.logs import frame_grid
from fsae.training.loop import Task, train
from fsae.training.runs import finished, read_samples, save_parts


class AutoencoderTask(Task):
    """Reconstruct clips: ``{"video": B 3 T H W in [-1, 1]}``.

    The decoder is given the clip's own first frame, from the same encoder pass, where the model injects it.

    Args:
        model: The autoencoder, trained whole.
        perceptual: LPIPS, or None for L1 alone.
        perceptual_weight: Its weight.
        validation: Clips ``N 3 T H W`` to validate on.
        perceptual_slice: LPIPS over so many frames at a time; 0 for all at once.
        adversary: The discriminator, or None.
        alignment: The Video VF loss, or None.
        distillation: The decoder to imitate, or None.
        patch: The patches that the outer stages run on.
        freeze_encoder: Train the decoder alone.
    """

    def __init__(
        self,
        model: FSAE,
        perceptual: PerceptualLoss | None = None,
        perceptual_weight: float = 0.1,
        validation: Tensor | None = None,
        *,
        perceptual_slice: int = 0,
        adversary: Adversary | None = None,
        alignment: Alignment | None = None,
        distillation: Distillation | None = None,
        patch: PatchConfig = PatchConfig(),  # noqa: B008, it is frozen
        freeze_encoder: bool = False,
    ) -> None:
        if 0 < patch.cells <= 2 * model.decoder.halo:
            raise UserError(
                f"patch.cells is {patch.cells}; a patch loses {model.decoder.halo} cells on each side, "
                f"give more than {2 * model.decoder.halo}, or 0 for whole frames"
            )
        if freeze_encoder:
            model.encoder.requires_grad_(False)
        self.model, self.validation = model, validation
        self.perceptual, self.perceptual_weight, self.perceptual_slice = perceptual, perceptual_weight, perceptual_slice
        self.adversary, self.alignment, self.distillation = adversary, alignment, distillation
        self.patch, self.freeze_encoder = patch, freeze_encoder
        self.modules: dict[str, nn.Module] = {"autoencoder": model}
        if alignment is not None:
            self.modules["alignment"] = alignment.loss
        if adversary is not None:
            self.opponents = {"discriminator": adversary.discriminator}
            self.opponent_optimizer = adversary.config.optimizer
        frozen: dict[str, nn.Module | None] = {
            "perceptual": perceptual,
            "teacher": alignment.teacher if alignment is not None else None,
            "distilled": distillation.teacher if distillation is not None else None,
        }
        self.frozen = {name: module for name, module in frozen.items() if module is not None}
        self.settings: Mapping[str, Any] = {
            "model": model.public_config,
            "perceptual": perceptual.trunk.name if perceptual is not None else "none",
            "perceptual_weight": perceptual_weight if perceptual is not None else 0.0,
            "adversarial": adversary and asdict(adversary.config),
            "alignment": alignment and asdict(alignment.config),
            "distillation": distillation and asdict(distillation.config),
            "patch": asdict(patch),
            "freeze_encoder": freeze_encoder,
        }

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """The weighted sum of all parts, "loss", and each part before its weight; PSNR in dB beside them.

        With a patch, L1, LPIPS, the adversary and PSNR see its core alone.
        """
        video = batch["video"]
        latents, first_frame = self._encode(video)
        height, width = video.shape[3:]
        noise = self.model.decoder.draw_noise(height, width, generator)
        patch = self._draw_patch(video, generator)
        terms: dict[str, Tensor] = {}
        if self.distillation is None:
            made, extra = decode(self.model.decoder, latents, first_frame, noise, patch), video.new_zeros(())
        else:
            made, extra, terms = self.distillation.student(self.model.decoder, latents, first_frame, noise, patch)
        target = video if patch is None else patch.core.scaled(self.model.decoder.outer_stages.cell).crop(video)
        total = terms["l1"] = l1_loss(made, target)
        if self.perceptual is not None:
            terms["perceptual"] = temporal_slices(self.perceptual, made, target, self.perceptual_slice)
            total = total + self.perceptual_weight * terms["perceptual"]
        if self.alignment is not None:
            weight = self.model.encoder.conv_out.weight
            aligned, parts = self.alignment.terms(latents, video, total, weight, generator)
            extra, terms = extra + aligned, terms | parts
        if self.adversary is not None:
            extra, parts = self._attack(made, target, extra)
            terms |= parts
        quality = psnr(made.detach().clamp(-1, 1), target).mean()
        return {"loss": total + extra, **terms, "psnr": quality}

    def opponent_loss(
        self, batch: Any, outputs: Mapping[str, Tensor], generator: torch.Generator, step: int
    ) -> dict[str, Tensor]:
        """The discriminator's, on the same clips and reconstructions; nothing before its start."""
        if self.adversary is None or not self.adversary.present(step):
            return {}
        return self.adversary.loss(outputs["keep_target"], outputs["keep_reconstruction"], step)

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

    def _encode(self, video: Tensor) -> tuple[Tensor, FirstFrame | None]:
        """Latents ``B c t h w``, not normalised, and the first frame's features where they are injected."""
        injected = self.model.config.first_frame_injection
        if self.freeze_encoder:
            # Nothing of the clip's feature maps is held: the first frame is encoded once more, by itself.
            with torch.no_grad():
                latents = self.model.denormalize(self.model.encode(video))
                return latents, self.model.first_frame_features(video[:, :, :1]) if injected else None
        self.model.latent_shape(*video.shape[2:])
        kept, latents = self.model.encoder.features(video)
        return latents, [feature[:, :, 0] for feature in kept] if injected else None

    def _draw_patch(self, video: Tensor, generator: torch.Generator) -> Patch | None:
        height, width = video.shape[3:]
        if not self.patch.cells or height * width <= self.patch.above:
            return None
        outer = self.model.decoder.outer_stages
        cell, halo = outer.cell, outer.halo
        return draw_patch(height // cell, width // cell, self.patch.cells, halo, generator)

    def _attack(self, made: Tensor, target: Tensor, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with the generator's, what is logged of it and what the discriminator is to see."""
        assert self.adversary is not None
        if not self.adversary.present(self.step):
            return loss, {}
        term = self.adversary.term(made)
        seen = {"keep_reconstruction": made, "keep_target": target}
        return loss + self.adversary.config.weight * term, {"adversarial": term, **seen}


@torch.no_grad()
def measure_latent_statistics(
    model: FSAE, dataset: Any, batches: int, batch_size: int = 1, progress: bool = False
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
    for index in tqdm(indices, desc="latent statistics", unit="clip", disable=not progress):
        video = dataset[index]["video"].unsqueeze(0)  # one at a time: clips may differ in size
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

    The statistics of a frozen encoder are kept, those of a trained one are measured anew.

    Args:
        config: The training.
        dataset: Clips to train on; those that ``config`` describes if None.

    Returns:
        The saved model's folder; None if a signal stopped the run, which then can be resumed.
    """
    loop = config.loop
    torch.manual_seed(loop.seed)
    model = prepared_model(config)
    model.latent_shape(config.frames, config.height, config.width)
    clips, held_out, batch = read_samples(config, dataset, mixture=config.clips)
    task = make_task(config, model, None if batch is None else batch["video"])
    result = train(task, clips, loop)
    if not finished(result, loop.max_steps, clips, held_out):
        return None
    trained = result.export("autoencoder")
    assert isinstance(trained, FSAE)
    if not config.freeze_encoder or trained.config.latents_mean is None:
        number, shown = config.statistics_batches, result.is_main_process
        mean, std = measure_latent_statistics(trained, clips, number, loop.batch_size, progress=shown)
        trained.register_to_config(latents_mean=mean, latents_std=std)
    if task.adversary is not None and result.is_main_process:
        save_state(task.adversary.discriminator, result.output_dir / "discriminator.safetensors")
    return save_parts(result, {"autoencoder": trained})[0]


def make_task(config: AutoencoderConfig, model: FSAE, validation: Tensor | None = None) -> AutoencoderTask:
    """The task that ``config`` asks for, with every network its loss reads."""
    perceptual = PerceptualLoss.from_files(*config.perceptual_weights) if config.perceptual_weights else None
    adversary = Adversary.from_config(config.adversarial)
    if adversary is not None and config.channels_last:
        adversary.discriminator.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    distillation = None
    if config.distillation.teacher is not None:
        teacher = FSAE.from_pretrained(config.distillation.teacher)
        distillation = Distillation(model, teacher, config.distillation)
    return AutoencoderTask(
        model,
        perceptual,
        config.perceptual_weight,
        validation,
        perceptual_slice=config.perceptual_slice,
        adversary=adversary,
        alignment=Alignment.from_config(model, config.alignment, perceptual),
        distillation=distillation,
        patch=config.patch,
        freeze_encoder=config.freeze_encoder,
    )
