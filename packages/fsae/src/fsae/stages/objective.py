"""The autoencoder's loss, part by part (paper §2.2.1 to §2.2.3).

L = L1 + 0.1 LPIPS [+ 0.1 GAN] [+ alpha (v-mcos + v-mdms)] [+ distillation]

Every part looks at the same frozen `Reconstruction` and answers with a `Term`; the task adds them up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fsae.decoder import FirstFrame
from fsae.errors import UserError
from fsae.losses.adversarial import Discriminator, discriminator_loss, generator_loss, r1_penalty
from fsae.losses.alignment import Dinov2Teacher, TrunkTeacher, VideoVFLoss, adaptive_weight, teacher_features
from fsae.losses.distillation import feature_distance, recorded, shared_stages
from fsae.losses.perceptual import PerceptualLoss, temporal_slices
from fsae.losses.reconstruction import l1_loss
from fsae.model import FSAE
from fsae.stages.config import AdversarialConfig, AlignmentConfig, AutoencoderConfig, DistillationConfig
from fsae.stages.patches import Patch, decode
from fsae.storage.checkpoint import load_state

_NONE: Mapping[str, nn.Module] = MappingProxyType({})


@dataclass(frozen=True)
class Reconstruction:
    """One micro-batch on its way through the model: what the parts of the loss look at.

    Attributes:
        video: What was encoded, `B 3 T H W` in [-1, 1].
        latents: `B c t h w`, not normalised.
        first_frame: The first frame's features, where the decoder injects them.
        noise: What the decoder added.
        patch: The part of the clip that the outer stages ran on; None is all of it.
        made: The video that was decoded, or its core in the patch.
        target: What `made` should be.
        features: By stage, what the decoder gave in the stages that `Objective.recorded_stages` names.
        step: Updates done.
    """

    video: Tensor
    latents: Tensor
    first_frame: FirstFrame | None
    noise: list[list[Tensor]]
    patch: Patch | None
    made: Tensor
    target: Tensor
    features: Mapping[int, Tensor]
    step: int


class Term(NamedTuple):
    """A part's weighted share of the loss, and what is logged of it: the share's summands before their weights."""

    loss: Tensor | float
    shown: dict[str, Tensor]


class LossPart(Protocol):
    """One part of the loss."""

    @property
    def trained(self) -> Mapping[str, nn.Module]:
        """Modules of its own that are trained with the autoencoder."""
        ...

    @property
    def frozen(self) -> Mapping[str, nn.Module]:
        """Modules that it only reads."""
        ...

    def term(self, seen: Reconstruction, before: Tensor | float, generator: torch.Generator) -> Term:
        """Its share of the loss.

        Args:
            seen: The micro-batch.
            before: The sum of the parts before it, against which a weight may be balanced.
            generator: Of the micro-batch; what it draws, it draws here.
        """
        ...


class L1:
    """Mean absolute difference of the pixels, with weight 1."""

    trained = frozen = _NONE

    def term(self, seen: Reconstruction, before: Tensor | float, generator: torch.Generator) -> Term:
        value = l1_loss(seen.made, seen.target)
        return Term(value, {"l1": value})


class Lpips:
    """LPIPS, over all frames at once or over a few of them at a time.

    Args:
        network: The perceptual network.
        weight: Of its distance.
        slice_frames: Frames at a time; 0 is all.
    """

    trained = _NONE

    def __init__(self, network: PerceptualLoss, weight: float = 0.1, slice_frames: int = 0) -> None:
        self.network, self.weight, self.slice_frames = network, weight, slice_frames
        self.frozen = {"perceptual": network}

    def term(self, seen: Reconstruction, before: Tensor | float, generator: torch.Generator) -> Term:
        value = temporal_slices(self.network, seen.made, seen.target, self.slice_frames)
        return Term(self.weight * value, {"perceptual": value})


class Adversary:
    """The discriminator: a part of the autoencoder's loss, and a loss of its own."""

    # The discriminator is trained against the autoencoder, by an optimiser of its own.
    trained = frozen = _NONE

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

    def term(self, seen: Reconstruction, before: Tensor | float, generator: torch.Generator) -> Term:
        """The generator's loss, and what the discriminator is to see; nothing before its start."""
        if not self.present(seen.step):
            return Term(0.0, {})
        value = generator_loss(self.discriminator(seen.made))
        shown = {"adversarial": value, "keep_reconstruction": seen.made, "keep_target": seen.target}
        return Term(self.config.weight * value, shown)

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
        self.config, self.teacher, self.encoder = config, teacher, model.encoder
        self.period = model.temporal_compression
        self.loss = VideoVFLoss(
            model.config.latent_channels,
            teacher.channels,
            config.cosine_margin,
            config.distance_margin,
            config.positions,
        )
        self.trained, self.frozen = {"alignment": self.loss}, {"teacher": teacher}

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

    def term(self, seen: Reconstruction, before: Tensor | float, generator: torch.Generator) -> Term:
        """v-mcos and v-mdms of the latents, with the fixed weight or in balance with the parts before."""
        parts = self.loss(seen.latents, teacher_features(self.teacher, seen.video, self.period), generator)
        shown = {"alignment_cosine": parts.cosine, "alignment_distance": parts.distance}
        if self.config.adaptive == 0:
            return Term(self.config.weight * parts.total, shown)
        assert isinstance(before, Tensor)
        # At the encoder's last convolution both losses have passed everything they share.
        shown["alignment_weight"] = self.config.adaptive * adaptive_weight(
            before, parts.total, self.encoder.conv_out.weight
        )
        return Term(shown["alignment_weight"] * parts.total, shown)


class Distillation:
    """A frozen autoencoder with the same encoder, whose decoder is imitated.

    Raises:
        UserError: the teacher has another encoder, or stages that cannot be compared.
    """

    trained = _NONE

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
        self.frozen = {"distilled": self.teacher}

    def term(self, seen: Reconstruction, before: Tensor | float, generator: torch.Generator) -> Term:
        """The distance to what the teacher's decoder makes of the same latents and noise, in pixels and features."""
        injected = seen.first_frame if self.teacher.config.first_frame_injection else None
        decoder = self.teacher.decoder
        with torch.no_grad(), recorded(decoder, self.stages) as features:
            latents = seen.latents.detach()
            target = decode(decoder, latents, injected, seen.noise, seen.patch, in_parts=not self.stages)
        shown = {"distillation_pixels": l1_loss(seen.made, target)}
        loss = self.config.pixel_weight * shown["distillation_pixels"]
        if self.stages:
            mine, its = (self._exact(found, seen.patch) for found in (seen.features, features))
            shown["distillation_features"] = feature_distance(mine, its)
            loss = loss + self.config.feature_weight * shown["distillation_features"]
        return Term(loss, shown)

    def _exact(self, features: Mapping[int, Tensor], patch: Patch | None) -> Mapping[int, Tensor]:
        """Where outer stages ran on a patch, the part of their features that is the whole frame's."""
        if patch is None:
            return features
        outer = self.teacher.decoder.outer_stages
        return {
            s: patch.right(feature, outer.cell >> s, outer.compression.rate(s)) if s < outer.count else feature
            for s, feature in features.items()
        }


@dataclass(frozen=True)
class Objective:
    """The parts that a stage's loss has beside L1."""

    perceptual: Lpips | None = None
    adversary: Adversary | None = None
    alignment: Alignment | None = None
    distillation: Distillation | None = None

    @classmethod
    def from_config(cls, config: AutoencoderConfig, model: FSAE) -> Objective:
        """The parts that a training asks for, with every network they read."""
        perceptual = None
        if config.perceptual_weights:
            network = PerceptualLoss.from_files(*config.perceptual_weights)
            perceptual = Lpips(network, config.perceptual_weight, config.perceptual_slice)
        adversary = Adversary.from_config(config.adversarial)
        if adversary is not None and config.channels_last:
            adversary.discriminator.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        distillation = None
        if config.distillation.teacher is not None:
            teacher = FSAE.from_pretrained(config.distillation.teacher)
            distillation = Distillation(model, teacher, config.distillation)
        alignment = Alignment.from_config(model, config.alignment, perceptual.network if perceptual else None)
        return cls(perceptual, adversary, alignment, distillation)

    def parts(self) -> list[LossPart]:
        """All parts, those before an alignment being L1 and LPIPS, against which its weight may be balanced.

        (An alignment trains the encoder and a distillation freezes it, so there are never both.)
        """
        given: Sequence[LossPart | None] = (self.distillation, L1(), self.perceptual, self.alignment, self.adversary)
        return [part for part in given if part is not None]

    @property
    def recorded_stages(self) -> Sequence[int]:
        """The decoder's stages whose features a part compares."""
        return self.distillation.stages if self.distillation is not None else ()
