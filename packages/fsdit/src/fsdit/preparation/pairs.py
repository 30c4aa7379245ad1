"""Pairs for the second stage: a clip's latents and those of its half-size copy (paper §2.4.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fsae import FSAE
from fsae.errors import UserError


def halve(video: Tensor) -> Tensor:
    """`... H W` -> `... H/2 W/2`, bicubic with antialiasing, clamped to [-1, 1]."""
    height, width = video.shape[-2:]
    frames = video.reshape(-1, 1, height, width)
    small = F.interpolate(frames, size=(height // 2, width // 2), mode="bicubic", antialias=True)
    return small.clamp(-1, 1).view(*video.shape[:-2], height // 2, width // 2)


@torch.no_grad()
def encode_pair(autoencoder: FSAE, video: Tensor, memory: int | None = None) -> tuple[Tensor, Tensor]:
    """Video `B 3 T H W` -> latents of its half-size copy, `B C t h w`, and its own, `B C t 2h 2w`."""
    low, high = (autoencoder.encode(clip, memory=memory).float() for clip in (halve(video), video))
    return low, high


def check_pair_size(autoencoder: FSAE, height: int, width: int) -> None:
    """UserError unless the autoencoder takes clips of this size and of half of it."""
    step = 2 * autoencoder.spatial_compression
    if height % step or width % step:
        raise UserError(
            f"clips of {width}x{height} pixels given; width and height must be multiples of {step}, so that half of "
            "them still suits the autoencoder"
        )
