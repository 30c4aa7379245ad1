"""Textures without a photograph: dead leaves (occluding discs with a power law of sizes) and 1/f noise.

Both have the statistics that matter to an autoencoder, edges at every scale and the spectrum of natural
images. All randomness is drawn on the CPU, so all devices make the same picture.
"""

from __future__ import annotations

import math
from functools import cache

import torch

TEXTURE_SIDE = 512


def noise(size: tuple[int, int], generator: torch.Generator, device: str | torch.device = "cpu") -> torch.Tensor:
    """(3, H, W) in [0, 1]: noise with a 1/f^a amplitude spectrum (a in 0.8..1.6) and correlated colours."""
    height, width = size
    white = torch.randn(3, height, width, generator=generator).to(device)
    exponent = 0.8 + 0.8 * float(torch.rand((), generator=generator))
    frequency = torch.hypot(
        torch.fft.fftfreq(height, device=device)[:, None], torch.fft.rfftfreq(width, device=device)[None]
    )
    frequency[0, 0] = 1.0
    shaped = torch.fft.irfft2(torch.fft.rfft2(white) * frequency ** (-exponent), s=size)
    shaped = shaped - shaped.mean((1, 2), keepdim=True)
    shaped = shaped / shaped.std((1, 2), keepdim=True).clamp_min(1e-6)
    mixing = 0.25 * torch.randn(3, 3, generator=generator) + torch.rand(3, 1, generator=generator).expand(3, 3) * 0.4
    mixed = torch.einsum("ij,jhw->ihw", 0.35 * mixing.to(device), shaped)
    mean = 0.25 + 0.5 * torch.rand(3, 1, 1, generator=generator).to(device)
    return (mean + mixed).clamp(0, 1)


def dead_leaves(
    size: tuple[int, int], generator: torch.Generator, device: str | torch.device = "cpu", leaves: int = 180
) -> torch.Tensor:
    """(3, H, W) in [0, 1]: `leaves` shaded discs over a noise ground, later over earlier, radii r as r^-3."""
    height, width = size
    picture = noise(size, generator, device)
    largest, smallest = 0.35 * min(size), max(2.0, 0.012 * min(size))
    u = torch.rand(leaves, generator=generator)
    radii = smallest / torch.sqrt(1 - u * (1 - (smallest / largest) ** 2))
    centres = torch.rand(leaves, 2, generator=generator) * torch.tensor([height, width])
    palette = torch.rand(8, 3, generator=generator)
    colours = palette[torch.randint(8, (leaves,), generator=generator)]
    colours = (colours + 0.12 * torch.randn(leaves, 3, generator=generator)).clamp(0, 1)
    shading = 0.25 * torch.randn(leaves, 2, generator=generator)
    rows = torch.arange(height, device=device, dtype=torch.float32)
    columns = torch.arange(width, device=device, dtype=torch.float32)
    colours_there = colours.to(device)
    for leaf, (radius, (cy, cx), (gy, gx)) in enumerate(
        zip(radii.tolist(), centres.tolist(), shading.tolist(), strict=True)
    ):
        top, bottom = max(0, math.floor(cy - radius - 1)), min(height, math.ceil(cy + radius + 1))
        left, right = max(0, math.floor(cx - radius - 1)), min(width, math.ceil(cx + radius + 1))
        dy, dx = rows[top:bottom, None] - cy, columns[None, left:right] - cx
        cover = (radius + 0.5 - torch.sqrt(dy * dy + dx * dx)).clamp(0, 1)
        patch = picture[:, top:bottom, left:right]
        light = 1 + (gy * dy + gx * dx) / radius
        patch.lerp_((colours_there[leaf, :, None, None] * light).clamp(0, 1), cover)
    return picture


def texture(size: tuple[int, int], generator: torch.Generator, device: str | torch.device = "cpu") -> torch.Tensor:
    """(3, H, W) in [0, 1]: dead leaves three times in four, else noise."""
    if float(torch.rand((), generator=generator)) < 0.75:
        return dead_leaves(size, generator, device)
    return noise(size, generator, device)


@cache
def kept_texture(seed: int, device: str | torch.device = "cpu") -> torch.Tensor:
    """Texture number `seed`, uint8 (3, 512, 512) as a photograph is; made once, as it costs more than a whole clip."""
    made = texture((TEXTURE_SIDE, TEXTURE_SIDE), torch.Generator().manual_seed(seed), device)
    return (255 * made).round_().to(torch.uint8)
