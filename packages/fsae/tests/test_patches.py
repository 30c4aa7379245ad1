"""Patches: what they cover, and that their gradient is that of the whole frame's loss in the same window."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fsae.layers.attention import FirstFrameAttention
from fsae.model import FSAE
from fsae.stages.patches import Patch, decode, draw_patch, exact_core
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
