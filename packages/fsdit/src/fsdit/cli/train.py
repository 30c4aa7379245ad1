"""``fsdit train``: flow matching, a stage of pre-training or fine-tuning."""

from __future__ import annotations

from fsae.commandline import INTERRUPTED, read_settings


def main(argv: list[str]) -> int:
    """``fsdit train``: every field of TransformerConfig is a flag and a key of the YAML file."""
    from fsdit.config import TransformerConfig

    description = "Train FSDiT; the result is OUTPUT_DIR/transformer, with the trained encoders beside it."
    config = read_settings("fsdit train", description, TransformerConfig, argv)

    from fsdit.training import train_transformer

    folders = train_transformer(config)
    for folder in folders:
        print(f"saved {folder}")
    return 0 if folders else INTERRUPTED
