"""The ``fsupsampler`` command line. Nothing here imports torch until a command has read its arguments."""

from __future__ import annotations

import fsupsampler
from fsae.commandline import Command, read_settings, run

COMMANDS = (Command("train", "train the latent upsampler or the refiner", "fsupsampler.cli:train"),)
TRAIN_COMMANDS = (
    Command("upsampler", "train the latent upsampler on a folder of videos", "fsupsampler.cli:train_upsampler"),
    Command("refiner", "train the refiner on a folder of captioned videos", "fsupsampler.cli:train_refiner"),
)


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
    from fsupsampler.training.config import UpsamplerConfig

    description = "Train LatentUpsampler; the result is OUTPUT_DIR/upsampler."
    config = read_settings("fsupsampler train upsampler", description, UpsamplerConfig, argv)

    from fsae.training.runs import tell_saved
    from fsupsampler.training.task import train_upsampler as run_training

    return tell_saved(run_training(config))


def train_refiner(argv: list[str]) -> int:
    """``fsupsampler train refiner``: each field of RefinerConfig is a flag and a key of the YAML file."""
    from fsupsampler.training.config import RefinerConfig

    description = "Train the refiner; the result is OUTPUT_DIR/refiner and OUTPUT_DIR/dynamic_mask."
    # The encoders are the base model's and never trained, which leaves that option nothing to say.
    config = read_settings("fsupsampler train refiner", description, RefinerConfig, argv, without=["train_encoders"])

    from fsae.training.runs import tell_saved
    from fsupsampler.training.task import train_refiner as run_training

    return tell_saved(run_training(config))
