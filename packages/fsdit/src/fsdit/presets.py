"""Named configurations of FSDiT and of encoders new to it. Sizes differ by these numbers alone; the code is one."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Wan2.1-I2V-14B's transformer with 128-channel latents, unit patches and Layer Memory (paper §2.3.1).
    "14b": {
        "dim": 5120,
        "ffn_dim": 13824,
        "num_heads": 40,
        "num_layers": 40,
        "text_dim": 4096,
        "text_len": 512,
        "image_dim": 1280,
    },
    # A model that trains and samples on a CPU: 4.49 M parameters.
    "nano": {
        "dim": 192,
        "ffn_dim": 512,
        "num_heads": 6,
        "num_layers": 7,
        "text_dim": 128,
        "text_len": 128,
        "image_dim": 128,
    },
    # For tests: seconds on a laptop.
    "tiny": {
        "dim": 64,
        "ffn_dim": 128,
        "num_heads": 2,
        "num_layers": 3,
        "freq_dim": 64,
        "text_dim": 32,
        "text_len": 16,
        "image_dim": 16,
        "latent_channels": 8,
    },
}

# UMT5 over bytes; nano: 0.4 M parameters.
TEXT_ENCODERS: dict[str, dict[str, Any]] = {
    "nano": {"d_model": 128, "d_kv": 32, "num_heads": 4, "num_layers": 2, "d_ff": 256, "dropout_rate": 0.0},
    "tiny": {"d_model": 32, "d_kv": 16, "num_heads": 2, "num_layers": 1, "d_ff": 32, "dropout_rate": 0.0},
}

# CLIP vision towers; nano: 0.7 M parameters, 64 x 64 pixels to 17 tokens.
IMAGE_ENCODERS: dict[str, dict[str, Any]] = {
    "nano": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 16,
    },
    "tiny": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    },
}
