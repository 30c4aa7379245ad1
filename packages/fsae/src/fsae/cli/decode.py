"""`fsae decode`: latents back into a video or an image."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from fsae.cli.options import add_memory_option, add_model_options, check_output, load_model
from fsae.errors import UserError
from fsae.storage.files import atomic_path

if TYPE_CHECKING:
    import torch

    from fsae.model import FSAE
    from fsae.transcoding.latents import SavedLatents


def main(argv: list[str]) -> int:
    """`fsae decode`: latents to frames."""
    options = _parser().parse_args(argv)

    from fsae.data.video import SUFFIXES

    check_output(options.output, (*SUFFIXES, ".png"))

    from fsae.transcoding.latents import load_latents
    from fsae.transcoding.transcode import decode_file

    saved = load_latents(options.input)
    picture = options.output.lower().endswith(".png")
    if picture and saved.latents.shape[1] > 1:
        raise UserError(f"{options.input} is a clip of several frames; give an output such as clip.mp4")
    model = load_model(options)
    _check_fit(options.input, saved, model)
    first = _first_frame(options.first_frame, saved, model)
    print(f"decoding {saved.latents.shape[1]} latent frame(s)", file=sys.stderr)
    began = time.monotonic()
    if picture:
        frames = _save_picture(options.output, saved, model, first, options.memory)
    else:
        frames = decode_file(model, saved, options.output, first, options.memory)
    print(f"saved {options.output} ({frames} frame(s)) in {time.monotonic() - began:.1f} s")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fsae decode",
        description="Decode latents that 'fsae encode' wrote. A causal or Lite decoder works through clips of any "
        "length, and the same command goes on where it was stopped; a Standard decoder takes the clip at once.",
    )
    parser.add_argument("input", help="latents, .safetensors")
    parser.add_argument("-o", "--output", required=True, help="video; latents of one frame may also become a .png")
    parser.add_argument(
        "--first-frame",
        help="image to take as the clip's first frame, which decoders with injection draw detail from; without it, "
        "the one that lies with the latents",
    )
    add_memory_option(parser)
    add_model_options(parser)
    return parser


def _check_fit(path: str, saved: SavedLatents, model: FSAE) -> None:
    """Refuse latents of another encoder than the model's."""
    channels, wanted = saved.latents.shape[0], model.config.latent_channels
    if channels != wanted:
        raise UserError(f"the latents have {channels} channels, the model {wanted}; give the model that made them")

    from fsae.transcoding.fingerprints import encoder_fingerprint

    if saved.encoder is not None and saved.encoder != encoder_fingerprint(model):
        raise UserError(
            f"{path} was made by another encoder than this model's; give the model that made it, "
            "or one whose decoder was trained on the same encoder"
        )


def _first_frame(path: str | None, saved: SavedLatents, model: FSAE) -> torch.Tensor | None:
    """The first frame as `1 3 1 H W`: the given image, or the one that came with the latents."""
    if not model.config.first_frame_injection:
        if path is not None:
            raise UserError("the model's decoder takes no first frame; leave --first-frame out")
        return None
    import torch

    from fsae.data.image import cover, load_image
    from fsae.data.video import to_video_tensor

    if path is not None:
        height, width = (side * model.spatial_compression for side in saved.latents.shape[2:])
        frame = torch.from_numpy(cover(load_image(path), (height, width)))
    elif saved.first_frame is not None:
        frame = saved.first_frame
    else:
        print(
            "no first frame came with these latents; the decoder draws detail from one: give it by --first-frame",
            file=sys.stderr,
        )
        return None
    return to_video_tensor(frame.unsqueeze(0)).unsqueeze(0).to(model.device, model.dtype)


def _save_picture(path: str, saved: SavedLatents, model: FSAE, first: torch.Tensor | None, memory: int | None) -> int:
    """The one frame as a .png."""
    import torch
    from PIL import Image

    from fsae.data.video import to_frames

    latents = saved.latents.unsqueeze(0).to(model.device, model.dtype)
    with torch.no_grad():
        frames = to_frames(model.decode(latents, first, memory=memory)[0])
    with atomic_path(path) as temporary:
        Image.fromarray(frames[0].numpy()).save(temporary)
    return 1
