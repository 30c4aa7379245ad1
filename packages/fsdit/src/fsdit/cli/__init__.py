"""The `fsdit` command line, a file a command. Nothing here imports torch until a command has read its arguments."""

from __future__ import annotations

import fsdit
from fsae.commandline import Command, run

COMMANDS = (
    Command("cache", "encode clips and captions once, for trainings that read what comes out", "fsdit.cli.cache:main"),
    Command("caption", "write captions of videos and images with a vision-language model", "fsdit.cli.caption:main"),
    Command("convert", "turn Wan2.1-I2V's weights into an FSDiT with Layer Memory", "fsdit.cli.convert:main"),
    Command("train", "train the transformer on captioned videos or images", "fsdit.cli.train:main"),
    Command("router-map", "draw what the routers of Layer Memory choose", "fsdit.cli.router_map:main"),
)


def main(argv: list[str] | None = None) -> int:
    """Run `fsdit`; returns its exit code."""
    return run("fsdit", "FSDiT, the diffusion transformer of FSVideo.", fsdit.__version__, COMMANDS, argv)
