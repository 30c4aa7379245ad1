"""The encoder's comparison of frames: against brute force, nothing where nothing moves, and learnt motion."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsae import FSAE
from fsae.layers.matching import HEAD_DIM, Matching
from fsae.streaming import FrameCache

CHANNELS, HEADS, REACH = 6, 2, 1


def layer() -> Matching:
    torch.manual_seed(0)
    made = Matching(CHANNELS, heads=HEADS, reach=REACH).double()
    torch.nn.init.normal_(made.to_out.weight)
    return made


def by_hand(match: Matching, x: Tensor) -> Tensor:
    """One cell, one offset and one head at a time."""
    out = x.clone()
    normed = x * torch.rsqrt(x.square().mean(1, keepdim=True) + match.norm.eps)
    key = torch.einsum("kc,bcthw->btkhw", match.to_key.weight, normed)
    _, _, frames, height, width = x.shape
    for b, t, row, column in torch.cartesian_prod(*map(torch.arange, (len(x), frames, height, width))).tolist():
        found = []
        for head in range(HEADS):
            part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            here = F.normalize(key[b, t, part, row, column], dim=0)
            for down in range(-REACH, REACH + 1):
                for right in range(-REACH, REACH + 1):
                    r, c = row + down, column + right
                    if not (0 <= r < height and 0 <= c < width):
                        found.append(torch.zeros((), dtype=x.dtype))
                        continue
                    now = F.normalize(key[b, t, part, r, c], dim=0)
                    before = F.normalize(key[b, max(t - 1, 0), part, r, c], dim=0)
                    found.append(here @ before - here @ now)
        hidden = F.silu(match.hidden.weight @ torch.stack(found))
        out[b, :, t, row, column] += match.to_out.weight @ hidden
    return out


@torch.no_grad()
def test_equal_to_one_cell_and_offset_at_a_time() -> None:
    match, x = layer(), torch.randn(2, CHANNELS, 3, 3, 4, dtype=torch.double)
    torch.testing.assert_close(match(x), by_hand(match, x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_pictures_and_still_clips_pass_unchanged() -> None:
    match, x = layer(), torch.randn(1, CHANNELS, 1, 4, 4, dtype=torch.double)
    assert (match(x) == x).all()
    still = x.expand(-1, -1, 3, -1, -1)
    assert (match(still) == still).all()
    moving = torch.cat([x, x.roll(1, dims=4)], dim=2)
    assert (match(moving)[:, :, 0] == x[:, :, 0]).all() and (match(moving)[:, :, 1] - moving[:, :, 1]).abs().min() > 0


@torch.no_grad()
def test_a_stream_is_the_whole() -> None:
    match, x = layer(), torch.randn(2, CHANNELS, 6, 3, 3, dtype=torch.double)
    cache = FrameCache()
    parts = [match(part, cache) for part in x.split([1, 2, 3], dim=2)]
    torch.testing.assert_close(torch.cat(parts, dim=2), match(x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_an_encoder_that_compares_is_the_same_in_chunks_and_tiles() -> None:
    torch.manual_seed(0)
    small = {"widths": (8, 8, 16, 32, 32, 32, 32), "latent_channels": 8, "injection_head_dim": 16}
    model = FSAE.from_config(FSAE.presets["nano"] | small).double().eval()
    for stage, compares in zip(model.encoder.stages, (0, 0, 0, 1, 1, 0, 0), strict=True):
        assert (stage.match is not None) == compares
        if stage.match is not None:
            torch.nn.init.normal_(stage.match.to_out.weight)
    video = torch.rand(1, 3, 13, 128, 192, dtype=torch.double) * 2 - 1
    whole = model.encode(video)
    parts = list(model.encode_stream([video[:, :, :5], video[:, :, 5:]]))
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.encode(video, memory=30_000_000), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.encode(video[:, :, :1]), whole[:, :, :1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("compares", [True, False])
def test_shifts_are_learnt_with_it_and_not_without(compares: bool) -> None:
    """A linear reading of what the layer adds tells by how many cells white noise was shifted, in 60 updates."""
    torch.manual_seed(0)
    match = Matching(16, reach=2)
    if compares:
        torch.nn.init.eye_(match.to_out.weight)
    read = torch.nn.Linear(16, 2)
    optimizer = torch.optim.Adam([*match.parameters(), *read.parameters()], lr=1e-2)
    for _ in range(60):
        picture = torch.randn(8, 16, 1, 8, 8)
        shifts = torch.randint(-2, 3, (8, 2))
        moved = [p.roll(s.tolist(), dims=(2, 3)) for p, s in zip(picture, shifts, strict=True)]
        x = torch.cat([picture, torch.stack(moved)], dim=2)
        made = match(x) - x if compares else x
        error = (read(made[:, :, 1].mean((2, 3))) - shifts).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert error < 0.3 if compares else error > 1
