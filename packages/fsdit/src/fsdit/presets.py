"""Named FSDiT configurations. Sizes differ by these numbers alone; the code is one."""

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
}
