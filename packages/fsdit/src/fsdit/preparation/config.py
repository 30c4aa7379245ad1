"""What is prepared before a training, captions and the cache, as YAML file, flags and their help. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fsae.data.config import BucketConfig, ClipsConfig, SourceConfig, require_size
from fsae.errors import UserError, require


@dataclass(frozen=True)
class CacheConfig:
    """Clips encoded once: their latents, and the embeddings of their captions and first frames.

    Without encoders the cache keeps captions and first frames themselves, for a training that brings its encoders, and
    trains them if it likes.

    Attributes:
        data: Folder of videos and images, or a .jsonl or .csv list with the columns path and caption.
        output: Folder of the cache. What is finished in it stays, and the same command goes on with the rest.
        autoencoder: Folder of the saved FSAE that gives the latents.
        encoders: Folder with text_encoder, tokenizer and image_encoder; empty keeps captions and first frames as they
            are.
        pairs: Keep of each clip the latents of its half-size copy as well, for the upsampler and the refiner. Sides are
            then multiples of 128.
        frames: Frames of a clip, 1 + 4k; 1 takes images, and single frames of videos.
        height: Clips are resized and cropped to this height, a multiple of 64.
        width: The clips' width, a multiple of 64.
        buckets: Lengths and sizes of the clips, in place of frames, height and width.
        more_data: Further sources, with their shares beside data, whose share is 1.
        fps: Sample videos at this frame rate, whatever the file's; null takes every frame of a file.
        stride: Take every stride-th of these frames.
        reader: What decodes videos, "pyav" or "decord".
        clips_per_file: How many clips to take of each file, at places drawn by chance.
        latents: Precision in which latents are kept, "fp16" or "fp32".
        text_len: The most tokens of a caption, the transformer's text_len.
        image_size: Without encoders, the side of the first frames that are kept: the image encoder's image_size.
        prompts: Folder of prompt embeddings to use and to add to; null is OUTPUT/prompts.
        shard_size: Samples in a file.
        batch_size: Clips of one size that are encoded together.
        memory_gb: What the autoencoder's activations may take, in 10^9 bytes; 0 sets no limit.
        readers: Threads that read clips ahead.
        device: Such as cpu or cuda; null takes the accelerator if there is one.
        seed: Decides which clips are taken of a file.
        rank: This process's number, from 0 on, among those that fill the cache together.
        ranks: The number of these processes; each makes its own shards and waits for no other.
        verify: Read what is finished as well, and make anew what has changed.
    """

    data: str
    output: str
    autoencoder: str
    encoders: str = ""
    pairs: bool = False
    frames: int = 17
    height: int = 256
    width: int = 256
    buckets: list[BucketConfig] = field(default_factory=list)
    more_data: list[SourceConfig] = field(default_factory=list)
    fps: float | None = None
    stride: int = 1
    reader: Literal["pyav", "decord"] = "pyav"
    clips_per_file: int = 1
    latents: Literal["fp16", "fp32"] = "fp16"
    text_len: int = 512
    image_size: int = 64
    prompts: str | None = None
    shard_size: int = 256
    batch_size: int = 1
    memory_gb: float = 0.0
    readers: int = 2
    device: str | None = None
    seed: int = 0
    rank: int = 0
    ranks: int = 1
    verify: bool = False

    def __post_init__(self) -> None:
        for name in ("output", "autoencoder"):
            require(bool(getattr(self, name)), name, getattr(self, name), "a folder's path")
        require(bool(self.data), "data", self.data, "a folder, a list, a tar or a pattern")
        for name in ("stride", "clips_per_file", "shard_size", "batch_size", "readers", "ranks", "image_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.text_len >= 2, "text_len", self.text_len, "2 or more")
        for name in ("memory_gb", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.fps is None or self.fps > 0, "fps", self.fps, "above 0, or null")
        require(self.latents in ("fp16", "fp32"), "latents", self.latents, '"fp16" or "fp32"')
        require(0 <= self.rank < self.ranks, "rank", self.rank, f"0 to {self.ranks - 1} with ranks {self.ranks}")
        if self.encoders == "nano":
            raise UserError(
                'encoders "nano" start with random weights and are trained with the transformer, so that what they '
                "give cannot be kept; leave encoders out, or give a folder of trained ones"
            )
        if not self.buckets:
            require_size(self.frames, self.height, self.width)
        assert self.clips  # whose parts check themselves

    @property
    def clips(self) -> ClipsConfig:
        """Sources, buckets, and how videos are sampled."""
        buckets = self.buckets or [BucketConfig(self.frames, height=self.height, width=self.width)]
        sources = [SourceConfig(self.data), *self.more_data]
        return ClipsConfig(sources, buckets, self.fps, self.stride, self.reader)


PROMPT = (
    "These pictures are frames of one video, in order. Describe the video in one paragraph: what is seen and where, "
    "how it looks, what moves and how, and what the camera does. State only what the pictures show."
)


@dataclass(frozen=True)
class CaptionConfig:
    """Captions of videos and images, written by a vision-language model.

    Attributes:
        data: Folder of videos and images, or a .jsonl or .csv list with the column path, and start and end if wanted.
        output: The list to write, .jsonl, one object a line; "fsdit cache" and "fsdit train" read it. What is in it
            stays, and the same command goes on with the rest.
        model: Folder of a Qwen2.5-VL as transformers saves it.
        frames: Frames that are shown of a video, spread evenly over it.
        max_pixels: Pixels of a frame; larger ones are scaled down, sides rounded to what the model takes.
        prompt: What the model is asked.
        max_tokens: The longest answer.
        keep: Leave entries that the source has a caption for as they are.
        device: Such as cpu or cuda; null takes the accelerator if there is one.
    """

    data: str
    output: str
    model: str
    frames: int = 8
    max_pixels: int = 360 * 640
    prompt: str = PROMPT
    max_tokens: int = 256
    keep: bool = True
    device: str | None = None

    def __post_init__(self) -> None:
        require(self.output.lower().endswith(".jsonl"), "output", self.output, "a file's name that ends in .jsonl")
        for name in ("frames", "max_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.max_pixels >= 56 * 56, "max_pixels", self.max_pixels, f"{56 * 56} or more")
        for name in ("data", "model", "prompt"):
            require(bool(getattr(self, name).strip()), name, getattr(self, name), "given")
