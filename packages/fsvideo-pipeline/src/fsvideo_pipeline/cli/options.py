"""The options of the commands.

They stand apart because jsonargparse, to resolve their annotations, executes the imports for type checkers of
the module that they are in, and a command's module names classes that need torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GenerateOptions:
    """How the video is made. What is not given, the model's own settings say.

    Attributes:
        image: Photo that the video starts with.
        prompt: What happens in the video.
        output: Video to write.
        seed: Number that all noise is made from; the same seed makes the same video. Default: drawn, and
            printed.
        size: WIDTHxHEIGHT of the video in pixels. Default: the photo's aspect ratio at the model's own area.
        frames: Number of frames; the nearest 1 + 4k is made.
        fps: Frames per second.
        steps: Steps of the base model.
        guidance: Scale of classifier-free guidance: how strictly the prompt is followed; 1 switches it off.
        model: Folder of the models, as FSVideoPipeline.save_pretrained writes it. Default: the nano model of
            this package.
        keep_latents: Whether to keep the latents that the video was decoded from.
        no_metadata: Whether to leave prompt, seed, sizes and versions out of the video file.
    """

    image: str
    prompt: str
    output: str
    seed: int | None = None
    size: str | None = None
    frames: int | None = None
    fps: float | None = None
    steps: int | None = None
    guidance: float | None = None
    model: str | None = None
    keep_latents: bool = False
    no_metadata: bool = False
