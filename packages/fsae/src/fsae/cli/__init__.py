"""The `fsae` command line, a file a command. Nothing here imports torch until a command has read its arguments."""

from __future__ import annotations

import fsae
from fsae.commandline import Command, run

COMMANDS = (
    Command("train", "train an autoencoder on a folder of videos and images", "fsae.cli.train:main"),
    Command("encode", "turn a video or an image into latents", "fsae.cli.encode:main"),
    Command("decode", "turn latents back into a video or an image", "fsae.cli.decode:main"),
    Command("eval", "measure an autoencoder on held-out clips", "fsae.cli.eval:main"),
    Command("export", "turn a checkpoint of any training into a model's folder", "fsae.cli.export:main"),
    Command("convert", "turn a DC-AE into an FSAE, or an FSAE's decoder into another kind", "fsae.cli.convert:main"),
)


def main(argv: list[str] | None = None) -> int:
    """Run `fsae`; returns its exit code."""
    return run("fsae", "FSAE, the video autoencoder of FSVideo.", fsae.__version__, COMMANDS, argv)
