"""What a training of the transformer is made of: at once the YAML file, the flags and their help. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from fsae.errors import UserError
from fsae.training.config import LoopConfig
from fsdit.flow import FlowSchedule


@dataclass(frozen=True)
class TransformerConfig:
    """Training of FSDiT by flow matching on one's own captioned videos or images (paper §2.3.2).

    Attributes:
        data: Folder of videos and images, or a .jsonl or .csv list with the columns path and caption.
        autoencoder: Folder of the saved FSAE that turns clips into latents; it stays as it is.
        loop: The run.
        model: A preset's name, or the folder of a saved FSDiT to go on from.
        encoders: Folder with text_encoder, tokenizer and image_encoder, or "nano" for small ones with random weights.
        train_encoders: Train the text and image encoder with the transformer; by default only those that start random.
        frames: Frames of a clip, 1 + 4k; 1 trains on images.
        height: Clips are resized and cropped to this height, a multiple of 64.
        width: Likewise.
        stride: Take every stride-th frame of a file.
        flow: Noise levels: logit-normal with mean and std, then shifted.
        huber_delta: Where the pseudo-Huber loss turns from square to linear, as a root mean square error.
        caption_dropout: Share of captions replaced by the empty prompt, which classifier-free guidance needs.
        router_rate: Learning rate of the Layer Memory routers as a multiple of the others'; they are never decayed.
        gradient_checkpointing: Recompute each block in the backward pass to save memory.
        validation_data: Folder or list of held-out clips to validate on; without it, the first training clips.
        validation_samples: Clips to validate on.
        validation_steps: Sampling steps for the validation clips.
        validation_guidance: Their classifier-free guidance; 1 for none.
    """

    data: str
    autoencoder: str
    loop: LoopConfig
    model: str = "nano"
    encoders: str = "nano"
    train_encoders: bool | None = None
    frames: int = 17
    height: int = 256
    width: int = 256
    stride: int = 1
    flow: FlowSchedule = field(default_factory=FlowSchedule)
    huber_delta: float = 0.25
    caption_dropout: float = 0.1
    router_rate: float = 10.0
    gradient_checkpointing: bool = False
    validation_data: str | None = None
    validation_samples: int = 4
    validation_steps: int = 20
    validation_guidance: float = 3.0

    def __post_init__(self) -> None:
        _require(self.huber_delta > 0, "huber_delta", self.huber_delta, "above 0")
        _require(0 <= self.caption_dropout <= 1, "caption_dropout", self.caption_dropout, "in [0, 1]")
        _require(self.router_rate >= 0, "router_rate", self.router_rate, "0 or more")
        for name in ("validation_samples", "validation_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        if self.encoders == "nano" and self.train_encoders is False:
            raise UserError(
                'encoders "nano" start with random weights, but train_encoders is false; '
                "set it to true or give a folder of trained encoders"
            )

    @property
    def trains_encoders(self) -> bool:
        """Whether text and image encoder are trained: as told, or exactly if they start random."""
        return self.encoders == "nano" if self.train_encoders is None else self.train_encoders


def _require(condition: bool, name: str, value: object, accepted: str) -> None:
    if not condition:
        raise UserError(f"{name} is {value!r}; it must be {accepted}")
