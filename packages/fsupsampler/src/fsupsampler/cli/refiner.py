"""`fsupsampler train refiner`: the refiner on captioned videos."""

from __future__ import annotations

from fsae.commandline import read_settings


def main(argv: list[str]) -> int:
    """`fsupsampler train refiner`: every field of RefinerConfig is a flag and a key of the YAML file."""
    from fsupsampler.training.config import RefinerConfig

    description = "Train the refiner; the result is OUTPUT_DIR/refiner and OUTPUT_DIR/dynamic_mask."
    # The encoders are the base model's and never trained, which leaves that option nothing to say.
    config = read_settings("fsupsampler train refiner", description, RefinerConfig, argv, without=["train_encoders"])

    from fsae.training.runs import report_saved
    from fsupsampler.training.refiner import train_refiner

    return report_saved(train_refiner(config))
