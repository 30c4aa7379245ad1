"""`fsae eval`: an autoencoder's figures on held-out clips."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from fsae.cli.options import add_memory_option, add_model_options, load_model, parse_count
from fsae.shapes import PAPER

_NAMED = 10  # skipped files


def main(argv: list[str]) -> int:
    """`fsae eval`: a folder with eval.json, table.md, grid.png and curves.png."""
    options = _parser().parse_args(argv)

    from fsae.evaluation.evaluate import EvalSettings, evaluate

    given = vars(options) | {"lpips": tuple(options.lpips)}
    settings = EvalSettings(**{field.name: given[field.name] for field in fields(EvalSettings)})
    report = evaluate(load_model(options), settings, options.output)
    print((Path(options.output) / "table.md").read_text(encoding="utf-8"), end="")
    skipped = report["skipped"]
    if skipped:
        more = f" and {len(skipped) - _NAMED} more, all in eval.json" if len(skipped) > _NAMED else ""
        print(f"skipped {', '.join(skipped[:_NAMED])}{more}")
    print(f"saved {options.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fsae eval",
        description="Reconstruct held-out clips and write PSNR, SSIM, LPIPS, FVD, flicker, curves over the frames, the "
        "latents' intrinsic dimension, speed and peak memory.",
    )
    parser.add_argument("data", help="folder of videos and images, .jsonl or .csv list, .tar, or a pattern of these")
    parser.add_argument("-o", "--output", required=True, help="folder to write; it must not be there, or be empty")
    add_model_options(parser)
    counts = {
        "--frames": (17, f"frames of a clip, 1 + {PAPER.time}k at the temporal compression of all presets"),
        "--height": (256, f"pixels, a multiple of the model's spatial compression ({PAPER.space} in all presets)"),
        "--width": (256, "as --height"),
        "--stride": (1, "take every STRIDE-th frame of a file"),
        "--batch-size": (1, "clips encoded and decoded together"),
    }
    for name, (default, text) in counts.items():
        parser.add_argument(name, type=parse_count, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--samples", type=parse_count, help="clips to measure, drawn by the seed; without it, all")
    parser.add_argument(
        "--seed", type=int, default=0, help="decides which files, and where in them clips start (default: 0)"
    )
    parser.add_argument(
        "--lpips", nargs="+", default=(), metavar="WEIGHTS", help="files with LPIPS' trunk and heads; measures LPIPS"
    )
    parser.add_argument("--fvd", metavar="I3D", help="i3d_torchscript.pt, a program that is run; measures FVD")
    parser.add_argument(
        "--dimension-of",
        choices=("position", "clip"),
        default="position",
        help="what a point of the intrinsic dimension is: each latent position, or each whole clip "
        "(default: %(default)s)",
    )
    add_memory_option(parser)
    return parser
