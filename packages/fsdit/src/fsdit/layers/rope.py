"""Rotary positions over time, height and width (Wan2.1): each head's channel pairs are shared out to the three axes.

A head of 128 channels has 64 adjacent pairs: 22 turn with the frame, 21 with the row, 21 with the column. The angles
are computed in float64 and only their cosines and sines are rounded. The tables are no buffers of the model: casting
the model to bfloat16 must not touch them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, float32, each ``N 1 P`` with P = head_dim / 2 channel pairs."""


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """How many channel pairs turn with (time, height, width): a third each, the remainder goes to time."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


@lru_cache(maxsize=16)
def rotary_tables(grid: tuple[int, int, int], head_dim: int, theta: float, device: torch.device) -> Rotary:
    """Cosine and sine tables for the tokens of a (t, h, w) grid in row-major order.

    The last few grids are kept. They are built outside inference mode, so that a table first needed while sampling can
    still serve in training.
    """
    with torch.inference_mode(False), torch.no_grad():
        angles = []
        for axis, (length, pairs) in enumerate(zip(grid, axis_pairs(head_dim), strict=True)):
            steps = torch.arange(pairs, dtype=torch.float64, device=device) / pairs
            positions = torch.arange(length, dtype=torch.float64, device=device)
            shape = [1, 1, 1, pairs]
            shape[axis] = length
            angles.append(torch.outer(positions, theta**-steps).view(shape).expand(*grid, pairs))
        angle = torch.cat(angles, dim=-1).flatten(0, 2).unsqueeze(1)
        return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn each adjacent channel pair of x ``B N heads head_dim`` by its token's angle; the dtype of ``x`` is kept."""
    cosine, sine = rotary
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.flatten(-2).type_as(x)
