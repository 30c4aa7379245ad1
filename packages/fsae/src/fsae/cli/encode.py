"""`fsae encode`: a video or an image into latents."""

from __future__ import annotations

import argparse
import time

from fsae.cli.options import add_memory_option, add_model_options, check_output, load_model, parse_count
from fsae.shapes import PAPER


def main(argv: list[str]) -> int:
    """`fsae encode`: a file's latents, its frame rate and its first frame."""
    options = _parser().parse_args(argv)
    check_output(options.output, (".safetensors",))

    from fsae.transcoding.transcode import encode_file

    began = time.monotonic()
    saved = encode_file(load_model(options), options.input, options.output, options.frames, options.memory)
    shape = "x".join(map(str, saved.latents.shape))
    print(f"saved {options.output} ({shape}) in {time.monotonic() - began:.1f} s")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fsae encode",
        description="Encode a video of any length, or an image. Frames are resized and cropped to multiples of the "
        f"model's spatial compression ({PAPER.space} in all presets), and a clip is cut to whole latents, 1 + "
        f"{PAPER.time}k frames. What is done is kept in OUTPUT.partial: the same command goes on where it stopped.",
    )
    parser.add_argument("input", help="video or image")
    parser.add_argument("-o", "--output", required=True, help="latents, .safetensors")
    parser.add_argument("--frames", type=parse_count, help="encode so many frames from the start; without it, all")
    add_memory_option(parser)
    add_model_options(parser)
    return parser
