"""What the autoencoder's cheap paths are worth, measured on the machine at hand.

    python tools/bench/autoencoder.py folding --output build/bench/folding.json
    python tools/bench/autoencoder.py streaming --output build/bench/streaming.json

`folding` times the decoder with its convolutions folded and plain, one after the other in turns, so that a busy machine
slows both. `streaming` decodes clips of several lengths latent by latent, each in a process of its own, and compares
the processes' highest resident memory. Models are of random weights: neither time nor memory depends on them.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fsae import FSAE
from fsae.layers.conv import VideoConv3d
from fsae.layers.resample import Upsample
from fsae.storage.files import atomic_path

WIDTHS = (32, 64, 128, 128, 256, 256, 256)


def build(kind: str, widths: list[int]) -> FSAE:
    """A decoder of three blocks a stage, the Lite one's outer stages half as wide, as in the paper."""
    torch.manual_seed(0)
    narrow = [widths[0] // 2, widths[1] // 2, *widths[2:]] if kind == "lite" else None
    return FSAE(widths, (1,) * 7, (3,) * 7, narrow, latent_channels=64, decoder_kind=kind, injection_head_dim=32).eval()


def set_folded(model: FSAE, folded: bool) -> None:
    """Every convolution of the decoder as it runs by default, or as it runs in training."""
    for module in model.decoder.modules():
        if isinstance(module, Upsample):
            module.folded = None if folded else False
        if isinstance(module, VideoConv3d):
            module.training = not folded


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}


@torch.no_grad()
def measure_folding(kind: str, widths: list[int], size: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """Median seconds of `rounds` decodes each way, taken in turns, and how far the two videos are apart."""
    model = build(kind, widths)
    latents = torch.randn(1, *model.latent_shape(*size))
    first = model.first_frame_features(torch.randn(1, 3, 1, *size[1:]))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    videos: dict[bool, torch.Tensor] = {}
    for number in range(rounds + 1):
        for folded in (True, False):
            set_folded(model, folded)
            start = time.perf_counter()
            videos[folded] = model.decode(latents, first)
            if number:  # the first round warms up
                seconds[folded].append(time.perf_counter() - start)
    fast, slow = statistics.median(seconds[True]), statistics.median(seconds[False])
    return {
        "decoder": kind,
        "size": "x".join(map(str, size)),
        "folded_seconds": fast,
        "plain_seconds": slow,
        "saved_percent": 100 * (1 - fast / slow),
        "largest_difference": float((videos[True] - videos[False]).abs().max()),
    }


@torch.no_grad()
def decode_once(kind: str, widths: list[int], size: tuple[int, int, int]) -> dict[str, Any]:
    """Decode a stream, letting go of each piece, and say what this process took at most."""
    model = build(kind, widths)
    latents = torch.randn(1, *model.latent_shape(*size))
    first = model.first_frame_features(torch.randn(1, 3, 1, *size[1:]))
    start, frames = time.perf_counter(), 0
    for piece in model.decode_stream(latents, first):
        frames += piece.shape[2]
        del piece
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"frames": frames, "seconds": time.perf_counter() - start, "peak_bytes": peak}


def measure_streaming(kind: str, widths: list[int], lengths: list[int], side: int, rounds: int) -> list[dict[str, Any]]:
    """The median peak of `rounds` processes for each length, taken in turns, and its ratio to the shortest's."""
    found: dict[int, list[dict[str, Any]]] = {length: [] for length in lengths}
    for _ in range(rounds):
        for length in lengths:
            command = [sys.executable, __file__, "once", "--decoder", kind, "--size", str(length), str(side), str(side)]
            done = subprocess.run(
                [*command, "--widths", *map(str, widths)], check=True, stdout=subprocess.PIPE, text=True
            )
            found[length].append(json.loads(done.stdout))
    rows = []
    for length in lengths:
        peak = statistics.median(row["peak_bytes"] for row in found[length])
        seconds = statistics.median(row["seconds"] for row in found[length])
        rows.append({"decoder": kind, "size": f"{length}x{side}x{side}", "peak_mib": peak / 2**20, "seconds": seconds})
    for row in rows:
        row["times_the_first"] = row["peak_mib"] / rows[0]["peak_mib"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys, aligned."""
    cells = [list(rows[0])] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    wide = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, wide, strict=True)) for line in cells)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    folding = commands.add_parser("folding", help="time of folded against plain convolutions")
    folding.add_argument("--decoders", nargs="+", default=["standard", "lite"], choices=["standard", "lite", "causal"])
    folding.add_argument("--size", nargs=3, type=int, default=[17, 128, 128], metavar=("FRAMES", "HEIGHT", "WIDTH"))
    streaming = commands.add_parser("streaming", help="peak memory of streams of several lengths")
    streaming.add_argument("--decoders", nargs="+", default=["lite"], choices=["lite", "causal"])
    streaming.add_argument("--frames", nargs="+", type=int, default=[33, 121])
    streaming.add_argument("--side", type=int, default=128, help="height and width in pixels")
    once = commands.add_parser("once", help="one stream, for `streaming`: its figures as JSON")
    once.add_argument("--decoder", required=True, choices=["lite", "causal"])
    once.add_argument("--size", nargs=3, type=int, required=True, metavar=("FRAMES", "HEIGHT", "WIDTH"))
    for command in (folding, streaming, once):
        command.add_argument("--widths", nargs=7, type=int, default=list(WIDTHS), help="channels, fine to coarse")
    for command in (folding, streaming):
        command.add_argument("--rounds", type=int, default=5)
        command.add_argument("--output", type=Path, required=True, help="where the figures go, as JSON")
    given = parser.parse_args(argv)
    if given.command != "once" and given.rounds < 1:
        parser.error(f"--rounds is {given.rounds}; give at least 1")
    return given


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and write the figures."""
    given = parse(argv)
    if given.command == "once":
        print(json.dumps(decode_once(given.decoder, given.widths, tuple(given.size))))
        return 0
    rows: list[dict[str, Any]] = []
    for kind in given.decoders:
        if given.command == "folding":
            rows.append(measure_folding(kind, given.widths, tuple(given.size), given.rounds))
        else:
            rows += measure_streaming(kind, given.widths, given.frames, given.side, given.rounds)
    print(table(rows))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    figures = {"command": given.command, "widths": given.widths, "rounds": given.rounds, **machine(), "rows": rows}
    with atomic_path(given.output) as path:
        path.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"figures: {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
