"""Rotary positions over time, height and width (Wan2.1): each head's channel pairs are shared out to the three axes.

A head of 128 channels has 64 adjacent pairs: 22 turn with the frame, 21 with the row, 21 with the column. The angles
are computed in float64 and only their cosines and sines are rounded. The tables are no buffers of the model: casting
the model to bfloat16 must not touch them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fsdit.layers.modulation import at_least_float32


class Rotary(NamedTuple):
    """Positions of tokens: float32 `n 1 P` with P = head_dim / 2 channel pairs.

    `length` is N, the tokens of the whole sequence; n are those at hand, fewer where processes share a sequence.
    """

    cosine: Tensor
    sine: Tensor
    length: int


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """How many channel pairs turn with (time, height, width): a third each, the remainder goes to time."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


@lru_cache(maxsize=16)
def rotary_tables(grid: tuple[int, int, int], head_dim: int, theta: float, device: torch.device) -> Rotary:
    """Tables for the tokens of a (t, h, w) grid in row-major order.

    The last few grids are kept. They are built outside inference mode, so that a table first needed while sampling can
    still serve in training; and on the CPU, as not every device has float64.
    """
    with torch.inference_mode(False), torch.no_grad():
        angles = []
        for axis, (length, pairs) in enumerate(zip(grid, axis_pairs(head_dim), strict=True)):
            steps = torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs
            positions = torch.arange(length, dtype=torch.float64, device="cpu")
            shape = [1, 1, 1, pairs]
            shape[axis] = length
            angles.append(torch.outer(positions, theta**-steps).view(shape).expand(*grid, pairs))
        angle = torch.cat(angles, dim=-1).flatten(0, 2).unsqueeze(1)
        return Rotary(angle.cos().float().to(device), angle.sin().float().to(device), len(angle))


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn each adjacent channel pair of x `B n heads head_dim` by its token's angle; the dtype of `x` is kept.

    One complex product is far faster than its four real ones where each would be a pass of its own; a compiler fuses
    the real ones and knows no complex numbers.
    """
    cosine, sine, _ = rotary
    pairs = at_least_float32(x).unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cosine, sine))
    else:
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
    return turned.flatten(-2).type_as(x)
