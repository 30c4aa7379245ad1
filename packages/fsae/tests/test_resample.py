"""Down- and upsampling shortcuts against index-by-index formulas."""

from __future__ import annotations

import pytest
import torch

from fsae.layers.config import BlockStyle
from fsae.layers.conv import TimeKind
from fsae.layers.resample import Downsample, Upsample


def test_downsample_shortcut_index_by_index() -> None:
    """Sub-channels run c·8 + 4i + 2j + τ (time fastest), neighbours are averaged, frames pair (0,0),(1,2),..."""
    torch.manual_seed(0)
    down = Downsample(4, 8, halve_time=True)
    x = torch.randn(1, 4, 5, 4, 6, dtype=torch.double)
    got = down.shortcut(x)
    assert got.shape == (1, 8, 3, 2, 3)
    pairs = [(0, 0), (1, 2), (3, 4)]
    for t, pair in enumerate(pairs):
        for y in range(2):
            for z in range(3):
                sub = torch.stack(
                    [
                        x[0, c, pair[tau], 2 * y + i, 2 * z + j]
                        for c in range(4)
                        for i in range(2)
                        for j in range(2)
                        for tau in range(2)
                    ]
                )
                torch.testing.assert_close(got[0, :, t, y, z], sub.view(8, -1).mean(1))


def test_upsample_shortcut_index_by_index() -> None:
    torch.manual_seed(0)
    up = Upsample(8, 4, BlockStyle("standard"), double_time=True)
    x = torch.randn(1, 8, 3, 2, 2, dtype=torch.double)
    got = up.shortcut(x)
    assert got.shape == (1, 4, 5, 4, 4)
    copies = 4 * 4 // 8
    for frame in range(5):
        for c in range(4):
            for y in range(4):
                for z in range(4):
                    channel = (4 * c + 2 * (y % 2) + z % 2) // copies
                    assert got[0, c, frame, y, z] == x[0, channel, (frame + 1) // 2, y // 2, z // 2]


@pytest.mark.parametrize("time", ["causal", "standard", "group_causal"])
def test_sizes_there_and_back(time: TimeKind) -> None:
    x = torch.randn(1, 4, 9, 4, 4)
    small = Downsample(4, 8, halve_time=True)(x)
    assert small.shape == (1, 8, 5, 2, 2)
    assert Upsample(8, 4, BlockStyle(time, group=2), double_time=True)(small).shape == x.shape
    assert Downsample(4, 8, halve_time=False)(x).shape == (1, 8, 9, 2, 2)


def test_channels_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="6 channels do not divide"):
        Downsample(4, 6, halve_time=False)
    with pytest.raises(ValueError, match="6 channels do not divide"):
        Upsample(6, 4, BlockStyle(), double_time=False)
