"""``fsae train``: one stage of the autoencoder's training."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """``fsae train``: every field of AutoencoderConfig is a flag and a key of the YAML file."""
    from jsonargparse import ArgumentParser

    from fsae.training.stages import AutoencoderConfig

    parser = ArgumentParser(prog="fsae train", description="Train FSAE; the result is OUTPUT_DIR/autoencoder.")
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_class_arguments(AutoencoderConfig, as_group=True)
    options = parser.instantiate(parser.parse_args(argv))
    settings = {key: value for key, value in vars(options).items() if key != "config"}
    config = AutoencoderConfig(**settings)

    from fsae.training.autoencoder import train_autoencoder

    folder = train_autoencoder(config)
    if folder is not None:
        print(f"saved {folder}")
    return 0
