"""Training in little memory: what is computed anew, in parts, has the gradients of the whole, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fsae import FSAE


def drawn(kind: str, **options: Any) -> FSAE:
    """A model of few stages, every weight drawn, so that every path is open."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "widths": (4, 8, 8, 16, 16),
        "encoder_depths": (1,) * 5,
        "decoder_depths": (1,) * 5,
        "latent_channels": 8,
        "decoder_kind": kind,
        "attention_head_dim": 8,
        "injection_head_dim": 4,
        "noise": 0.5,
    }
    model = FSAE(**{**settings, **options}).double()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def gradients(made: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Of a sum of all that was made, each number with a weight of its own."""
    generator = torch.Generator().manual_seed(7)
    value = torch.stack([(x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in made]).sum()
    return list(torch.autograd.grad(value, list(inputs), allow_unused=True))


def assert_same(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> None:
    assert sum(w is not None for w in want) > 0.5 * len(want)
    for a, b in zip(got, want, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def kept_by(call: Callable[[], object]) -> list[Tensor]:
    """What autograd keeps of a call."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        call()
    return saved


@pytest.mark.parametrize("kind", ["causal", "standard", "lite"])
def test_inner_stages_in_parts_have_the_gradients_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, video = drawn(kind), torch.randn(1, 3, 29, 16, 32, dtype=torch.double, requires_grad=True)
    inputs = [video, *model.parameters()]
    want = gradients([model(video)], inputs)
    model.enable_gradient_checkpointing()
    monkeypatch.setattr("fsae.tiling.INSIDE", 8 * 16 * 2 * 4)  # a frame of the widest at a time, four anew
    sizes: list[int] = []
    for block in model.encoder.stages[3].blocks:
        block.local.point.register_forward_hook(lambda _, given, made: sizes.append(made.shape[2]))
    assert_same(gradients([model(video)], inputs), want)
    assert set(sizes) == {4}


def test_at_full_resolution_only_what_enters_a_block_is_kept() -> None:
    """Of the finest stages: what enters each of the encoder's blocks and its step down, the decoder's, and its end."""
    model = drawn("standard", encoder_depths=(2, 1, 1, 1, 1), decoder_depths=(3, 1, 1, 1, 1))
    model.enable_gradient_checkpointing()
    video = torch.randn(1, 3, 9, 64, 64, dtype=torch.double)
    kept = [t for t in kept_by(lambda: model(video)) if t.ndim == 5 and t.shape[2:] == video.shape[2:]]
    assert sorted(t.shape[1] for t in kept) == [3] + [4] * (2 + 1 + 3 + 1)
