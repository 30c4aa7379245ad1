"""The ``fsupsampler`` command line. Nothing here imports torch until a command has read its arguments."""

from __future__ import annotations

from typing import TypeVar

import fsupsampler
from fsae.commandline import Command, run

COMMANDS = (Command("train", "train the latent upsampler or the refiner", "fsupsampler.cli:train"),)
TRAIN_COMMANDS = (
    Command("upsampler", "train the latent upsampler on a folder of videos", "fsupsampler.cli:train_upsampler"),
    Command("refiner", "train the refiner on a folder of captioned videos", "fsupsampler.cli:train_refiner"),
)

Config = TypeVar("Config")


def main(argv: list[str] | None = None) -> int:
    """Run ``fsupsampler``; returns its exit code."""
    description = "The latent upsampler and the refiner of FSVideo."
    return run("fsupsampler", description, fsupsampler.__version__, COMMANDS, argv)


def train(argv: list[str]) -> int:
    """``fsupsampler train``: choose what."""
    description = "Train a part of FSVideo's upsampling."
    return run("fsupsampler train", description, fsupsampler.__version__, TRAIN_COMMANDS, argv)


def train_upsampler(argv: list[str]) -> int:
    """``fsupsampler train upsampler``: each field of UpsamplerConfig is a flag and a key of the YAML file."""
    from fsupsampler.config import UpsamplerConfig

    config = _parse(argv, "upsampler", "Train LatentUpsampler; the result is OUTPUT_DIR/upsampler.", UpsamplerConfig)

    from fsupsampler.training import train_upsampler as run_training

    for folder in run_training(config):
        print(f"saved {folder}")
    return 0


def train_refiner(argv: list[str]) -> int:
    """``fsupsampler train refiner``: each field of RefinerConfig is a flag and a key of the YAML file."""
    from fsupsampler.config import RefinerConfig

    description = "Train the refiner; the result is OUTPUT_DIR/refiner and OUTPUT_DIR/dynamic_mask."
    config = _parse(argv, "refiner", description, RefinerConfig)

    from fsupsampler.training import train_refiner as run_training

    for folder in run_training(config):
        print(f"saved {folder}")
    return 0


def _parse(argv: list[str], command: str, description: str, config: type[Config]) -> Config:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"fsupsampler train {command}", description=description)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    # The refiner's encoders are the base model's and never trained, which leaves that option nothing to say.
    parser.add_class_arguments(config, as_group=True, skip={"train_encoders"})
    options = parser.instantiate(parser.parse_args(argv))
    return config(**{key: value for key, value in vars(options).items() if key != "config"})
