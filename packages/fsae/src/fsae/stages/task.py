"""Training of the autoencoder, every stage of it (paper §2.2.1 to §2.2.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fsae.decoder import FirstFrame
from fsae.errors import UserError
from fsae.evaluation.metrics import psnr
from fsae.losses.distillation import recorded
from fsae.model import FSAE
from fsae.planned import PlannedEncoder
from fsae.stages.config import AutoencoderConfig
from fsae.stages.objective import Objective, Reconstruction
from fsae.stages.patches import Patch, decode, draw_patch, draw_span
from fsae.stages.start import prepared_model
from fsae.storage.checkpoint import save_state
from fsae.tiling import Window
from fsae.training.logs import frame_grid
from fsae.training.loop import Task, train
from fsae.training.runs import read_samples, report_end, save_parts


class AutoencoderTask(Task):
    """Reconstruct clips: `{"video": B 3 T H W in [-1, 1]}`.

    The decoder is given the clip's own first frame, from the same encoder pass, where the model injects it.

    Args:
        config: The training.
        model: The autoencoder, trained whole, or its decoder alone with `config.freeze_encoder`.
        objective: The loss; what `config` asks for if None.
        validation: Clips `N 3 T H W` to validate on.
    """

    added_settings = MappingProxyType(
        {
            "model.injection_sampling": False,
            "model.frame_matching": False,
            "model.shortcut": "dc-ae",
            "patch.latents": 0,
        }
    )

    def __init__(
        self,
        config: AutoencoderConfig,
        model: FSAE,
        objective: Objective | None = None,
        validation: Tensor | None = None,
    ) -> None:
        halo = model.decoder.halo
        if 0 < config.patch.cells <= 2 * halo:
            raise UserError(
                f"patch.cells is {config.patch.cells}; a patch loses {halo} cells on each side, "
                f"give more than {2 * halo}, or 0 for whole frames"
            )
        if config.freeze_encoder:
            model.encoder.requires_grad_(False)
        self.config, self.model, self.validation = config, model, validation
        self.objective = Objective.from_config(config, model) if objective is None else objective
        imitated = self.objective.distillation
        decoders = [model.decoder] + ([imitated.teacher.decoder] if imitated else [])
        before, behind = (max(sides) for sides in zip(*(decoder.reach for decoder in decoders), strict=True))
        if 0 < config.patch.latents <= behind:
            raise UserError(
                f"patch.latents is {config.patch.latents}; a patch at the clip's start loses {behind} latents at its "
                f"end, give more than {behind}, or 0 for whole clips"
            )
        self.reach = before, behind
        self.parts = self.objective.parts()
        self.modules = {"autoencoder": model} | {k: m for part in self.parts for k, m in part.trained.items()}
        self.frozen = {name: module for part in self.parts for name, module in part.frozen.items()}
        if adversary := self.objective.adversary:
            self.opponents = {"discriminator": adversary.discriminator}
            self.opponent_optimizer = adversary.config.optimizer
        self.settings = self._settings()

    def _settings(self) -> Mapping[str, Any]:
        objective = self.objective
        perceptual = objective.perceptual
        return {
            "model": self.model.public_config,
            "perceptual": perceptual.network.trunk.name if perceptual else "none",
            "perceptual_weight": perceptual.weight if perceptual else 0.0,
            "adversarial": objective.adversary and asdict(objective.adversary.config),
            "alignment": objective.alignment and asdict(objective.alignment.config),
            "distillation": objective.distillation and asdict(objective.distillation.config),
            "patch": asdict(self.config.patch),
            "freeze_encoder": self.config.freeze_encoder,
        }

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """The weighted sum of all parts, "loss", and each part before its weight; PSNR in dB beside them.

        With a patch, L1, LPIPS, the adversary and PSNR see its core alone.
        """
        seen = self._reconstruct(batch["video"], generator)
        total: Tensor | float = 0.0
        shown: dict[str, Tensor] = {}
        for part in self.parts:
            term = part.term(seen, total, generator)
            total, shown = total + term.loss, shown | term.shown
        assert isinstance(total, Tensor)
        return {"loss": total, **shown, "psnr": psnr(seen.made.detach().clamp(-1, 1), seen.target).mean()}

    def opponent_loss(
        self, batch: Any, outputs: Mapping[str, Tensor], generator: torch.Generator, step: int
    ) -> dict[str, Tensor]:
        """The discriminator's, on the same clips and reconstructions; nothing before its start."""
        adversary = self.objective.adversary
        if adversary is None or not adversary.present(step):
            return {}
        return adversary.loss(outputs["keep_target"], outputs["keep_reconstruction"], step)

    def validate(self, step: int) -> dict[str, Tensor]:
        """Mean PSNR of the validation clips; frames of theirs over their reconstructions."""
        if self.validation is None:
            return {}
        device = next(self.model.parameters()).device
        # One at a time: a validation must not need more memory than training does.
        clips = [clip.unsqueeze(0) for clip in self.validation]
        results = [self._result(clip.to(device)).float().clamp(-1, 1).cpu() for clip in clips]
        quality = torch.cat([psnr(result, clip) for result, clip in zip(results, clips, strict=True)])
        return {"psnr": quality.mean(), "reconstruction": frame_grid([self.validation, torch.cat(results)])}

    def _result(self, clip: Tensor) -> Tensor:
        """What a validation sees of a clip."""
        memory = self.config.memory
        if memory is None:
            return self.model(clip)
        return self.model.decode(self.model.encode(clip, memory), clip[:, :, :1], memory=memory)

    def _reconstruct(self, video: Tensor, generator: torch.Generator) -> Reconstruction:
        """Encode and decode; noise and patch are drawn here, in this order."""
        decoder, (height, width) = self.model.decoder, video.shape[3:]
        latents, first_frame = self._encode(video)
        noise = decoder.draw_noise(height, width, generator)
        patch = self._draw_patch(video, generator)
        with recorded(decoder, self.objective.recorded_stages) as features:
            in_parts = not self.objective.recorded_stages
            made = decode(decoder, latents, first_frame, noise, patch, self.config.memory, in_parts)
        outer = decoder.outer_stages
        target = video if patch is None else patch.target(video, outer.cell, outer.compression.time)
        return Reconstruction(video, latents, first_frame, noise, patch, made, target, features, self.step)

    def _encode(self, video: Tensor) -> tuple[Tensor, FirstFrame | None]:
        """Latents `B c t h w`, not normalised, and the first frame's features where they are injected."""
        injected, memory = self.model.config.first_frame_injection, self.config.memory
        if self.config.freeze_encoder:
            # Nothing of the clip's feature maps is held: the first frame is encoded once more, by itself.
            with torch.no_grad():
                latents = self.model.denormalize(self.model.encode(video, memory))
                return latents, self.model.first_frame_features(video[:, :, :1], memory) if injected else None
        self.model.latent_shape(*video.shape[2:])
        first = self.model.first_injected_stage
        encoder = PlannedEncoder.of_training(self.model.encoder, video, memory)
        features, latents = encoder.features(video, first)
        return latents, [None] * first + features if injected else None

    def _draw_patch(self, video: Tensor, generator: torch.Generator) -> Patch | None:
        config, outer = self.config.patch, self.model.decoder.outer_stages
        if video.shape[3] * video.shape[4] <= config.above:
            return None
        height, width = (side // outer.cell for side in video.shape[3:])
        patch = draw_patch(height, width, config.cells, outer.halo, generator) if config.cells else None
        latents = outer.compression.latents(video.shape[2])
        spans = draw_span(latents, config.latents, self.reach, generator) if config.latents else None
        if spans is None:
            return patch
        whole = Window(0, 0, height, width)
        return replace(patch or Patch(whole, whole), span=spans[0], core_span=spans[1])


@torch.no_grad()
def measure_latent_statistics(
    model: FSAE, dataset: Any, batches: int, batch_size: int = 1, progress: bool = False
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over clips spread evenly over a dataset.

    Measured on what the encoder gives before normalisation, in fp64; the diffusion transformer needs latents
    of unit variance (one number for all 128 channels is not enough). A channel that never changes gets the
    deviation 1.

    Returns:
        `latents_mean` and `latents_std` for the model's configuration.
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
    """Train an FSAE on `dataset`, or the clips that `config` describes, and save it with its latent statistics.

    The statistics of a frozen encoder are kept, those of a trained one are measured anew.

    Returns:
        The saved model's folder; None if a signal stopped the run, which then can be resumed.
    """
    loop = config.loop
    torch.manual_seed(loop.seed)
    model = prepared_model(config)
    for shape in config.clips.shapes:
        model.latent_shape(*shape)
    clips, held_out, batch = read_samples(config, dataset)
    task = AutoencoderTask(config, model, validation=None if batch is None else batch["video"])
    result = train(task, clips, loop)
    if not report_end(result, loop.max_steps, clips, held_out):
        return None
    trained = result.export("autoencoder")
    assert isinstance(trained, FSAE)
    if not config.freeze_encoder or trained.config.latents_mean is None:
        number, shown = config.statistics_batches, result.is_main_process
        mean, std = measure_latent_statistics(trained, clips, number, loop.batch_size, progress=shown)
        trained.register_to_config(latents_mean=mean, latents_std=std)
    if task.opponents and result.is_main_process:
        save_state(task.opponents["discriminator"], result.output_dir / "discriminator.safetensors")
    return save_parts(result, {"autoencoder": trained})[0]
