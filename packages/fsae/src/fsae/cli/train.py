"""`fsae train`: one stage of the autoencoder's training."""

from __future__ import annotations

from fsae.commandline import read_settings


def main(argv: list[str]) -> int:
    """`fsae train`: every field of AutoencoderConfig is a flag and a key of the YAML file."""
    from fsae.stages.config import AutoencoderConfig

    config = read_settings("fsae train", "Train FSAE; the result is OUTPUT_DIR/autoencoder.", AutoencoderConfig, argv)

    from fsae.stages.task import train_autoencoder
    from fsae.training.runs import report_saved

    folder = train_autoencoder(config)
    return report_saved([] if folder is None else [folder])
