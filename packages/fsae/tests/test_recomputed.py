"""Training in little memory: what is computed anew, in parts, has the gradients of the whole, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fsae import FSAE
from fsae.errors import UserError
from fsae.planned import PlannedDecoder, PlannedEncoder
from fsae.tiling import Window, Workload, foresee_recomputed, plan_recomputed


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


def injected(model: FSAE) -> int:
    return 0 if model.config.injection_sampling else model.config.temporal_stages


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize(("length", "grid"), [(5, (2, 3)), (2, (1, 1)), (1, (2, 2)), (3, (1, 2))], ids=str)
def test_the_encoder_in_parts_has_the_gradients_of_the_whole(
    length: int, grid: tuple[int, int], sampling: bool
) -> None:
    """Of every weight and of the video, through the latents and frame 0's features; the frames that chunks keep too."""
    model = drawn("causal", injection_sampling=sampling, matching_stages=1)
    encoder, first = model.encoder, injected(model)
    video = torch.randn(2, 3, 17, 80, 96, dtype=torch.double, requires_grad=True)
    inputs = [video, *encoder.parameters()]
    kept, latents = encoder.features(video)
    whole = [*(feature[:, :, 0] for feature in kept[first:]), latents]
    want = gradients(whole, inputs)
    model.enable_gradient_checkpointing()
    plan = foresee_recomputed(encoder.outer_stages, Workload(2, 5, 10, 12, 8), length, grid)
    features, latents = PlannedEncoder(encoder, plan).features(video, first)
    torch.testing.assert_close([*features, latents], whole, rtol=0, atol=1e-10)
    assert_same(gradients([*features, latents], inputs), want)


@pytest.mark.parametrize(
    ("kind", "length", "grid"),
    [("causal", 2, (1, 1)), ("causal", 1, (2, 2)), ("lite", 3, (1, 3)), ("lite", 1, (1, 1)), ("standard", 5, (2, 2))],
    ids=str,
)
def test_the_decoder_in_parts_has_the_gradients_of_the_whole(kind: str, length: int, grid: tuple[int, int]) -> None:
    """Of every weight, of the latents and of the first frame's features; with noise, on a part of the frame too."""
    model = drawn(kind, injection_sampling=kind == "lite")
    decoder, first = model.decoder, injected(model)
    latents = torch.randn(1, 8, 5, 5, 6, dtype=torch.double, requires_grad=True)
    image = torch.randn(1, 3, 1, 80, 96, dtype=torch.double)
    features = [None] * first + [f[:, :, 0].detach().requires_grad_() for f in model.encoder.features(image)[0][first:]]
    noise = decoder.draw_noise(80, 96, torch.Generator().manual_seed(0))
    inputs = [latents, *features[first:], *decoder.parameters()]
    for place in (None, Window(2, 3, 8, 9)):
        model.disable_gradient_checkpointing()
        x = decoder.inner(latents, features)
        x = x if place is None else place.crop(x)
        whole = decoder.outer(x, features, noise, place)
        want = gradients([whole], inputs)
        model.enable_gradient_checkpointing()
        x = decoder.inner(latents, features)
        x = x if place is None else place.crop(x)
        plan = foresee_recomputed(decoder.outer_stages, Workload(1, 5, *x.shape[3:], 8), length, grid)
        made = PlannedDecoder(decoder, plan).outer(x, decoder.contexts(features), noise, place)
        torch.testing.assert_close(made, whole, rtol=0, atol=1e-10)
        assert_same(gradients([made], inputs), want)


def test_more_memory_is_less_computed_twice() -> None:
    stages = drawn("causal").encoder.outer_stages
    work = Workload(1, 16, 32, 32, 2)
    whole = foresee_recomputed(stages, work, 16, (1, 1))
    assert plan_recomputed(stages, work, whole.nbytes, "train") == whole
    chunked = plan_recomputed(stages, work, whole.nbytes - 1, "train")
    assert chunked.latents < 16 and chunked.grid == (1, 1)
    with pytest.raises(UserError, match="takes at least") as refusal:
        plan_recomputed(stages, work, 1, "train")
    least = int(str(refusal.value).split("at least ")[1].split(",")[0])
    smallest = plan_recomputed(stages, work, least, "train")
    assert smallest.nbytes == least and len(smallest.windows) > 1
