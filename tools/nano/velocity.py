"""What the known camera says of a clip: the velocity of every place, as latents and the decoder state it.

A latent j stands for frames 4j-3 ... 4j. Its velocity at a place of frame 4j leads to where the same content stood in
frame 4j-4, in pixels, row before column. The clip's first frame has none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fsae.layers.motion import VELOCITY_UNIT

CODE_CHANNELS = 8
"""The first channels of a nano latent say how its cell moves: 2 x 2 places x (row, column), in units of 8 pixels."""


def between(path: Tensor, later: Tensor, earlier: Tensor) -> Tensor:
    """The maps `B N 2 3` of frames `later` to frames `earlier`, of a camera path `B T 2 3` to frame 0."""
    bottom = torch.tensor([0.0, 0.0, 1.0], device=path.device).expand(*path.shape[:2], 1, 3)
    whole = torch.cat([path, bottom], dim=2)
    return torch.linalg.solve(whole[:, earlier], whole[:, later])[:, :, :2]


def displacement(maps: Tensor, height: int, width: int, rows: int, columns: int) -> Tensor:
    """Where maps `B N 2 3` of centred pixels lead the middles of `rows` x `columns` parts of a frame of that size.

    Returns:
        `B 2 N rows columns`, pixels, the row's first.
    """
    y = centres(rows, height).to(maps).view(-1, 1)
    x = centres(columns, width).to(maps).view(1, -1)
    m = maps[..., None, None]
    across = m[:, :, 0, 0] * x + m[:, :, 0, 1] * y + m[:, :, 0, 2] - x
    down = m[:, :, 1, 0] * x + m[:, :, 1, 1] * y + m[:, :, 1, 2] - y
    return torch.stack([down, across], dim=1)


def centres(count: int, size: int) -> Tensor:
    """The middles of `count` equal parts of `size` pixels, from the frame's middle."""
    return (torch.arange(count) + 0.5) * (size / count) - size / 2


def velocity(path: Tensor, size: tuple[int, int], grid: tuple[int, int], step: int = 4) -> Tensor:
    """The velocity every `step` frames, scaled to pixels a latent: `B 2 1+(T-1)/step rows columns`, 0 at first.

    Args:
        path: `B T 2 3`.
        size: (H, W) of the frame.
        grid: rows and columns.
        step: frames between two instants; 4 for latents.
    """
    still = path.new_zeros(len(path), 2, 1, *grid)
    if path.shape[1] == 1:
        return still
    later = torch.arange(step, path.shape[1], step, device=path.device)
    return torch.cat([still, displacement(between(path, later, later - step), *size, *grid) * (4 / step)], dim=2)


def motion_code(path: Tensor, size: tuple[int, int]) -> Tensor:
    """The known camera as the latents' motion channels, `B 8 t h w`."""
    h, w = size[0] // 64, size[1] // 64
    field = velocity(path, size, (2 * h, 2 * w)) / VELOCITY_UNIT
    field = field.unflatten(4, (w, 2)).unflatten(3, (h, 2))  # B axis t h y w x
    return field.permute(0, 4, 6, 1, 2, 3, 5).flatten(1, 3)
