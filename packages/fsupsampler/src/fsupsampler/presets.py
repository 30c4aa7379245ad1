"""Named upsampler configurations. Sizes differ by these numbers alone; the code is one."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Sixteen blocks behind the pixel shuffle (paper §2.4.1): 235,392,128 parameters.
    "paper": {"latent_channels": 128, "mid_channels": 512, "num_blocks": 16},
    # For a CPU: 997,184 parameters.
    "nano": {"latent_channels": 128, "mid_channels": 32, "num_blocks": 8, "norm_groups": 8},
    # For tests: seconds on a laptop.
    "tiny": {"latent_channels": 8, "mid_channels": 8, "num_blocks": 1, "norm_groups": 4},
}
