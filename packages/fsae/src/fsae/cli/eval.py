"""`fsae eval`: an autoencoder's figures on held-out clips."""

from __future__ import annotations

import argparse
from pathlib import Path

from fsae.cli.options import add_memory_option, add_model_options, load_model, parse_count

_NAMED = 10  # skipped files


def main(argv: list[str]) -> int:
    """`fsae eval`: a folder with eval.json, table.md, grid.png and curves.png."""
    options = _parser().parse_args(argv)

    from fsae.evaluation.evaluate import EvalSettings, evaluate

    settings = EvalSettings(
        data=options.data,
        frames=options.frames,
        height=options.height,
        width=options.width,
        stride=options.stride,
        samples=options.samples,
        batch_size=options.batch_size,
        seed=options.seed,
        lpips=tuple(options.lpips),
        fvd=options.fvd,
        memory=options.memory,
        dimension_of=options.dimension_of,
    )
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
    parser.add_argument(
        "--frames", type=parse_count, default=17, help="frames of a clip, 1 + 4k (default: %(default)s)"
    )
    parser.add_argument(
        "--height", type=parse_count, default=256, help="pixels, a multiple of 64 (default: %(default)s)"
    )
    parser.add_argument(
        "--width", type=parse_count, default=256, help="pixels, a multiple of 64 (default: %(default)s)"
    )
    parser.add_argument(
        "--stride", type=parse_count, default=1, help="take every STRIDE-th frame of a file (default: %(default)s)"
    )
    parser.add_argument("--samples", type=parse_count, help="clips to measure, drawn by the seed; without it, all")
    parser.add_argument(
        "--batch-size", type=parse_count, default=1, help="clips encoded and decoded together (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="decides which files, and where in them clips start (default: %(default)s)"
    )
    parser.add_argument(
        "--lpips", nargs="+", default=[], metavar="WEIGHTS", help="files with LPIPS' trunk and heads; measures LPIPS"
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
