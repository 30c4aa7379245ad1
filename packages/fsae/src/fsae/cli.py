"""The ``fsae`` command line. Nothing here imports torch until a command has read its arguments."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import fsae
from fsae.commandline import Command, run
from fsae.errors import UserError
from fsae.files import atomic_path, check_writable

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from fsae.model import FSAE

COMMANDS = (
    Command("train", "train an autoencoder on a folder of videos and images", "fsae.cli:train"),
    Command("encode", "turn a video or an image into latents", "fsae.cli:encode"),
    Command("decode", "turn latents back into a video or an image", "fsae.cli:decode"),
)


def main(argv: list[str] | None = None) -> int:
    """Run ``fsae``; returns its exit code."""
    return run("fsae", "FSAE, the video autoencoder of FSVideo.", fsae.__version__, COMMANDS, argv)


def train(argv: list[str]) -> int:
    """``fsae train``: every field of AutoencoderConfig is a flag and a key of the YAML file."""
    from jsonargparse import ArgumentParser

    from fsae.training.config import AutoencoderConfig

    parser = ArgumentParser(prog="fsae train", description="Train FSAE; the result is OUTPUT_DIR/autoencoder.")
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_class_arguments(AutoencoderConfig, as_group=True)
    options = parser.instantiate(parser.parse_args(argv))
    settings = {key: value for key, value in vars(options).items() if key != "config"}
    config = AutoencoderConfig(**settings)

    from fsae.training.autoencoder import train_autoencoder

    folder = train_autoencoder(config)
    if folder is not None:
        print(f"saved {folder}")
    return 0


def encode(argv: list[str]) -> int:
    """``fsae encode``: a file's latents and its frame rate."""
    parser = argparse.ArgumentParser(
        prog="fsae encode",
        description="Encode a video or an image. Frames are resized and cropped to multiples of the model's "
        "spatial compression (64), and a clip is cut to 1 + 4k frames.",
    )
    parser.add_argument("input", help="video or image")
    parser.add_argument("-o", "--output", required=True, help="latents, .safetensors")
    _add_model_options(parser)
    options = parser.parse_args(argv)
    _check_output(options.output, (".safetensors",))

    import torch

    from fsae.data.latents import save_latents
    from fsae.data.video import to_video_tensor

    model = _load(options)
    frames, fps = _read_clip(Path(options.input), model.spatial_compression, model.temporal_compression)
    count, height, width = frames.shape[:3]
    print(f"encoding {count} frame(s) of {width}x{height}", file=sys.stderr)
    began = time.monotonic()
    with torch.no_grad():
        latents = model.encode(to_video_tensor(frames).unsqueeze(0).to(model.device))[0].float().cpu()
    save_latents(options.output, latents, fps)
    print(f"saved {options.output} ({'x'.join(map(str, latents.shape))}) in {time.monotonic() - began:.1f} s")
    return 0


def decode(argv: list[str]) -> int:
    """``fsae decode``: latents to frames."""
    parser = argparse.ArgumentParser(prog="fsae decode", description="Decode latents that 'fsae encode' wrote.")
    parser.add_argument("input", help="latents, .safetensors")
    parser.add_argument("-o", "--output", required=True, help="video; latents of one frame may also become a .png")
    parser.add_argument("--first-frame", help="the clip's first frame, which decoders with injection draw detail from")
    _add_model_options(parser)
    options = parser.parse_args(argv)

    from fsae.data.video import SUFFIXES

    _check_output(options.output, (*SUFFIXES, ".png"))

    import torch

    from fsae.data.latents import load_latents
    from fsae.data.video import to_frames

    latents, fps = load_latents(options.input)
    if options.output.endswith(".png") and latents.shape[1] > 1:
        raise UserError(f"{options.input} is a clip of several frames; give an output such as clip.mp4")
    model = _load(options)
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


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder of a saved FSAE")
    parser.add_argument("--device", help="cpu, cuda, ...; without it, the accelerator if there is one")


def _check_output(path: str, suffixes: tuple[str, ...]) -> None:
    if Path(path).suffix.lower() not in suffixes:
        raise UserError(f"cannot write {path}; give a name that ends in {', '.join(suffixes)}")
    check_writable(path)


def _load(options: argparse.Namespace) -> FSAE:
    import torch

    from fsae.model import FSAE

    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    # torch answers an unknown name, a device that is not there and one it was not built for in different
    # ways.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the device {options.device} cannot be used ({reason}); try cpu") from None
    return FSAE.from_pretrained(options.model).to(device).eval()


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
