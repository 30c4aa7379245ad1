"""What a user asks for, and the job that it becomes. Without torch.

    VideoRequest   as it was asked: a photo, a prompt, and what shall differ from the model's own settings
    Job            the same settled for one model: every setting, the plan of the video, the seed

`resolve` makes the one of the other, once, and refuses there whatever can be refused. Command line, Python and whatever
runs the models hand each other these two values and nothing else.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image

from fsae.errors import UserError
from fsae.shapes import Compression
from fsvideo_pipeline.canvas import Pixels
from fsvideo_pipeline.plan import Size, VideoPlan, plan_video
from fsvideo_pipeline.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

Photo: TypeAlias = "Pixels | Tensor | Image.Image"


@dataclass(frozen=True, eq=False)
class VideoRequest:
    """A video as it is asked for; what is None, the model's settings say.

    Attributes:
        image: a photo, uint8 `H W 3` or an upright PIL image in RGB (`fsae.data.image.load_image`).
        prompt: what happens in the video.
        size: (width, height); None follows the photo's aspect ratio at the settings' area.
        frames: the nearest number that the model can make is made.
        fps: frames per second that the video is played at.
        steps: of the base model.
        guidance: of the base model; 1 switches it off.
        refiner_steps: of the refiner.
        seed: that all noise is made from, from 0 to 2^63 - 1; None draws one.
    """

    image: Photo
    prompt: str
    size: tuple[int, int] | None = None
    frames: int | None = None
    fps: float | None = None
    steps: int | None = None
    guidance: float | None = None
    refiner_steps: int | None = None
    seed: int | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """A video that one model can make: nothing in it is left open, and nothing in it can be refused any more.

    Attributes:
        photo: uint8 `H W 3`.
        prompt: what happens in the video.
        settings: how the models are sampled, and the frames per second. Sizes and frames are the plan's.
        plan: of the video; its notes say what differs from the request.
        seed: that all noise is made from.
    """

    photo: Pixels
    prompt: str
    settings: Settings
    plan: VideoPlan
    seed: int

    def facts(self) -> dict[str, Any]:
        """What makes the video, but for the photo and the model, as JSON takes it."""
        geometry, settings = self.plan.geometry, self.settings
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "size": str(geometry.size),
            "canvas": str(geometry.canvas),
            "frames": geometry.frames,
            "fps": settings.fps,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "refiner_steps": settings.refiner_steps,
        }


def resolve(request: VideoRequest, settings: Settings, compression: Compression) -> Job:
    """The job that a request is for a model of these settings and compression; UserError if something cannot be
    used."""
    settings = settings.override(
        frames=request.frames,
        fps=request.fps,
        steps=request.steps,
        guidance=request.guidance,
        refiner_steps=request.refiner_steps,
    )
    photo = _pixels(request.image)
    _check_prompt(request.prompt)
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    if not 0 <= seed < 2**63:
        raise UserError(f"seed {seed} given; accepted is a whole number from 0 to 2^63 - 1")
    height, width, _ = photo.shape
    asked = None if request.size is None else Size(*request.size)
    plan = plan_video(Size(width, height), settings.area, settings.frames, compression, asked)
    return Job(photo, request.prompt, settings, plan, seed)


def _pixels(image: Photo) -> Pixels:
    """Any accepted form of a photo as uint8 `H W 3`."""
    if isinstance(image, Image.Image) and image.mode != "RGB":
        raise UserError(
            f"a PIL image of mode {image.mode} given; accepted is RGB, as fsae.data.image.load_image reads any"
        )
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise UserError(f"an image of {array.dtype} {array.shape} given; accepted is uint8 H W 3 or a PIL image")
    return array


def _check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise UserError('the prompt is empty; say what happens in the video, such as "the camera pans left"')
    try:
        # Python keeps the bytes of an argument that is no UTF-8 as halves of surrogate pairs.
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"the prompt {prompt!a} is no UTF-8; give it from a terminal or a file that is") from None
