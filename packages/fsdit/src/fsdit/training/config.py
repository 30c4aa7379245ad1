"""What a training by flow matching is made of: at once the YAML file, the flags and their help. Imports no torch.

One configuration covers pre-training and supervised fine-tuning (paper §2.3.2); `configs/` holds a file a stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fsae.data.config import BucketConfig, ClipsConfig, SourceConfig, require_size
from fsae.errors import UserError, require
from fsae.training.config import LoopConfig
from fsdit.flow.path import FlowSchedule


@dataclass(frozen=True)
class FlowMatchingConfig:
    """What the base model's training and the refiner's have in common.

    Attributes:
        data: Folder of videos and images, or a .jsonl or .csv list with the columns path and caption.
        autoencoder: Folder of the saved FSAE that turns clips into latents; it stays as it is.
        loop: The run.
        model: A preset's name, or the folder of a saved FSDiT to go on from.
        encoders: Folder with text_encoder, tokenizer and image_encoder, or "nano" for small ones with random weights.
        train_encoders: Train the text and image encoder with the transformer; by default only those that start random.
        frames: Frames of a clip, 1 + 4k; 1 trains on images.
        height: Clips are resized and cropped to this height, a multiple of 64.
        width: As height: their width, a multiple of 64.
        stride: Take every stride-th frame of a file.
        flow: Noise levels: logit-normal with mean and std, then shifted.
        huber_delta: Where the pseudo-Huber loss turns from square to linear, as a root mean square error.
        huber_elements: Take that loss of each element by itself, not of a sample's mean square error; 0.1 then suits
            as huber_delta.
        stills_see_image: Show clips of one frame their own picture through the image encoder, as those of more frames
            see their first frame. It is the very picture that is to be learned, so that by default they see none of
            it and are made of the caption alone.
        caption_dropout: Share of captions replaced by the empty prompt, which classifier-free guidance needs.
        router_rate: Learning rate of the Layer Memory routers as a multiple of the others'; they are never decayed.
        gradient_checkpointing: Recompute each block in the backward pass to save memory.
        context_parallel: How many processes share each sample, by its tokens; the number of processes is a multiple of
            it. The weights do not depend on it where the other processes' number stays.
        validation_data: Folder or list of held-out clips to validate on; without it, the first training clips.
        validation_samples: Clips to validate on.
        validation_steps: Sampling steps for the validation clips.
        validation_guidance: Their classifier-free guidance; 1 for none.
        validation_fps: Frames per second of the videos that show them, in OUTPUT_DIR/samples.
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
    huber_elements: bool = False
    stills_see_image: bool = False
    caption_dropout: float = 0.1
    router_rate: float = 10.0
    gradient_checkpointing: bool = False
    context_parallel: int = 1
    validation_data: str | None = None
    validation_samples: int = 4
    validation_steps: int = 20
    validation_guidance: float = 3.0
    validation_fps: float = 24.0

    def __post_init__(self) -> None:
        require(self.huber_delta > 0, "huber_delta", self.huber_delta, "above 0")
        require(0 <= self.caption_dropout <= 1, "caption_dropout", self.caption_dropout, "in [0, 1]")
        require(self.router_rate >= 0, "router_rate", self.router_rate, "0 or more")
        require(self.validation_fps > 0, "validation_fps", self.validation_fps, "above 0")
        for name in ("context_parallel", "validation_samples", "validation_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
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
        buckets: Lengths and sizes of the clips of data, a mixture by weight, in place of frames, height and width,
            which then are those of validation. A bucket of one frame trains on images as well.
        more_data: Further sources, with their shares beside data, whose share is 1.
        fps: Sample videos at this frame rate, whatever the file's; null takes every frame of a file.
        reader: What decodes videos, "pyav" or "decord".
        model_options: Values that replace some of the preset's, by name.
        frames: Frames of a clip, 1 + 4k; 1 trains on images. With cache, of the clips to validate on.
        height: Clips are resized and cropped to this height, a multiple of 64. With cache as frames.
        width: As height: their width, a multiple of 64.
        validation_data: Folder or list of held-out clips to validate on, with cache a cache of such; without it, the
            first training clips.
    """

    data: str = ""
    autoencoder: str = ""
    cache: list[str] = field(default_factory=list)
    buckets: list[BucketConfig] = field(default_factory=list)
    more_data: list[SourceConfig] = field(default_factory=list)
    fps: float | None = None
    reader: Literal["pyav", "decord"] = "pyav"
    model_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_size(self.frames, self.height, self.width)
        require(self.fps is None or self.fps > 0, "fps", self.fps, "above 0, or null")
        require(self.reader in ("pyav", "decord"), "reader", self.reader, '"pyav" or "decord"')
        if self.cache:
            self._check_cache()

    def _check_cache(self) -> None:
        """What a cache has settled already."""
        if self.data:
            raise UserError(f"data is {self.data!r} and cache is {self.cache}; a training reads one of them, give one")
        settled: dict[str, Any] = {
            "buckets": [],
            "more_data": [],
            "fps": None,
            "stride": 1,
            "reader": "pyav",
        }
        for name, unset in settled.items():
            if getattr(self, name) != unset:
                raise UserError(f"{name} is given with cache, in which all clips are cut and encoded; leave {name} out")

    @property
    def clips(self) -> ClipsConfig | None:
        """The mixture of clips to train on; None where clips of one length and size come from one source as it is."""
        if not (self.buckets or self.more_data or self.fps is not None or self.reader != "pyav"):
            return None
        buckets = self.buckets or [BucketConfig(self.frames, height=self.height, width=self.width)]
        return ClipsConfig([SourceConfig(self.data), *self.more_data], buckets, self.fps, self.stride, self.reader)
