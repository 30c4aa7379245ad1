"""The sizes of FSAE. They differ by their configuration alone: the same classes, from 1,008 million parameters to 8."""

from __future__ import annotations

from typing import Any

STANDARD: dict[str, Any] = {
    "widths": (128, 256, 512, 512, 1024, 1024, 2048),
    "encoder_depths": (2, 2, 2, 3, 3, 3, 3),
    "decoder_depths": (3, 3, 3, 3, 3, 3, 3),
    "latent_channels": 128,
    "residual_stages": 3,
    "temporal_stages": 2,
    "decoder_kind": "standard",
    "first_frame_injection": True,
    "noise": 0.05,
}

LITE: dict[str, Any] = STANDARD | {
    "decoder_kind": "lite",
    # Memory peaks in the up-convolution of stage 0, in and out at full resolution: half the channels, half the memory.
    "decoder_widths": (64, 128, 512, 512, 1024, 1024, 2048),
}

NANO: dict[str, Any] = {
    "widths": (16, 32, 64, 128, 128, 128, 128),
    "encoder_depths": (1, 1, 1, 1, 1, 1, 1),
    "decoder_depths": (1, 1, 2, 1, 1, 1, 1),
    "latent_channels": 128,
    "residual_stages": 3,
    "temporal_stages": 2,
    "decoder_kind": "standard",
    "first_frame_injection": True,
    "injection_head_dim": 32,
    # A small model cannot find by attention what moved where, nor invent the motion between latents: it is given both,
    # and its encoder the comparison of frames that shows motion.
    "injection_sampling": True,
    "frame_matching": True,
    # Trained from scratch, it need not keep DC-AE's order of channels, which shows as scan-lines.
    "shortcut": "even",
    # Sixteen channels have no room for noise that a large decoder turns into texture.
    "noise": 0.0,
}

# For tests: seconds on a laptop.
TINY: dict[str, Any] = NANO | {
    "widths": (8,) * 7,
    "latent_channels": 8,
    "injection_head_dim": 8,
    "attention_head_dim": 8,
}

PRESETS: dict[str, dict[str, Any]] = {"standard": STANDARD, "lite": LITE, "nano": NANO, "tiny": TINY}
