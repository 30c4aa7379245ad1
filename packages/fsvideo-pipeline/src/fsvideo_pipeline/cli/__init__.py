"""The command `fsvideo`, a file a command. Nothing here imports torch until a command has checked what it was asked."""

from __future__ import annotations

from collections.abc import Sequence

from fsae.commandline import Command, run
from fsvideo_pipeline import __version__

COMMANDS = (Command("generate", "make a video from a photo and a prompt", "fsvideo_pipeline.cli.generate:main"),)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fsvideo`; the exit code is 0, or 2 after one sentence about what was wrong with the request."""
    return run("fsvideo", "FSVideo: a photo and a prompt become a video.", __version__, COMMANDS, argv)
