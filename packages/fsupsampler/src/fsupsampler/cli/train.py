"""`fsupsampler train`: which of the two is trained."""

from __future__ import annotations

import fsupsampler
from fsae.commandline import Command, run

COMMANDS = (
    Command("upsampler", "train the latent upsampler on a folder of videos", "fsupsampler.cli.upsampler:main"),
    Command("refiner", "train the refiner on a folder of captioned videos", "fsupsampler.cli.refiner:main"),
)


def main(argv: list[str]) -> int:
    """Run `fsupsampler train`; returns its exit code."""
    description = "Train a part of FSVideo's upsampling."
    return run("fsupsampler train", description, fsupsampler.__version__, COMMANDS, argv)
