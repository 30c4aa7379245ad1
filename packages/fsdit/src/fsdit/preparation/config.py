"""What is prepared before a training, captions and the cache, as YAML file, flags and their help. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fsae.bounds import Bound, Checked, Count, Folder, Index, Several, Source, Text, Weight
from fsae.data.config import ClipsConfig
from fsae.errors import UserError, require


@dataclass(frozen=True)
class CacheConfig(Checked):
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
        clips: What is taken of data, and of more; buckets take the place of frames, height and width.
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

    data: Source
    output: Folder
    autoencoder: Folder
    encoders: str = ""
    pairs: bool = False
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    clips_per_file: Count = 1
    latents: Literal["fp16", "fp32"] = "fp16"
    text_len: Several = 512
    image_size: Count = 64
    prompts: str | None = None
    shard_size: Count = 256
    batch_size: Count = 1
    memory_gb: Weight = 0.0
    readers: Count = 2
    device: str | None = None
    seed: Index = 0
    rank: int = 0
    ranks: Count = 1
    verify: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.rank < self.ranks, "rank", self.rank, f"0 to {self.ranks - 1} with ranks {self.ranks}")
        if self.encoders == "nano":
            raise UserError(
                'encoders "nano" start with random weights and are trained with the transformer, so that what they '
                "give cannot be kept; leave encoders out, or give a folder of trained ones"
            )


PROMPT = (
    "These pictures are frames of one video, in order. Describe the video in one paragraph: what is seen and where, "
    "how it looks, what moves and how, and what the camera does. State only what the pictures show."
)

Listing = Annotated[str, Bound("a file's name that ends in .jsonl", lambda name: name.lower().endswith(".jsonl"))]
Pixels = Annotated[int, Bound(f"{56 * 56} or more", lambda count: count >= 56 * 56)]


@dataclass(frozen=True)
class CaptionConfig(Checked):
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

    data: Text
    output: Listing
    model: Text
    frames: Count = 8
    max_pixels: Pixels = 360 * 640
    prompt: Text = PROMPT
    max_tokens: Count = 256
    keep: bool = True
    device: str | None = None
