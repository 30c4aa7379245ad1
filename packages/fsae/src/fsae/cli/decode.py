"""``fsae decode``: latents back into a video or an image."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from fsae.cli.options import add_model_options, check_output, load_model
from fsae.errors import UserError
from fsae.files import atomic_path

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


def main(argv: list[str]) -> int:
    """``fsae decode``: latents to frames."""
    parser = argparse.ArgumentParser(prog="fsae decode", description="Decode latents that 'fsae encode' wrote.")
    parser.add_argument("input", help="latents, .safetensors")
    parser.add_argument("-o", "--output", required=True, help="video; latents of one frame may also become a .png")
    parser.add_argument("--first-frame", help="the clip's first frame, which decoders with injection draw detail from")
    add_model_options(parser)
    options = parser.parse_args(argv)

    from fsae.data.video import SUFFIXES

    check_output(options.output, (*SUFFIXES, ".png"))

    import torch

    from fsae.data.latents import load_latents
    from fsae.data.video import to_frames

    latents, fps = load_latents(options.input)
    if options.output.endswith(".png") and latents.shape[1] > 1:
        raise UserError(f"{options.input} is a clip of several frames; give an output such as clip.mp4")
    model = load_model(options)
    if latents.shape[0] != model.config.latent_channels:
        wanted = model.config.latent_channels
        raise UserError(
            f"the latents have {latents.shape[0]} channels, the model {wanted}; give the model that made them"
        )
    first = _first_frame(options.first_frame, [side * model.spatial_compression for side in latents.shape[2:]])
    print(f"decoding {latents.shape[1]} latent frame(s)", file=sys.stderr)
    began = time.monotonic()
    with torch.no_grad():
        first = None if first is None else first.to(model.device)
        frames = to_frames(model.decode(latents.unsqueeze(0).to(model.device), first_frame=first)[0])
    _write(options.output, frames.numpy(), fps)
    print(f"saved {options.output} ({len(frames)} frame(s)) in {time.monotonic() - began:.1f} s")
    return 0


def _first_frame(path: str | None, size: list[int]) -> torch.Tensor | None:
    """The image as ``1 3 1 H W``."""
    if path is None:
        return None
    import torch

    from fsae.data.datasets import cover
    from fsae.data.image import load_image
    from fsae.data.video import to_video_tensor

    image = cover(load_image(path), (size[0], size[1]))
    return to_video_tensor(torch.from_numpy(image).unsqueeze(0)).unsqueeze(0)


def _write(path: str, frames: NDArray[np.uint8], fps: float) -> None:
    if path.endswith(".png"):
        from PIL import Image

        with atomic_path(path) as temporary:
            Image.fromarray(frames[0]).save(temporary)
    else:
        from fsae.data.video import write_video

        write_video(path, frames, fps)
