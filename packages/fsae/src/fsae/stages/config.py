"""The stages of FSAE's training (paper §2.2.1 to §2.2.3), as the YAML file, the flags and their help. No torch here.

One configuration covers them all; `configs/` holds a file a stage. Stage 1 is its defaults on images and short clips,
stage 2 adds the adversary, stage 3 the patches and the slices; the alignment, the decoder's fine-tuning and the
distillation of a Lite decoder are each a part that is on or off.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fsae.bounds import Checked, Count, Index, Several, Weight
from fsae.errors import UserError
from fsae.training.config import ClipTrainingConfig, OptimizerConfig

Conversion = Literal["none", "dc-ae", "standard", "lite"]


@dataclass(frozen=True)
class AdversarialConfig(Checked, part="adversarial"):
    """The discriminator and its part in the loss (paper §2.2.1).

    Attributes:
        weight: Of the generator's loss beside L1; the paper has 0.1, and 0 trains no discriminator.
        start: The step from which on discriminator and autoencoder see each other.
        width: Channels of the discriminator's first layer.
        scales: How many scales it looks at, each half as large as the one before.
        r1_gamma: Weight of R1; 0 leaves it out.
        r1_every: R1 is taken every so many steps, at so many times its weight.
        weights: File of a trained discriminator of these sizes to go on from; a training leaves one in
            OUTPUT_DIR/discriminator.safetensors.
        optimizer: AdamW's settings for the discriminator.
    """

    weight: Weight = 0.0
    start: Index = 0
    width: Count = 64
    scales: Count = 3
    r1_gamma: Weight = 10.0
    r1_every: Count = 16
    weights: str | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(frozen=True)
class PatchConfig(Checked, part="patch"):
    """Training of the decoder on patches with exact borders (paper §2.2.1, stage 3).

    Attributes:
        cells: Side of a patch, in cells of 8 pixels; the outer stages run on it alone, and the loss is taken where it
            equals the whole frame: 7 cells less on each side that is not the frame's. 0 is whole frames.
        above: Frames of at most this many pixels are trained whole.
        latents: Length of a patch, in latents: the outer stages run on so many, and the loss is taken where it equals
            the whole clip's. A causal decoder's patch loses 25 latents behind a start that is not the clip's, so that a
            shorter one is always the clip's beginning; the Lite one loses 13 there, the Standard one 13 at both ends.
            0 is whole clips.
    """

    cells: Index = 0
    above: Index = 0
    latents: Index = 0


@dataclass(frozen=True)
class AlignmentConfig(Checked, part="alignment"):
    """The Video VF loss (paper §2.2.2, eq. 2 to 4).

    Attributes:
        teacher: Folder of a DINOv2 as transformers saves it; or "lpips", the deepest features of the perceptual
            loss's own trunk, for small machines. Without one there is no alignment.
        weight: The paper's alpha.
        cosine_margin: The paper's m1.
        distance_margin: The paper's m2.
        positions: At most so many positions of a clip are compared pair by pair, chosen at random.
        adaptive: Above 0, the weight is this number times the ratio of the gradients of the reconstruction loss and
            of the alignment at the encoder's last convolution, as in VA-VAE, in place of weight.
    """

    teacher: str | None = None
    weight: Weight = 0.5
    cosine_margin: Weight = 0.5
    distance_margin: Weight = 0.25
    positions: Several = 4096
    adaptive: Weight = 0.0


@dataclass(frozen=True)
class DistillationConfig(Checked, part="distillation"):
    """A frozen model whose decoder is imitated: FSAE-Lite learns from FSAE-Standard (paper §2.2.3).

    Attributes:
        teacher: Folder of a saved FSAE with the same encoder. Without one nothing is distilled.
        pixel_weight: Of the L1 distance to the teacher's reconstruction.
        feature_weight: Of the relative squared distance to its decoder's features, in all stages of equal width.
    """

    teacher: str | None = None
    pixel_weight: Weight = 1.0
    feature_weight: Weight = 1.0


@dataclass(frozen=True)
class AutoencoderConfig(ClipTrainingConfig):
    """Training of FSAE on one's own videos or images.

    Attributes:
        data: Folder of videos and images, or a .jsonl or .csv list with the column path.
        model: A preset's name, or the folder of a saved FSAE to go on from; with convert dc-ae, the folder of a DC-AE.
        model_options: Values that replace some of the preset's, or that the conversion takes, by name.
        convert: What is made of the model before it is trained: "dc-ae" inflates a DC-AE to an FSAE with a causal
            decoder, "standard" turns a causal decoder into a Standard one, "lite" a Standard one into a Lite one.
        freeze_encoder: Train the decoder alone; latents, and their statistics, stay what they are.
        perceptual_weights: Files (.safetensors or .pth) that together hold the trunk (AlexNet or VGG16) and
            the linear heads of LPIPS; without them the loss is L1 alone.
        perceptual_weight: Weight of LPIPS beside L1.
        perceptual_slice: Take LPIPS over so many frames at a time, to save memory; 0 is all at once.
        adversarial: The discriminator.
        alignment: The Video VF loss.
        distillation: The decoder to imitate.
        patch: The patches that the decoder is trained on.
        memory: With gradient_checkpointing, bytes that the outer stages of the encoder, and those of the decoder, may
            take: where a clip takes more, they run in tiles and in chunks of time, which are computed anew in the
            backward pass. Gradients are those of the whole. null is no limit.
        statistics_batches: Batches of training clips from which the latents' mean and deviation are measured
            in the end.
        channels_last: Keep convolutions in channels-last layout, about twice as fast.
    """

    model_options: dict[str, Any] = field(default_factory=dict)
    convert: Conversion = "none"
    freeze_encoder: bool = False
    perceptual_weights: list[str] = field(default_factory=list)
    perceptual_weight: Weight = 0.1
    perceptual_slice: Index = 0
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    patch: PatchConfig = field(default_factory=PatchConfig)
    memory: Count | None = None
    statistics_batches: Count = 32
    channels_last: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alignment.teacher == "lpips" and not self.perceptual_weights:
            raise UserError("alignment.teacher is lpips, but there are no perceptual_weights; give LPIPS's files")
        if self.alignment.teacher is not None and self.freeze_encoder:
            raise UserError(
                "the alignment trains the encoder, which is frozen; unset alignment.teacher or freeze_encoder"
            )
        if self.alignment.adaptive > 0 and self.loop.sharding == "fsdp2":
            raise UserError("alignment.adaptive needs whole gradients; set loop.sharding to ddp, or adaptive to 0")
        if self.memory is not None and not self.gradient_checkpointing:
            raise UserError(
                "memory bounds what is held while parts are computed anew; set gradient_checkpointing to true, or "
                "memory to null"
            )
        if self.distillation.teacher is not None and not self.freeze_encoder:
            raise UserError("a decoder is distilled on the teacher's own latents; set freeze_encoder to true")
