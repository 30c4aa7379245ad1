"""The ``fsdit`` command line. Nothing here imports torch until a command has read its arguments."""

from __future__ import annotations

import fsdit
from fsae.commandline import Command, run

COMMANDS = (Command("train", "train the transformer on a folder of captioned videos or images", "fsdit.cli:train"),)


def main(argv: list[str] | None = None) -> int:
    """Run ``fsdit``; returns its exit code."""
    description = "FSDiT, the diffusion transformer of FSVideo."
    return run("fsdit", description, fsdit.__version__, COMMANDS, argv)


def train(argv: list[str]) -> int:
    """``fsdit train``: every field of TransformerConfig is a flag and a key of the YAML file."""
    from jsonargparse import ArgumentParser

    from fsdit.config import TransformerConfig

    parser = ArgumentParser(
        prog="fsdit train",
        description="Train FSDiT; the result is OUTPUT_DIR/transformer, with the trained encoders beside it.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_class_arguments(TransformerConfig, as_group=True)
    options = parser.instantiate_classes(parser.parse_args(argv))
    settings = {key: value for key, value in vars(options).items() if key != "config"}
    config = TransformerConfig(**settings)

    from fsdit.training import train_transformer

    for folder in train_transformer(config):
        print(f"saved {folder}")
    return 0
