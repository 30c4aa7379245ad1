"""The first frame's features follow the motion that the decoder reads off its own features."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fsae import FSAE
from fsae.errors import UserError
from fsae.layers.config import BlockStyle
from fsae.layers.motion import VELOCITY_UNIT, FirstFrameSampling, MotionField, at_rate, inside, places_of, sample
from fsae.streaming import FrameCache
from fsae.tiling import Window
from fsae.weights.initialization import start_small

CELL = 8


def field(frames: int = 4) -> MotionField:
    return MotionField(3, 4, frames=frames, cell=CELL, style=BlockStyle(norm_affine=False)).double()


def affine(matrix: Tensor, size: int) -> Tensor:
    """The displacement field `2 size size` in pixels of a map of centred pixels, at cells of CELL pixels."""
    at = (torch.arange(size, dtype=torch.double) + 0.5 - size / 2) * CELL
    y, x = torch.meshgrid(at, at, indexing="ij")
    moved = torch.einsum("ij,jhw->ihw", matrix[:, :2], torch.stack([x, y])) + matrix[:, 2, None, None]
    return torch.stack([moved[1] - y, moved[0] - x])


def similarity(zoom: float, turn: float, shift: tuple[float, float]) -> Tensor:
    c, s = zoom * math.cos(turn), zoom * math.sin(turn)
    return torch.tensor([[c, -s, shift[0]], [s, c, shift[1]]], dtype=torch.double)


def composed(outer: Tensor, inner: Tensor) -> Tensor:
    last = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.double)
    return (torch.cat([outer, last]) @ torch.cat([inner, last]))[:2]


def test_velocities_add_up_as_maps_are_composed() -> None:
    """Three latents of different similarities: the displacement at the last is that of the product of their maps."""
    steps = [
        similarity(0.97, 0.03, (3.0, 1.0)),
        similarity(1.02, -0.05, (0.0, -2.0)),
        similarity(0.95, 0.0, (1.0, 1.0)),
    ]
    velocity = torch.stack([torch.zeros(2, 16, 16, dtype=torch.double), *(affine(m, 16) for m in steps)], dim=1)
    made = field().added_up(velocity[None])
    total = torch.eye(3, dtype=torch.double)[:2]
    for latent, matrix in enumerate(steps, 1):
        total = composed(total, matrix)  # of this frame's places: first back to the frame before, then on to frame 0
        inner = (slice(4, 12), slice(4, 12))  # what looks beyond the frame's edge is not known
        torch.testing.assert_close(made[0, -2:, latent][:, *inner], affine(total, 16)[:, *inner], rtol=0, atol=1e-9)
    assert affine(total, 16)[:, 4:12, 4:12].abs().max() > 5


def test_frames_of_a_latent_move_evenly_and_the_first_frame_stays() -> None:
    velocity = torch.zeros(1, 2, 3, 4, 4, dtype=torch.double)
    velocity[:, 1, :] = 4.0  # the first latent's means nothing
    made = field().added_up(velocity).unflatten(1, (4, 2))[:, :, 1]  # B frame t h w
    line = made.permute(0, 2, 1, 3, 4).flatten(1, 2)[0, :, 2, 2]
    assert line.tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_a_picture_leaves_no_parameter_without_a_gradient() -> None:
    """Processes that train together would wait for it."""
    motion = field()
    motion(torch.randn(1, 3, 1, 2, 2).double(), torch.randn(1, 4, 1, 1, 1).double()).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in motion.parameters())


def test_a_stream_goes_on_where_it_was() -> None:
    motion = field()
    torch.nn.init.normal_(motion.say.weight)
    torch.nn.init.normal_(motion.read.weight)
    x, latents = torch.randn(2, 3, 7, 4, 8, dtype=torch.double), torch.randn(2, 4, 7, 1, 2, dtype=torch.double)
    cache = FrameCache()
    chunks = zip(x.split([2, 1, 4], dim=2), latents.split([2, 1, 4], dim=2), strict=True)
    parts = [motion(*chunk, cache) for chunk in chunks]
    torch.testing.assert_close(torch.cat(parts, dim=2), motion(x, latents), rtol=0, atol=1e-12)


def test_latents_say_the_velocity_of_four_places_each() -> None:
    """Rows of places before columns, and the row's velocity before the column's; linear in between."""
    motion = field()
    assert not motion.velocity(torch.randn(1, 3, 1, 4, 4).double(), torch.randn(1, 4, 1, 1, 1).double()).any()
    torch.nn.init.zeros_(motion.say.weight)
    motion.say.bias.data = torch.tensor([1.0, 10, 2, 20, 3, 30, 4, 40]).double() / VELOCITY_UNIT
    said = motion.velocity(torch.zeros(1, 3, 1, 2, 2).double(), torch.zeros(1, 4, 1, 1, 1).double())[0, :, 0]
    assert said.tolist() == [[[1, 2], [3, 4]], [[10, 20], [30, 40]]]
    fine = motion.velocity(torch.zeros(1, 3, 1, 4, 4).double(), torch.zeros(1, 4, 1, 1, 1).double())[0, 0, 0]
    assert fine[0].tolist() == [1, 1.25, 1.75, 2] and fine[:, 0].tolist() == [1, 1.5, 2.5, 3]


@pytest.mark.parametrize(("rate", "want"), [(4, [0, 1, 2, 3, 4, 5, 6, 7]), (2, [0.5, 2.5, 4.5, 6.5]), (1, [1.5, 5.5])])
def test_a_slower_stage_takes_the_mean_of_its_frames(rate: int, want: list[float]) -> None:
    """Rows hold the number of their frame, columns its negative."""
    line = torch.arange(8.0).view(1, 2, 4).transpose(1, 2)  # B frame t
    given = torch.stack([line, -line], dim=2).flatten(1, 2)[..., None, None]
    made = at_rate(given, rate)[0, :, :, 0, 0]
    assert made[0].tolist() == want and made[1].tolist() == [-value for value in want]


def test_sampling_is_that_of_a_linear_picture() -> None:
    """On a ramp, between cells too: what is at row r and column c is 10 r + c."""
    picture = (10 * torch.arange(6.0).view(6, 1) + torch.arange(7.0)).expand(1, 1, 6, 7)
    offset = torch.stack([torch.full((3, 2, 3), 0.5), torch.full((3, 2, 3), -0.25)])[None]
    window = Window(2, 3, 2, 3)
    places = places_of(offset, window)
    want = (10 * (torch.arange(2.0, 4.0).view(2, 1) + 0.5) + torch.arange(3.0, 6.0) - 0.25).expand(1, 1, 3, 2, 3)
    torch.testing.assert_close(sample(picture, places), want, rtol=0, atol=1e-4)
    far = places_of(torch.full((1, 2, 1, 6, 7), -20.0))
    assert (sample(picture, far) == 0).all() and (inside(far, picture) == 0).all()
    edge = places_of(torch.stack([torch.full((1, 6, 7), -0.25), torch.zeros(1, 6, 7)])[None])
    assert inside(edge, picture)[0, 0, 0, :, 0].tolist() == [0.75, 1, 1, 1, 1, 1]


def test_a_fresh_layer_is_the_identity_and_an_open_one_shows_frame_0_moved() -> None:
    torch.manual_seed(0)
    layer = FirstFrameSampling(4, 4, size=2, rate=1)
    x, first = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 4, 8, 8)
    moved = torch.zeros(1, 8, 2, 2, 2)
    moved[:, 1::2, 1] = 4.0  # the second latent's frames: 4 pixels to the right, two cells
    assert torch.equal(layer(x, first, moved), x)
    torch.nn.init.eye_(layer.to_value.weight)
    torch.nn.init.zeros_(layer.to_value.bias)
    torch.nn.init.zeros_(layer.to_gate.weight)
    torch.nn.init.constant_(layer.to_gate.bias, 20.0)
    torch.nn.init.ones_(layer.strength)
    made = layer(x, first, moved)
    torch.testing.assert_close(made[:, :, 0], first, rtol=0, atol=1e-5)
    torch.testing.assert_close(made[:, :, 1, :, :-2], first[..., 2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(made[:, :, 1, :, -2:], x[:, :, 1, :, -2:], rtol=0, atol=1e-5)  # from outside of frame 0


def opened(kind: str, **options: Any) -> FSAE:
    """A tiny model in which every path is open and things move by tens of pixels."""
    torch.manual_seed(0)
    model = FSAE.from_preset("tiny", decoder_kind=kind, **options).double().eval()
    start_small(model)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
        model.decoder.motion.say.weight.normal_(std=0.5)
    return model


@pytest.mark.parametrize("kind", ["standard", "lite", "causal"])
@torch.no_grad()
def test_every_cheap_path_gives_the_same_video(kind: str) -> None:
    model = opened(kind)
    latents, image = torch.randn(1, 8, 2, 1, 5).double(), torch.rand(1, 3, 1, 64, 320).double() * 2 - 1
    whole = model.decode(latents, image)
    with pytest.raises(UserError, match="takes at least") as refused:
        model.decode(latents, image, memory=1)
    least = int(re.search(r"at least (\d+)", str(refused.value)).group(1))
    tiled = model.decode(latents, image, memory=least)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-9)
    if kind != "standard":
        torch.testing.assert_close(torch.cat([*model.decode_stream(latents, image)], 2), whole, rtol=0, atol=1e-9)
    assert (model.decode(latents) - whole).abs().max() > 1e-2  # the injection does something


def test_both_encodings_of_frame_0_give_the_same_injection() -> None:
    """The clip's own pass, as training has it, and the image alone, as generation has it."""
    model = opened("standard")
    video = torch.rand(1, 3, 5, 64, 64).double() * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(model(video), model.decode(model.encode(video), video[:, :, :1]), rtol=0, atol=1e-9)
