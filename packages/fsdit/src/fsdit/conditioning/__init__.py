"""What steers the transformer: prompt, image and known latents (paper §2.3.1; Wan2.1's encoders)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fsae.exports import lazy_exports

if TYPE_CHECKING:
    from fsdit.conditioning.encoders import Encoders, ImageEncoder, TextEncoder
    from fsdit.conditioning.folders import load_encoders, load_image_encoder, load_text_encoder
    from fsdit.conditioning.inputs import Condition, Context, FlowBatch, first_frame_condition, model_input
    from fsdit.conditioning.nano import nano_tokenizer

__all__ = [
    "Condition",
    "Context",
    "Encoders",
    "FlowBatch",
    "ImageEncoder",
    "TextEncoder",
    "first_frame_condition",
    "load_encoders",
    "load_image_encoder",
    "load_text_encoder",
    "model_input",
    "nano_tokenizer",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    encoders="Encoders ImageEncoder TextEncoder",
    folders="load_encoders load_image_encoder load_text_encoder",
    inputs="Condition Context FlowBatch first_frame_condition model_input",
    nano="nano_tokenizer",
)
