"""The parts of the autoencoder's loss that a stage may have beside L1 and LPIPS (paper §2.2.1 to §2.2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from fsae.decoder import Decoder, FirstFrame
from fsae.errors import UserError
from fsae.losses.adversarial import Discriminator, discriminator_loss, generator_loss, r1_penalty
from fsae.losses.alignment import (
    Dinov2Teacher,
    TrunkTeacher,
    VideoVFLoss,
    adaptive_weight,
    teacher_features,
)
from fsae.losses.distillation import feature_distance, recorded, shared_stages
from fsae.losses.perceptual import PerceptualLoss
from fsae.losses.reconstruction import l1_loss
from fsae.model import FSAE
from fsae.stages.config import AdversarialConfig, AlignmentConfig, DistillationConfig
from fsae.stages.patches import Patch, decode
from fsae.storage.checkpoint import load_state


class Adversary:
    """The discriminator: a term of the autoencoder's loss, and a loss of its own."""

    def __init__(self, config: AdversarialConfig) -> None:
        self.config = config
        self.discriminator = Discriminator(config.width, config.scales)

    @classmethod
    def from_config(cls, config: AdversarialConfig) -> Adversary | None:
        """What the configuration asks for, with the weights that it names; None without a weight in the loss."""
        if config.weight == 0:
            return None
        adversary = cls(config)
        if config.weights is not None:
            load_state(adversary.discriminator, config.weights)
        return adversary

    def present(self, step: int) -> bool:
        """Whether it takes part in the update after `step` finished ones."""
        return step >= self.config.start

    def term(self, reconstruction: Tensor) -> Tensor:
        """The generator's loss, before its weight."""
        return generator_loss(self.discriminator(reconstruction))

    def loss(self, real: Tensor, fake: Tensor, step: int) -> dict[str, Tensor]:
        """The discriminator's loss on clips and their reconstructions, with R1 where its turn has come."""
        value = discriminator_loss(self.discriminator(real), self.discriminator(fake))
        terms = {"logistic": value.detach()}
        if self.config.r1_gamma > 0 and step % self.config.r1_every == 0:
            terms["r1"] = r1_penalty(self.discriminator, real)
            value = value + self.config.r1_every * self.config.r1_gamma / 2 * terms["r1"]
        return {"loss": value, **terms}


class Alignment:
    """The Video VF loss with its teacher; W is trained with the autoencoder."""

    def __init__(self, model: FSAE, teacher: Dinov2Teacher | TrunkTeacher, config: AlignmentConfig) -> None:
        self.config, self.teacher = config, teacher
        self.period = model.temporal_compression
        self.loss = VideoVFLoss(
            model.config.latent_channels,
            teacher.channels,
            config.cosine_margin,
            config.distance_margin,
            config.positions,
        )

    @classmethod
    def from_config(cls, model: FSAE, config: AlignmentConfig, perceptual: PerceptualLoss | None) -> Alignment | None:
        """What the configuration asks for; None if nothing."""
        if config.teacher is None:
            return None
        if config.teacher == "lpips":
            if perceptual is None:
                raise UserError("alignment.teacher is lpips, but there are no perceptual_weights; give LPIPS's files")
            return cls(model, TrunkTeacher(perceptual), config)
        return cls(model, Dinov2Teacher(config.teacher), config)

    def terms(
        self,
        latents: Tensor,
        video: Tensor,
        reconstruction_loss: Tensor,
        weight: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of latents `B c t h w` of a video `B 3 T H W`, and its parts.

        `weight` is that of the encoder's last convolution, for the adaptive balance with `reconstruction_loss`.
        """
        features = teacher_features(self.teacher, video, self.period)
        parts = self.loss(latents, features, generator)
        terms = {"alignment_cosine": parts.cosine, "alignment_distance": parts.distance}
        if self.config.adaptive == 0:
            return self.config.weight * parts.total, terms
        terms["alignment_weight"] = self.config.adaptive * adaptive_weight(reconstruction_loss, parts.total, weight)
        return terms["alignment_weight"] * parts.total, terms


class Distillation:
    """A frozen autoencoder with the same encoder, whose decoder is imitated.

    Raises:
        UserError: the teacher has another encoder, or stages that cannot be compared.
    """

    def __init__(self, model: FSAE, teacher: FSAE, config: DistillationConfig) -> None:
        mine, its = model.encoder.state_dict(), teacher.encoder.state_dict()
        if mine.keys() != its.keys() or not all(torch.equal(mine[name], its[name]) for name in mine):
            raise UserError(
                f"{config.teacher} has another encoder than the model; give the model that the Lite one was made of"
            )
        widths = [m.config.decoder_widths or m.config.widths for m in (model, teacher)]
        self.stages = shared_stages(*widths) if config.feature_weight > 0 else []
        if config.feature_weight > 0 and not self.stages:
            raise UserError("the two decoders share no stage's width; set distillation.feature_weight to 0")
        self.config, self.teacher = config, teacher.requires_grad_(False)

    def student(
        self,
        decoder: Decoder,
        latents: Tensor,
        first_frame: FirstFrame | None,
        noise: list[list[Tensor]],
        patch: Patch | None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Decode with both on the same noise.

        Returns:
            The student's video as `decode` gives it, the weighted loss, and its parts.
        """
        with recorded(decoder, self.stages) as mine:
            video = decode(decoder, latents, first_frame, noise, patch)
        injected = first_frame if self.teacher.config.first_frame_injection else None
        with torch.no_grad(), recorded(self.teacher.decoder, self.stages) as its:
            target = decode(self.teacher.decoder, latents.detach(), injected, noise, patch)
        terms = {"distillation_pixels": l1_loss(video, target)}
        loss = self.config.pixel_weight * terms["distillation_pixels"]
        if self.stages:
            cores = [self._exact(decoder, features, patch) for features in (mine, its)]
            terms["distillation_features"] = feature_distance(*cores)
            loss = loss + self.config.feature_weight * terms["distillation_features"]
        return video, loss, terms

    @staticmethod
    def _exact(decoder: Decoder, features: dict[int, Tensor], patch: Patch | None) -> dict[int, Tensor]:
        """Where outer stages ran on a patch, the part of their features that is the whole frame's."""
        if patch is None:
            return features
        core = patch.core.inside(patch.window)
        outer = decoder.outer_stages
        return {
            s: core.scaled(outer.cell >> s).crop(feature) if s < len(outer.convolutions) else feature
            for s, feature in features.items()
        }
