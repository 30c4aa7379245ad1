"""The ``fsdit`` command line, a file a command. Nothing here imports torch until a command has read its arguments."""

from __future__ import annotations

import fsdit
from fsae.commandline import Command, run

COMMANDS = (Command("train", "train the transformer on captioned videos or images", "fsdit.cli.train:main"),)


def main(argv: list[str] | None = None) -> int:
    """Run ``fsdit``; returns its exit code."""
    return run("fsdit", "FSDiT, the diffusion transformer of FSVideo.", fsdit.__version__, COMMANDS, argv)
