"""What a training by flow matching is made of: at once the YAML file, the flags and their help. Imports no torch.

One configuration covers pre-training and supervised fine-tuning (paper §2.3.2); `configs/` holds a file a stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fsae.bounds import Count, Positive, Share, Weight
from fsae.errors import UserError
from fsae.training.config import ClipTrainingConfig
from fsdit.flow.path import FlowSchedule


@dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig(ClipTrainingConfig):
    """What the base model's training and the refiner's have in common.

    Attributes:
        autoencoder: Folder of the saved FSAE that turns clips into latents; it stays as it is.
        model: A preset's name, or the folder of a saved FSDiT to go on from.
        encoders: Folder with text_encoder, tokenizer and image_encoder, or "nano" for small ones with random weights.
        train_encoders: Train the text and image encoder with the transformer; by default only those that start random.
        flow: Noise levels: logit-normal with mean and std, then shifted.
        huber_delta: Where the pseudo-Huber loss turns from square to linear, as a root mean square error.
        huber_elements: Take that loss of each element by itself, not of a sample's mean square error; 0.1 then suits
            as huber_delta.
        stills_see_image: Show clips of one frame their own picture through the image encoder, as those of more frames
            see their first frame. It is the very picture that is to be learned, so that by default they see none of
            it and are made of the caption alone.
        caption_dropout: Share of captions replaced by the empty prompt, which classifier-free guidance needs.
        router_rate: Learning rate of the Layer Memory routers as a multiple of the others'; they are never decayed.
        context_parallel: How many processes share each sample, by its tokens; the number of processes is a multiple of
            it. The weights do not depend on it where the other processes' number stays.
        validation_steps: Sampling steps for the validation clips.
        validation_guidance: Their classifier-free guidance; 1 for none.
        validation_fps: Frames per second of the videos that show them, in OUTPUT_DIR/samples.
    """

    autoencoder: str
    encoders: str = "nano"
    train_encoders: bool | None = None
    flow: FlowSchedule = field(default_factory=FlowSchedule)
    huber_delta: Positive = 0.25
    huber_elements: bool = False
    stills_see_image: bool = False
    caption_dropout: Share = 0.1
    router_rate: Weight = 10.0
    context_parallel: Count = 1
    validation_steps: Count = 20
    validation_guidance: float = 3.0
    validation_fps: Positive = 24.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoders == "nano" and self.train_encoders is False:
            raise UserError(
                'encoders "nano" start with random weights, but train_encoders is false; '
                "set it to true or give a folder of trained encoders"
            )

    @property
    def trains_encoders(self) -> bool:
        """Whether text and image encoder are trained: as told, or exactly if they start random."""
        return self.encoders == "nano" if self.train_encoders is None else self.train_encoders


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(FlowMatchingConfig):
    """Training of FSDiT by flow matching on one's own captioned videos or images (paper §2.3.2).

    Attributes:
        data: Folder of videos and images, or a .jsonl or .csv list with the columns path and caption, encoded as they
            come. Empty with cache.
        autoencoder: Folder of the saved FSAE that turns clips into latents; it stays as it is. With cache it is only
            needed to see validation samples.
        encoders: Folder with text_encoder, tokenizer and image_encoder, or "nano" for small ones with random weights.
            Left out with a cache that holds what they gave.
        cache: Folders that "fsdit cache" made, in place of data.
        model_options: Values that replace some of the preset's, by name.
        validation_data: Folder or list of held-out clips to validate on, with cache a cache of such; without it, the
            first training clips.
    """

    data: str = ""
    autoencoder: str = ""
    cache: list[str] = field(default_factory=list)
    model_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache and self.data:
            raise UserError(f"data is {self.data!r} and cache is {self.cache}; a training reads one of them, give one")
