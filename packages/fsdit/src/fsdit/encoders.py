"""The name by which the strict loaders were first published; they live in `fsdit.conditioning.pretrained`."""

from __future__ import annotations

from fsdit.conditioning.pretrained import load_encoder, load_tokenizer

__all__ = ["load_encoder", "load_tokenizer"]
