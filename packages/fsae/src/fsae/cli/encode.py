"""``fsae encode``: a video or an image into latents."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fsae.cli.options import add_model_options, check_output, load_model
from fsae.errors import UserError

if TYPE_CHECKING:
    import torch


def main(argv: list[str]) -> int:
    """``fsae encode``: a file's latents and its frame rate."""
    parser = argparse.ArgumentParser(
        prog="fsae encode",
        description="Encode a video or an image. Frames are resized and cropped to multiples of the model's "
        "spatial compression (64), and a clip is cut to 1 + 4k frames.",
    )
    parser.add_argument("input", help="video or image")
    parser.add_argument("-o", "--output", required=True, help="latents, .safetensors")
    add_model_options(parser)
    options = parser.parse_args(argv)
    check_output(options.output, (".safetensors",))

    import torch

    from fsae.data.latents import save_latents
    from fsae.data.video import to_video_tensor

    model = load_model(options)
    frames, fps = _read_clip(Path(options.input), model.spatial_compression, model.temporal_compression)
    count, height, width = frames.shape[:3]
    print(f"encoding {count} frame(s) of {width}x{height}", file=sys.stderr)
    began = time.monotonic()
    with torch.no_grad():
        latents = model.encode(to_video_tensor(frames).unsqueeze(0).to(model.device))[0].float().cpu()
    save_latents(options.output, latents, fps)
    print(f"saved {options.output} ({'x'.join(map(str, latents.shape))}) in {time.monotonic() - began:.1f} s")
    return 0


def _read_clip(path: Path, space: int, time: int) -> tuple[torch.Tensor, float]:
    """The file as uint8 ``T H W 3`` of sizes the model takes, and frames per second (1 for an image)."""
    import torch

    from fsae.data.datasets import IMAGE_SUFFIXES, cover
    from fsae.data.image import load_image
    from fsae.data.video import probe, read_video

    if path.suffix.lower() in IMAGE_SUFFIXES:
        image = load_image(path)
        size = _snapped(path, image.shape[0], image.shape[1], space)
        return torch.from_numpy(cover(image, size)).unsqueeze(0), 1.0
    info = probe(path)
    kept = 1 + (info.frames - 1) // time * time
    return read_video(path, frames=kept, size=_snapped(path, info.height, info.width, space))


def _snapped(path: Path, height: int, width: int, space: int) -> tuple[int, int]:
    if min(height, width) < space:
        raise UserError(f"{path} has {width}x{height} pixels; at least {space}x{space} are needed, scale it up first")
    return height // space * space, width // space * space
