"""Patches: what they cover, and that their gradient is that of the whole frame's loss in the same window."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fsae.layers.attention import FirstFrameAttention
from fsae.model import FSAE
from fsae.stages.patches import Patch, Span, decode, draw_patch, draw_span, exact_core
from fsae.tiling import Window


def tiny(**options: Any) -> FSAE:
    """With every path open: injection, offsets, noise."""
    torch.manual_seed(0)
    model = FSAE.from_preset("tiny", **{"noise": 0.05, **options})
    for module in model.modules():
        if isinstance(module, FirstFrameAttention):
            torch.nn.init.normal_(module.to_out.weight, std=0.3)
    return model


def clip(frames: int = 5, height: int = 64, width: int = 64, batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_core_loses_the_halo_except_at_the_frame() -> None:
    assert exact_core(Window(0, 0, 12, 12), 4, 16, 24) == Window(0, 0, 8, 8)
    assert exact_core(Window(4, 12, 12, 12), 4, 16, 24) == Window(8, 16, 8, 8)
    assert exact_core(Window(2, 5, 12, 12), 4, 16, 24) == Window(6, 9, 4, 4)
    assert exact_core(Window(0, 5, 16, 12), 4, 16, 24) == Window(0, 9, 16, 4)


def test_patches_are_drawn_over_the_whole_frame_about_evenly() -> None:
    generator = seeded()
    seen = np.zeros((20, 30))
    for _ in range(3000):
        patch = draw_patch(20, 30, 14, 4, generator)
        assert patch is not None and (patch.window.height, patch.window.width) == (14, 14)
        assert patch.window.bottom <= 20 and patch.window.right <= 30 and min(patch.window.top, patch.window.left) >= 0
        assert patch.core == exact_core(patch.window, 4, 20, 30) and min(patch.core.height, patch.core.width) >= 6
        seen[patch.core.slices] += 1
    assert seen.min() > 0.12 * seen.max()
    assert draw_patch(12, 14, 14, 4, generator) is None
    narrow = draw_patch(12, 30, 14, 4, generator)
    assert narrow is not None and narrow.window.height == narrow.core.height == 12


@pytest.mark.parametrize(
    ("kind", "corner", "frames"),
    [
        ("standard", (0, 0), 1),
        ("standard", (2, 3), 5),
        ("standard", (4, 4), 1),
        ("causal", (4, 1), 1),
        ("lite", (0, 2), 5),
    ],
    ids=str,
)
def test_the_patch_has_the_gradient_of_the_whole_frame_in_the_window(
    kind: str, corner: tuple[int, int], frames: int
) -> None:
    """Of every parameter, encoder included, in double precision, with injection (in windows) and noise."""
    model = tiny(decoder_kind=kind, injection_window=12).double()
    video = clip(frames, 128, 128).double()
    window = Window(*corner, 12, 12)
    core = exact_core(window, model.decoder.halo, 16, 16)
    assert model.decoder.halo == 4 and model.decoder.outer_stages.cell == 8

    def gradients(patch: Patch | None) -> tuple[Tensor, list[Tensor | None]]:
        kept, latents = model.encoder.features(video)
        noise = model.decoder.draw_noise(128, 128, seeded())
        made = decode(model.decoder, latents, [feature[:, :, 0] for feature in kept], noise, patch)
        made = core.scaled(8).crop(made) if patch is None else made
        value = (made - core.scaled(8).crop(video)).abs().mean()
        return made, list(torch.autograd.grad(value, list(model.parameters()), allow_unused=True))

    whole, expected = gradients(None)
    part, found = gradients(Patch(window, core))
    torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-11)
    assert sum(g is not None and bool(g.any()) for g in expected) > 0.9 * len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-11)


def test_a_smaller_core_would_not_be_needed_and_a_larger_one_is_wrong() -> None:
    model = tiny().double()
    kept, latents = model.encoder.features(clip(1, 128, 128).double())
    first = [feature[:, :, 0] for feature in kept]
    noise = model.decoder.draw_noise(128, 128, seeded())
    window = Window(2, 2, 12, 12)
    whole = decode(model.decoder, latents, first, noise, None)
    wide = exact_core(window, 3, 16, 16)
    part = decode(model.decoder, latents, first, noise, Patch(window, wide))
    assert (part - wide.scaled(8).crop(whole)).abs().max() > 1e-6


# --- in time


@pytest.mark.parametrize(
    ("kind", "span", "core"),
    [
        ("causal", (0, 4), (0, 4)),
        ("causal", (1, 14), (12, 14)),
        ("lite", (0, 3), (0, 3)),
        ("lite", (2, 10), (8, 10)),
        ("standard", (0, 9), (0, 3)),
        ("standard", (5, 14), (11, 14)),
        ("standard", (0, 14), (0, 14)),
    ],
    ids=str,
)
def test_a_part_of_a_clip_has_the_gradient_of_the_whole_in_its_core(
    kind: str, span: tuple[int, int], core: tuple[int, int]
) -> None:
    """In space as well; 14 latents, of which `reach` at these depths is 11 and 0, 6 and 0, 6 and 6."""
    model = tiny(decoder_kind=kind, decoder_depths=(1,) * 7).double()
    assert model.decoder.reach == {"causal": (11, 0), "lite": (6, 0), "standard": (6, 6)}[kind]
    torch.manual_seed(0)
    latents = torch.randn(1, 8, 14, 1, 2, dtype=torch.double, requires_grad=True)
    first = [None if f is None else f.detach() for f in model.first_frame_features(clip(1, 64, 128).double())]
    noise = model.decoder.draw_noise(64, 128, seeded())
    window = Window(0, 3, 8, 11)
    patch = Patch(window, exact_core(window, model.decoder.halo, 8, 16), Span(*span), Span(*core))

    def gradients(part: Patch | None) -> tuple[Tensor, list[Tensor | None]]:
        made = decode(model.decoder, latents, first, noise, part)
        made = patch.target(made, 8, 4) if part is None else made
        value = made.square().mean()
        inputs = [latents, *model.decoder.parameters()]
        return made, list(torch.autograd.grad(value, inputs, allow_unused=True))

    if kind == "causal" and core[0]:
        with torch.no_grad():
            wide = Patch(window, patch.core, patch.span, Span(core[0] - 1, core[1]))
            video = wide.target(decode(model.decoder, latents, first, noise, None), 8, 4)
            assert (decode(model.decoder, latents, first, noise, wide) - video).abs().max() > 1e-9
    whole, expected = gradients(None)
    assert whole.shape[2] == 4 * (core[1] - core[0]) - 3 * (core[0] == 0)
    part, found = gradients(patch)
    torch.testing.assert_close(part, whole, rtol=0, atol=1e-10)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "reach"), [("causal", (25, 0)), ("lite", (13, 0)), ("standard", (13, 13))])
def test_what_the_papers_decoders_reach_in_time(kind: str, reach: tuple[int, int]) -> None:
    with torch.device("meta"):
        assert FSAE.from_preset("standard", decoder_kind=kind).decoder.reach == reach


def test_spans_are_drawn_where_they_have_a_core() -> None:
    generator = seeded()
    seen = np.zeros(31)
    for _ in range(500):
        drawn = draw_span(31, 20, (13, 0), generator)
        assert drawn is not None
        span, core = drawn
        assert span.stop - span.start == 20 and 0 <= span.start <= core.start < core.stop == span.stop <= 31
        assert core.start == (span.start + 13 if span.start else 0)
        seen[slice(*core)] += 1
    assert seen.min() > 30
    assert {draw_span(31, 20, (25, 0), generator) for _ in range(20)} == {(Span(0, 20), Span(0, 20))}
    ends = {draw_span(31, 16, (13, 13), generator) for _ in range(40)}
    assert ends == {(Span(0, 16), Span(0, 3)), (Span(15, 31), Span(28, 31))}
    assert draw_span(16, 16, (13, 13), generator) is None
