"""What is left on disk: the video with its metadata, and until that is written the latents it is made of."""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fsae.data.video import check_video_target, write_video
from fsae.errors import CheckpointError
from fsae.storage.files import check_writable

if TYPE_CHECKING:
    from fsvideo_pipeline.pipeline import Sample

LATENTS_SUFFIX = ".latents.safetensors"
PACKAGES = ("fsae", "fsdit", "fsupsampler", "fsvideo-pipeline", "torch", "diffusers", "transformers")


def latents_path(video: str | os.PathLike[str]) -> Path:
    """Where the latents of a video lie: beside it, under its name."""
    return Path(video).with_suffix(LATENTS_SUFFIX)


def check_output(video: str | os.PathLike[str]) -> None:
    """UserError, before any work, if a video or its latents cannot be written."""
    check_video_target(video)
    check_writable(latents_path(video))


def describe(request: dict[str, Any]) -> dict[str, str]:
    """A video's metadata: the request and the versions that answered it, as JSON in a tag players show.

    It is made when the video is: what is unknown is left out, and what is no text becomes question marks.
    """
    facts = {**request, "versions": _versions() | {"python": platform.python_version()}}
    return {"comment": json.dumps(facts, ensure_ascii=False).encode(errors="replace").decode()}


def _versions() -> dict[str, str]:
    """Of the packages whose installation says it; those that lie on the path or in a bundle have none."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def save_video(
    path: str | os.PathLike[str], frames: NDArray[np.uint8], fps: float, metadata: dict[str, str] | None
) -> None:
    """Frames `T H W 3` as an mp4 that browsers play; see `fsae.data.video.write_video`."""
    write_video(path, frames, fps, metadata)


def save_sample(path: str | os.PathLike[str], sample: Sample) -> None:
    """All that decoding needs, as one safetensors file: latents, canvas, the decoder's noise and the geometry."""
    import torch
    from safetensors.torch import save_file

    from fsae.storage.files import atomic_path

    tensors = {
        "latents": sample.latents.contiguous(),
        "canvas": torch.from_numpy(np.ascontiguousarray(sample.canvas)),
        "noise_state": sample.noise_state,
    }
    geometry = sample.geometry
    plan = {"width": geometry.size.width, "height": geometry.size.height, "frames": geometry.frames}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "plan": json.dumps(plan)})


def load_sample(path: str | os.PathLike[str]) -> Sample:
    """What `save_sample` wrote, for `FSVideoPipeline.decode`; CheckpointError if it is missing, cut short or no
    sample."""
    from safetensors import safe_open

    from fsae.storage.checkpoint import tensor_shapes
    from fsvideo_pipeline.pipeline import Sample
    from fsvideo_pipeline.plan import Size, VideoGeometry

    names = set(tensor_shapes(path))
    with safe_open(path, framework="pt") as file:
        stored = (file.metadata() or {}).get("plan")
        if stored is None or names != {"latents", "canvas", "noise_state"}:
            raise CheckpointError(f"{path} is no saved sample; give a file that ends in {LATENTS_SUFFIX}")
        tensors = {name: file.get_tensor(name) for name in names}
    plan = json.loads(stored)
    latents, canvas = tensors["latents"], tensors["canvas"].numpy()
    height, width = canvas.shape[:2]
    _, _, *latent_size = latents.shape
    geometry = VideoGeometry(
        plan["frames"], Size(plan["width"], plan["height"]), Size(width, height), tuple(latent_size)
    )
    return Sample(latents, canvas, geometry, tensors["noise_state"])
