"""The stages of FSAE's training (paper §2.2.1 to §2.2.3), as the YAML file, the flags and their help. No torch here.

One configuration covers them all; `configs/` holds a file a stage. Stage 1 is its defaults on images and short clips,
stage 2 adds the adversary, stage 3 the patches and the slices; the alignment, the decoder's fine-tuning and the
distillation of a Lite decoder are each a part that is on or off.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fsae.data.config import BucketConfig, ClipsConfig, SourceConfig
from fsae.errors import UserError, require
from fsae.training.config import LoopConfig, OptimizerConfig

Conversion = Literal["none", "dc-ae", "standard", "lite"]


@dataclass(frozen=True)
class AdversarialConfig:
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

    weight: float = 0.0
    start: int = 0
    width: int = 64
    scales: int = 3
    r1_gamma: float = 10.0
    r1_every: int = 16
    weights: str | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        for name in ("weight", "start", "r1_gamma"):
            require(getattr(self, name) >= 0, f"adversarial.{name}", getattr(self, name), "0 or more")
        for name in ("width", "scales", "r1_every"):
            require(getattr(self, name) >= 1, f"adversarial.{name}", getattr(self, name), "1 or more")


@dataclass(frozen=True)
class PatchConfig:
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

    cells: int = 0
    above: int = 0
    latents: int = 0

    def __post_init__(self) -> None:
        for name in ("cells", "above", "latents"):
            require(getattr(self, name) >= 0, f"patch.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True)
class AlignmentConfig:
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
    weight: float = 0.5
    cosine_margin: float = 0.5
    distance_margin: float = 0.25
    positions: int = 4096
    adaptive: float = 0.0

    def __post_init__(self) -> None:
        for name in ("weight", "cosine_margin", "distance_margin", "adaptive"):
            require(getattr(self, name) >= 0, f"alignment.{name}", getattr(self, name), "0 or more")
        require(self.positions >= 2, "alignment.positions", self.positions, "2 or more")


@dataclass(frozen=True)
class DistillationConfig:
    """A frozen model whose decoder is imitated: FSAE-Lite learns from FSAE-Standard (paper §2.2.3).

    Attributes:
        teacher: Folder of a saved FSAE with the same encoder. Without one nothing is distilled.
        pixel_weight: Of the L1 distance to the teacher's reconstruction.
        feature_weight: Of the relative squared distance to its decoder's features, in all stages of equal width.
    """

    teacher: str | None = None
    pixel_weight: float = 1.0
    feature_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("pixel_weight", "feature_weight"):
            require(getattr(self, name) >= 0, f"distillation.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True)
class AutoencoderConfig:
    """Training of FSAE on one's own videos or images.

    Attributes:
        data: Folder of videos and images, or a .jsonl or .csv list with the column path.
        loop: The run.
        buckets: Lengths and sizes of the clips, a mixture by weight, in place of frames, height and width, which then
            are those of validation. A bucket of one frame trains on images as well.
        more_data: With buckets: further sources, with their shares beside data, whose share is 1.
        fps: With buckets: sample videos at this frame rate; null takes every frame.
        reader: With buckets: what decodes videos, "pyav" or "decord".
        model: A preset's name, or the folder of a saved FSAE to go on from; with convert dc-ae, the folder of a DC-AE.
        model_options: Values that replace some of the preset's, or that the conversion takes, by name.
        convert: What is made of the model before it is trained: "dc-ae" inflates a DC-AE to an FSAE with a causal
            decoder, "standard" turns a causal decoder into a Standard one, "lite" a Standard one into a Lite one.
        freeze_encoder: Train the decoder alone; latents, and their statistics, stay what they are.
        frames: Frames of a clip, 1 + 4k; 1 trains on images.
        height: Clips are resized and cropped to this height, a multiple of 64.
        width: As height: their width, a multiple of 64.
        stride: Take every stride-th frame of a file.
        perceptual_weights: Files (.safetensors or .pth) that together hold the trunk (AlexNet or VGG16) and
            the linear heads of LPIPS; without them the loss is L1 alone.
        perceptual_weight: Weight of LPIPS beside L1.
        perceptual_slice: Take LPIPS over so many frames at a time, to save memory; 0 is all at once.
        adversarial: The discriminator.
        alignment: The Video VF loss.
        distillation: The decoder to imitate.
        patch: The patches that the decoder is trained on.
        gradient_checkpointing: Recompute each block in the backward pass to save memory.
        memory: With it, bytes that the outer stages of the encoder, and those of the decoder, may take: where a clip
            takes more, they run in tiles and in chunks of time, which are computed anew in the backward pass. Gradients
            are those of the whole. null is no limit.
        validation_data: Folder or list of held-out clips to validate on; without it, the first training
            clips.
        validation_samples: Clips to validate on.
        statistics_batches: Batches of training clips from which the latents' mean and deviation are measured
            in the end.
        channels_last: Keep convolutions in channels-last layout, about twice as fast.
    """

    data: str
    loop: LoopConfig
    buckets: list[BucketConfig] = field(default_factory=list)
    more_data: list[SourceConfig] = field(default_factory=list)
    fps: float | None = None
    reader: Literal["pyav", "decord"] = "pyav"
    model: str = "nano"
    model_options: dict[str, Any] = field(default_factory=dict)
    convert: Conversion = "none"
    freeze_encoder: bool = False
    frames: int = 17
    height: int = 256
    width: int = 256
    stride: int = 1
    perceptual_weights: list[str] = field(default_factory=list)
    perceptual_weight: float = 0.1
    perceptual_slice: int = 0
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    patch: PatchConfig = field(default_factory=PatchConfig)
    gradient_checkpointing: bool = False
    memory: int | None = None
    validation_data: str | None = None
    validation_samples: int = 4
    statistics_batches: int = 32
    channels_last: bool = True

    def __post_init__(self) -> None:
        conversions = ("none", "dc-ae", "standard", "lite")
        require(self.convert in conversions, "convert", self.convert, "none, dc-ae, standard or lite")
        for name in ("perceptual_weight", "perceptual_slice"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("validation_samples", "statistics_batches"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        self._check_parts()

    def _check_parts(self) -> None:
        """Options that need each other, or exclude each other."""
        if not self.buckets and (self.more_data or self.fps is not None or self.reader != "pyav"):
            raise UserError("more_data, fps and reader belong to buckets, and there are none; give at least one bucket")
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

    @property
    def clips(self) -> ClipsConfig | None:
        """The mixture of clips to train on; None without buckets."""
        if not self.buckets:
            return None
        sources = [SourceConfig(self.data), *self.more_data]
        return ClipsConfig(sources, self.buckets, self.fps, self.stride, self.reader)
