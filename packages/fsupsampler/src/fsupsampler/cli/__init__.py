"""The `fsupsampler` command line, a file a command. Nothing here imports torch until a command has its arguments."""

from __future__ import annotations

import fsupsampler
from fsae.commandline import Command, run

COMMANDS = (Command("train", "train the latent upsampler or the refiner", "fsupsampler.cli.train:main"),)


def main(argv: list[str] | None = None) -> int:
    """Run `fsupsampler`; returns its exit code."""
    description = "The latent upsampler and the refiner of FSVideo."
    return run("fsupsampler", description, fsupsampler.__version__, COMMANDS, argv)
