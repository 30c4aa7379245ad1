"""The even shortcuts treat rows and columns alike, leave constants alone, and are what folding folds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fsae import FSAE
from fsae.layers.config import BlockStyle
from fsae.layers.conv import TimeKind
from fsae.layers.resample import Downsample, Upsample
from fsae.layers.shortcuts import Shortcut
from fsae.streaming import FrameCache


def even(time: TimeKind) -> BlockStyle:
    return BlockStyle(time, group=2, shortcut="even")


def nyquist(x: Tensor) -> tuple[float, float]:
    """Energy of `... H W` at the highest frequency of its rows' axis, and of its columns'."""
    rows = torch.tensor([1.0, -1.0]).repeat(x.shape[-2] // 2).view(-1, 1)
    columns = torch.tensor([1.0, -1.0]).repeat(x.shape[-1] // 2)
    return (x * rows).mean(-2).square().sum().item(), (x * columns).mean(-1).square().sum().item()


@pytest.mark.parametrize(("inside", "outside"), [(8, 4), (4, 8), (8, 8), (8, 2)])
def test_even_is_a_mean_and_a_copy(inside: int, outside: int) -> None:
    x = torch.randn(2, inside, 4, 6)
    up = Shortcut("even", inside, outside).up(x)
    for channel in range(outside):
        if inside >= outside:
            share = inside // outside
            want = x[:, channel * share : (channel + 1) * share].mean(1)
        else:
            want = x[:, channel * inside // outside]
        for row in (0, 1):
            for column in (0, 1):
                torch.testing.assert_close(up[:, channel, row::2, column::2], want)
                assert torch.equal(
                    Shortcut("even", inside, outside).corner(x, 2 * row + column)[:, channel],
                    up[:, channel, row::2, column::2],
                )
    down = Shortcut("even", outside, inside).down(up)
    assert down.shape == x.shape
    flat = torch.randn(2, inside, 1, 1).expand(-1, -1, 4, 4)
    assert Shortcut("even", inside, outside).down(flat).std((2, 3)).max() < 1e-6


def test_rows_and_columns_are_alike_and_dc_aes_are_not() -> None:
    """A halving step up of noise: DC-AE's leaves rows' energy at the highest frequency and none of columns'."""
    torch.manual_seed(0)
    x = torch.randn(1, 64, 16, 16)
    rows, columns = nyquist(Shortcut("dc-ae", 64, 32).up(x))
    assert rows > 1 and columns < 1e-9
    rows, columns = nyquist(Shortcut("even", 64, 32).up(x))
    assert rows < 1e-9 and columns < 1e-9


def test_a_whole_model_has_no_scan_lines_to_begin_with() -> None:
    energies = {}
    for kind in ("even", "dc-ae"):
        torch.manual_seed(0)
        model = FSAE.from_preset("nano", shortcut=kind)
        with torch.no_grad():
            rows, columns = nyquist(model.decode(torch.randn(1, 128, 1, 2, 2)))
        energies[kind] = rows / columns
    assert energies["even"] < 4 and energies["dc-ae"] > 4 * energies["even"]


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("time", ["causal", "standard", "group_causal"])
def test_between_two_frames_stands_their_mean(time: TimeKind, folded: bool) -> None:
    up = Upsample(4, 4, even(time), double_time=True).double().eval()
    torch.nn.init.zeros_(up.conv.weight)
    torch.nn.init.zeros_(up.conv.bias)
    up.folded = folded
    x = torch.randn(1, 4, 3, 4, 4, dtype=torch.double)
    with torch.no_grad():
        made = up(x)[..., ::2, ::2]
    want = torch.stack(
        [x[:, :, 0], (x[:, :, 0] + x[:, :, 1]) / 2, x[:, :, 1], (x[:, :, 1] + x[:, :, 2]) / 2, x[:, :, 2]], 2
    )
    torch.testing.assert_close(made, want)


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("time", ["causal", "group_causal"])
@torch.no_grad()
def test_a_stream_of_even_steps_is_the_whole(time: TimeKind, folded: bool) -> None:
    torch.manual_seed(0)
    up = Upsample(8, 4, even(time), double_time=True).double().eval()
    down = Downsample(4, 8, halve_time=True, shortcut="even").double()
    up.folded = folded
    x = torch.randn(1, 8, 6, 4, 4, dtype=torch.double)
    whole = up(x)
    cache = FrameCache()
    parts = [up(part, cache) for part in x.split([1, 2, 3], dim=2)]
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=1e-12)
    other = Upsample(8, 4, even(time), double_time=True).double().eval()
    other.load_state_dict(up.state_dict())
    other.folded = not folded
    torch.testing.assert_close(other(x), whole, rtol=0, atol=1e-12)
    cache = FrameCache()
    parts = [down(part, cache) for part in whole.split([1, 4, 6], dim=2)]
    torch.testing.assert_close(torch.cat(parts, dim=2), down(whole), rtol=0, atol=1e-12)


@torch.no_grad()
def test_even_steps_down_keep_the_later_frame_of_a_pair() -> None:
    down = Downsample(4, 4, halve_time=True, shortcut="even").double()
    x = torch.randn(1, 4, 5, 4, 4, dtype=torch.double)
    want = x[:, :, [0, 2, 4]].unflatten(4, (2, 2)).unflatten(3, (2, 2)).mean((4, 6))
    torch.testing.assert_close(down.shortcut(x), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(down.shortcut(x[:, :, 1:], begun=True), want[:, :, 1:], rtol=0, atol=1e-12)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="'odd'; accepted are dc-ae, even"):
        Shortcut("odd", 4, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="from 6 to 4 channels needs one to be a multiple"):
        Shortcut("even", 6, 4)
