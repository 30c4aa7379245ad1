"""The encoder's comparison of frames: against brute force, nothing where nothing moves, and shifts that it tells."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsae import FSAE
from fsae.layers import matching
from fsae.layers.matching import LEVELS, REACH, WINDOWS, Matching
from fsae.planned import PlannedEncoder
from fsae.streaming import FrameCache

CELL = 8


def layer() -> Matching:
    """Of latents of 32 x 32 pixels: 2 x 2 places each, of 2 x 2 pairs of cells."""
    torch.manual_seed(0)
    made = Matching(6, 2, width=4).double()
    torch.nn.init.normal_(made.to_latents.weight)
    return made


def clip(frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, 3, frames, height, width, generator=generator, dtype=torch.double) * 2 - 1


def around(x: Tensor, row: int, column: int, window: int) -> Tensor:
    """The part of `C h w` in a window about a cell, as far as it lies in the frame."""
    half = window // 2
    return x[:, max(0, row - half) : row + half + 1, max(0, column - half) : column + half + 1]


def keys_by_hand(frame: Tensor) -> Tensor:
    """Of a small frame `3 h w`, cell by cell."""
    detail, keys = torch.empty_like(frame), torch.empty_like(frame)
    cells = [(r, c) for r in range(frame.shape[1]) for c in range(frame.shape[2])]
    for r, c in cells:
        detail[:, r, c] = frame[:, r, c] - around(frame, r, c, matching.DETAIL).mean((1, 2))
    for r, c in cells:
        light = around(detail, r, c, matching.LIGHT).square().sum(0).mean()
        keys[:, r, c] = detail[:, r, c] / math.sqrt(light + matching.NOISE**2)
    return keys


def vote_by_hand(here: Tensor, there: Tensor, row: int, column: int, window: int) -> list[float]:
    """The mean offset and the spread at one cell, of keys `3 h w`."""
    _, height, width = here.shape
    offsets = [(a, b) for a in range(-REACH, REACH + 1) for b in range(-REACH, REACH + 1)]
    half, agreements = window // 2, []
    for a, b in offsets:
        products = []
        for r in range(max(0, row - half), min(height, row + half + 1)):
            for c in range(max(0, column - half), min(width, column + half + 1)):
                in_frame = 0 <= r + a < height and 0 <= c + b < width
                products.append(float(here[:, r, c] @ there[:, r + a, c + b]) if in_frame else 0.0)
        agreements.append(sum(products) / len(products))
    largest = max(agreements)
    weights = [math.exp(matching.SHARPNESS * (a - largest)) for a in agreements]
    shares = [w / sum(weights) for w in weights]
    mean = [sum(s * o[axis] / REACH for s, o in zip(shares, offsets, strict=True)) for axis in (0, 1)]
    square = sum(s * (o[0] ** 2 + o[1] ** 2) / REACH**2 for s, o in zip(shares, offsets, strict=True))
    return [*mean, square - mean[0] ** 2 - mean[1] ** 2]


@torch.no_grad()
def test_votes_are_those_of_one_cell_and_offset_at_a_time() -> None:
    # Smooth, so that a frame agrees with itself at more than one offset.
    video = F.interpolate(clip(2, 4, 4)[0], size=(64, 64), mode="bicubic")[None]
    frames = Matching.frames(video, CELL, 1, begun=False)
    moved, sure = Matching._seen(frames)
    assert sure.abs().max() > 1e-2
    for number, level in enumerate(LEVELS):
        small = F.avg_pool2d(video[0].transpose(0, 1), 4 * level)
        before, now = (keys_by_hand(frame) for frame in small)
        for part, window in enumerate(WINDOWS):
            place = number * len(WINDOWS) + part
            for row, column in ((0, 0), (3, 5)):
                # Of the finest grid four cells are one of the features', of the coarsest one is four.
                side = 2 // level
                cells = [(2 * row + i, 2 * column + j) for i in range(2) for j in range(2)] if side == 2 else None
                cells = cells or [(row * 2 // level, column * 2 // level)]
                want = [
                    [n - o for n, o in zip(new, own, strict=True)] + own[2:]
                    for new, own in (
                        (vote_by_hand(now, before, r, c, window), vote_by_hand(now, now, r, c, window))
                        for r, c in cells
                    )
                ]
                found = [*moved[0, row, column, 3 * place : 3 * place + 3], sure[0, row, column, place]]
                torch.testing.assert_close(
                    torch.stack(found), torch.tensor(want, dtype=torch.double).mean(0), rtol=0, atol=1e-9
                )


@torch.no_grad()
def test_small_frames_are_each_latents_last() -> None:
    video = clip(9, 16, 16)
    whole = Matching.frames(video, CELL, 4, begun=False)
    assert whole.shape == (1, 12, 3, 2, 2)
    for t, frame in enumerate((0, 4, 8)):
        cells = F.avg_pool2d(video[:, :, frame], 4)  # 4 x 4 of them
        torch.testing.assert_close(whole[0, :, t].view(3, 2, 2, 2, 2)[1, 1, 0], cells[0, 1, 1::2, 0::2])
    parts = [Matching.frames(video[:, :, :5], CELL, 4, False), Matching.frames(video[:, :, 5:], CELL, 4, True)]
    assert (torch.cat(parts, dim=2) == whole).all()


@torch.no_grad()
def test_latents_are_told_what_is_around_their_places() -> None:
    """From c and s on: written out for one latent of the second frame."""
    match = layer()
    frames = Matching.frames(clip(2, 64, 96), CELL, 1, begun=False)
    moved, sure = (part[1] for part in Matching._seen(torch.cat([frames[:, :, :1], frames], dim=2)))
    cells = F.silu(moved @ match.moved.weight.T + sure @ match.sure.weight.T + match.sure.bias)
    cells = cells - F.silu(sure @ match.sure.weight.T + match.sure.bias)
    places = cells.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).mean((1, 3))  # 4 x 6 of them
    around = torch.cat([places, places.mean((0, 1)).expand_as(places)], dim=2)
    padded = F.pad(around, (0, 0, 1, 1, 1, 1))
    kernel = match.near.weight[:, :, 0]
    row, column = 1, 2  # of the latent
    told = torch.zeros(6, dtype=torch.double)
    for i in range(2):
        for j in range(2):
            r, c = 2 * row + i, 2 * column + j
            near = torch.einsum("oiyx,yxi->o", kernel, padded[r : r + 3, c : c + 3])
            place = places[r, c] + F.silu(near)
            told += match.to_latents.weight.unflatten(1, (4, 2, 2))[:, :, i, j] @ place
    torch.testing.assert_close(match(frames)[0, :, 1, row, column], told, rtol=0, atol=1e-12)


@torch.no_grad()
def test_pictures_and_still_clips_are_told_nothing() -> None:
    match = layer()
    moving = Matching.frames(clip(2, 64, 64), CELL, 1, begun=False)
    still = moving[:, :, :1].expand(-1, -1, 2, -1, -1)
    assert not match(still).any() and not match(moving[:, :, :1]).any()
    assert not match(moving)[:, :, 0].any() and match(moving)[:, :, 1].abs().min() > 0


@torch.no_grad()
def test_a_stream_is_the_whole() -> None:
    match, cache = layer(), FrameCache()
    frames = Matching.frames(clip(6, 64, 64), CELL, 1, begun=False)
    parts = [match(part, cache) for part in frames.split([1, 2, 3], 2)]
    torch.testing.assert_close(torch.cat(parts, dim=2), match(frames), rtol=0, atol=1e-12)


@torch.no_grad()
def test_an_encoder_that_compares_is_the_same_in_chunks_and_tiles() -> None:
    torch.manual_seed(0)
    small = {"widths": (8, 8, 16, 32, 32, 32, 32), "latent_channels": 8, "injection_head_dim": 16}
    model = FSAE.from_config(FSAE.presets["nano"] | small).double().eval()
    assert model.encoder.match is not None
    torch.nn.init.normal_(model.encoder.match.to_latents.weight)
    video, memory = clip(13, 128, 192), 16_000_000
    plan = PlannedEncoder.of_clip(model.encoder, video, memory).plan
    assert len(plan.windows) > 1 and plan.latents < 4
    whole = model.encode(video)
    parts = list(model.encode_stream([video[:, :, :5], video[:, :, 5:]]))
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.encode(video, memory=memory), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.encode(video[:, :, :1]), whole[:, :, :1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shift", [(0, 0), (8, 0), (-4, 12)], ids=str)
def test_a_shifted_picture_is_told_untrained(shift: tuple[int, int]) -> None:
    """Within a tenth of a cell of the finest grid on most of the frame; another frame tells nothing."""
    picture = F.interpolate(clip(1, 32, 32)[:, :, 0], scale_factor=4, mode="bicubic")
    video = torch.stack([picture, picture.roll(shift, dims=(2, 3))], dim=2)
    moved, _ = Matching._seen(Matching.frames(video, CELL, 1, begun=False))
    found = moved[0, 4:-4, 4:-4, 3:5] * REACH * 4  # the finest grid's larger window, in pixels
    wanted = -torch.tensor(shift, dtype=torch.double)
    assert (found - wanted).abs().median() < 0.4
