"""The ``fsdit`` command line. Nothing here imports torch until a command has read its arguments."""

from __future__ import annotations

import fsdit
from fsae.commandline import INTERRUPTED, Command, read_settings, run

COMMANDS = (Command("train", "train the transformer on a folder of captioned videos or images", "fsdit.cli:train"),)


def main(argv: list[str] | None = None) -> int:
    """Run ``fsdit``; returns its exit code."""
    description = "FSDiT, the diffusion transformer of FSVideo."
    return run("fsdit", description, fsdit.__version__, COMMANDS, argv)


def train(argv: list[str]) -> int:
    """``fsdit train``: every field of TransformerConfig is a flag and a key of the YAML file."""
    from fsdit.config import TransformerConfig

    description = "Train FSDiT; the result is OUTPUT_DIR/transformer, with the trained encoders beside it."
    config = read_settings("fsdit train", description, TransformerConfig, argv)

    from fsdit.training import train_transformer

    folders = train_transformer(config)
    for folder in folders:
        print(f"saved {folder}")
    return 0 if folders else INTERRUPTED
