"""What the training runs are made of: at once the YAML files, the flags and their help. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fsae.bounds import Bound, Checked, Count, Decay, Several, Share, Weight
from fsae.errors import UserError, require
from fsae.training.config import ClipTrainingConfig
from fsdit.flow.path import FlowSchedule
from fsdit.training.config import FlowMatchingConfig

_RATIOS = Bound("three numbers of at least 0, not all 0", lambda ratios: min(ratios) >= 0 and sum(ratios) > 0)
Ratios = Annotated[tuple[float, float, float], _RATIOS]


@dataclass(frozen=True)
class UpsamplerLoss(Checked, part="loss"):
    """Weights of the upsampler's loss (paper §2.4.1, eq. 9).

    Attributes:
        latent: Of the L1 distance to the high-resolution latents.
        pixel: Of the L1 distance between the decoded draft and the video; 0 and no perceptual loss spare the
            decoding.
        perceptual: Of LPIPS on the decoded draft, if its weights are given.
    """

    latent: Weight = 0.1
    pixel: Weight = 0.1
    perceptual: Weight = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.latent + self.pixel > 0, "loss", self, "above 0 for latent or pixel")


@dataclass(frozen=True, kw_only=True)
class UpsamplerConfig(ClipTrainingConfig):
    """Training of LatentUpsampler on one's own videos, each paired with its half-size copy (paper §2.4.1).

    Attributes:
        data: Folder of videos and images, or a .jsonl or .csv list with the column path; or a folder that
            "fsdit cache" made with pairs, whose clips have their own lengths and sizes.
        autoencoder: Folder of the saved FSAE that turns clips into latents; it stays as it is.
        model: A preset's name, or the folder of a saved LatentUpsampler to go on from.
        loss: Weights of the loss.
        perceptual_weights: Files (.safetensors or .pth) that together hold LPIPS's trunk and linear heads;
            without them there is no perceptual loss.
        validation_data: Folder or list of held-out clips to validate on, with a cache a cache of such; without it,
            the first training clips.
    """

    autoencoder: str
    loss: UpsamplerLoss = field(default_factory=UpsamplerLoss)
    perceptual_weights: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MaskConfig(Checked, part="mask"):
    """The dynamic mask (paper §2.4.2).

    Attributes:
        low: The mask where the draft's error is largest; above 0.
        high: The mask where it is smallest; below 1.
        scalar: One number for the whole frame instead of a map.
        inverted: High where the error is high.
        decay: Of the running percentiles of the error.
    """

    low: Share = 0.1
    high: Share = 0.9
    scalar: bool = False
    inverted: bool = False
    decay: Decay = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.low <= self.high, "mask.low", self.low, f"at most mask.high, {self.high}")


@dataclass(frozen=True)
class RegularizationConfig(Checked, part="regularization"):
    """What is done to the draft in training, so that the refiner does not merely copy it (paper §2.4.2).

    Attributes:
        dropout: Share of samples whose drafted frames are dropped, which leaves plain image-to-video.
        replacement: Share of samples in which some drafted frames are replaced by true ones.
        replacement_fraction: Largest share of frames replaced in a sample; the share is uniform up to it.
        shuffle: Share of samples whose drafted frames are put out of order.
        shuffle_ratios: How often that permutes neighbours, swaps two distant frames, or permutes all.
        shuffle_window: Number of neighbours.
    """

    dropout: Share = 0.1
    replacement: Share = 0.5
    replacement_fraction: Share = 0.3
    shuffle: Share = 0.5
    shuffle_ratios: Ratios = (0.6, 0.3, 0.1)
    shuffle_window: Several = 3


@dataclass(frozen=True, kw_only=True)
class RefinerConfig(FlowMatchingConfig):
    """Training of the refiner, an FSDiT at twice the base model's size (paper §2.4.2).

    Attributes:
        data: Folder of videos and images, or a .jsonl or .csv list with the columns path and caption; or a folder
            that "fsdit cache" made with pairs, whose clips have their own lengths and sizes.
        upsampler: Folder of the saved LatentUpsampler that makes the drafts; it stays as it is.
        encoders: Folder with the base model's text_encoder, tokenizer and image_encoder; they stay as they
            are.
        model: Folder of the saved FSDiT to start from, best the base model, or a preset's name for random
            weights.
        flow: Noise levels; larger clips want a larger shift.
        validation_steps: Sampling steps for the validation clips.
        validation_guidance: Their classifier-free guidance; the refiner needs none.
        mask: The dynamic mask.
        regularization: What is done to the draft in training.
        base: Folder of the base FSDiT, to make drafts of its one-step estimates instead of the true latents.
        base_flow: The noise levels of these estimates.
    """

    upsampler: str
    encoders: str = field()
    flow: FlowSchedule = field(default_factory=lambda: FlowSchedule(shift=8.0))
    validation_steps: Count = 8
    validation_guidance: float = 1.0
    mask: MaskConfig = field(default_factory=MaskConfig)
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    base: str | None = None
    base_flow: FlowSchedule = field(default_factory=FlowSchedule)

    def __post_init__(self) -> None:
        if self.encoders == "nano" or self.train_encoders:
            raise UserError(
                "the refiner reads the base model's encoders and leaves them as they are; "
                "give encoders as their folder and leave train_encoders out"
            )
        super().__post_init__()
