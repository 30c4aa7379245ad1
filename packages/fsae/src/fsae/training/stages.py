"""The stages of FSAE's training (paper §2.2.1 to §2.2.3), as the YAML file, the flags and their help. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field

from fsae.training.config import LoopConfig, require


@dataclass(frozen=True)
class AutoencoderConfig:
    """Training of FSAE on one's own videos or images (paper §2.2.2, the losses of stage 1).

    Attributes:
        data: Folder of videos and images, or a .jsonl or .csv list with the column path.
        loop: The run.
        model: A preset's name, or the folder of a saved FSAE to go on from.
        frames: Frames of a clip, 1 + 4k; 1 trains on images.
        height: Clips are resized and cropped to this height, a multiple of 64.
        width: Likewise.
        stride: Take every stride-th frame of a file.
        perceptual_weights: Files (.safetensors or .pth) that together hold the trunk (AlexNet or VGG16) and
            the linear heads of LPIPS; without them the loss is L1 alone.
        perceptual_weight: Weight of LPIPS beside L1.
        validation_data: Folder or list of held-out clips to validate on; without it, the first training
            clips.
        validation_samples: Clips to validate on.
        statistics_batches: Batches of training clips from which the latents' mean and deviation are measured
            in the end.
        channels_last: Keep convolutions in channels-last layout, about twice as fast.
    """

    data: str
    loop: LoopConfig
    model: str = "nano"
    frames: int = 17
    height: int = 256
    width: int = 256
    stride: int = 1
    perceptual_weights: list[str] = field(default_factory=list)
    perceptual_weight: float = 0.1
    validation_data: str | None = None
    validation_samples: int = 4
    statistics_batches: int = 32
    channels_last: bool = True

    def __post_init__(self) -> None:
        require(self.perceptual_weight >= 0, "perceptual_weight", self.perceptual_weight, "0 or more")
        for name in ("validation_samples", "statistics_batches"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
