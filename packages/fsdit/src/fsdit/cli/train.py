"""`fsdit train`: flow matching, a stage of pre-training or fine-tuning."""

from __future__ import annotations

from fsae.commandline import read_settings


def main(argv: list[str]) -> int:
    """`fsdit train`: every field of TransformerConfig is a flag and a key of the YAML file."""
    from fsdit.training.config import TransformerConfig

    description = "Train FSDiT; the result is OUTPUT_DIR/transformer, with the trained encoders beside it."
    config = read_settings("fsdit train", description, TransformerConfig, argv)

    from fsae.training.runs import report_saved
    from fsdit.training.run import train_transformer

    return report_saved(train_transformer(config))
