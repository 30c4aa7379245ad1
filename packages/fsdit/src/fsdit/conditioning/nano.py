"""Encoders small enough to be trained from random weights together with a nano transformer."""

from __future__ import annotations

from typing import Any

from fsdit.presets import IMAGE_ENCODERS, TEXT_ENCODERS


def nano_tokenizer() -> Any:
    """ByT5's tokenizer: one token a byte, no vocabulary file."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


def new_text_encoder(preset: str = "nano", **overrides: Any) -> Any:
    """A UMT5 encoder over bytes, randomly initialised, of a size in `TEXT_ENCODERS`."""
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {**TEXT_ENCODERS[preset], **overrides}
    return UMT5EncoderModel(UMT5Config(vocab_size=len(nano_tokenizer()), feed_forward_proj="gated-gelu", **sizes))


def new_image_encoder(preset: str = "nano") -> Any:
    """A CLIP vision tower, randomly initialised, of a size in `IMAGE_ENCODERS`."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**IMAGE_ENCODERS[preset]))
