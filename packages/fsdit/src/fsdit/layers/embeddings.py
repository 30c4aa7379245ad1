"""What enters the transformer besides the latents: time, text and image (Wan2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fsdit.layers.modulation import WideLayerNorm


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """[cos, sin] of timestep `B` at dim / 2 frequencies 10000^(-i / (dim/2)), in float64: `B dim`."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = torch.outer(timestep.double(), 10000.0**-exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimeEmbedding(nn.Sequential):
    """Sinusoid of the timestep (1000·sigma, a float), then an MLP with SiLU."""

    def __init__(self, freq_dim: int, dim: int) -> None:
        super().__init__(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.freq_dim = freq_dim

    def forward(self, timestep: Tensor) -> Tensor:
        """timestep `B` -> `B D` in the dtype of the weights."""
        embedding = sinusoidal_embedding(timestep, self.freq_dim)
        return super().forward(embedding.to(next(self.parameters()).dtype))


class TextEmbedding(nn.Sequential):
    """Text features to the model's width by an MLP with GELU (tanh form): `B L text_dim` -> `B L D`."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))


class ImageEmbedding(nn.Sequential):
    """Image features to the model's width by an MLP between two layer norms: `B M image_dim` -> `B M D`."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__(
            WideLayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            WideLayerNorm(dim),
        )
