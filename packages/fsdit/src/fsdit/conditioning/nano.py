"""Encoders small enough to be trained from random weights together with a nano transformer."""

from __future__ import annotations

from typing import Any


def nano_tokenizer() -> Any:
    """ByT5's tokenizer: one token a byte, no vocabulary file."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


def nano_text_encoder() -> Any:
    """A UMT5 encoder of 0.4 M parameters over bytes, randomly initialised; width 128, trained with the transformer."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(nano_tokenizer()),
            d_model=128,
            d_kv=32,
            num_heads=4,
            num_layers=2,
            d_ff=256,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def nano_image_encoder() -> Any:
    """A CLIP vision tower of 0.7 M parameters, randomly initialised: 64x64 pixels to 17 tokens of width 128."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=64,
            patch_size=16,
        )
    )
