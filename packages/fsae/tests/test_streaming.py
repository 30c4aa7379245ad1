"""Streams against the whole, float64: any cut in time gives the same latents and the same video."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fsae import FSAE
from fsae.errors import UserError
from fsae.layers.conv import VideoConv3d
from fsae.layers.resample import Upsample
from fsae.streaming import FrameCache, joined

SIZES = [(1, 32, 64), (5, 96, 32), (9, 64, 48), (33, 32, 16)]  # 16 pixels a latent


def nonzero(kind: str, **overrides: Any) -> FSAE:
    """A small model, all its weights drawn, that normalises, injects and adds noise."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "widths": (8, 8, 8, 32, 32),
        "encoder_depths": (1,) * 5,
        "decoder_depths": (1,) * 5,
        "latent_channels": 8,
        "decoder_kind": kind,
        "injection_head_dim": 4,
        "injection_window": 6,
        "injection_reach": 8.0,
        "noise": 0.5,
        "latents_mean": [0.1 * c for c in range(8)],
        "latents_std": [1 + 0.1 * c for c in range(8)],
    }
    model = FSAE(**{**settings, **overrides}).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def clip(frames: int, height: int, width: int) -> Tensor:
    return torch.randn(1, 3, frames, height, width, dtype=torch.double)


def cuts(frames: int, unit: int, *sizes: int) -> list[int]:
    """`sizes` units after the one frame, or latent, that comes first, as far as they go, then the rest."""
    counts, left = [1], frames - 1
    for size in sizes:
        if left > size * unit:
            counts.append(size * unit)
            left -= size * unit
    return [*counts, left] if left else counts


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_the_encoder_in_chunks_equals_the_whole(size: tuple[int, int, int]) -> None:
    model, video = nonzero("causal"), clip(*size)
    whole = model.encode(video)
    frames = size[0]
    for counts in ([1] + [4] * ((frames - 1) // 4), cuts(frames, 4, 1, 3), cuts(frames, 4, 2), [frames]):
        chunks = video.split([count for count in counts if count], dim=2)
        latents = list(model.encode_stream(iter(chunks)))
        assert [part.shape[2] for part in latents] == [(len_ + 3) // 4 for len_ in counts]
        torch.testing.assert_close(torch.cat(latents, 2), whole, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lite", "causal", "standard"])
@pytest.mark.parametrize("size", SIZES)
def test_the_decoder_in_chunks_equals_the_whole(kind: str, size: tuple[int, int, int]) -> None:
    model, first = nonzero(kind), clip(1, *size[1:])
    count = 1 + (size[0] - 1) // 4
    latents = torch.randn(1, 8, count, size[1] // 16, size[2] // 16, dtype=torch.double)

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    whole = model.decode(latents, first, generator())
    pieces = list(model.decode_stream(latents, first, generator()))
    assert [piece.shape[2] for piece in pieces] == [1] + [4] * (count - 1)
    torch.testing.assert_close(torch.cat(pieces, 2), whole, rtol=0, atol=1e-10)
    for counts in (cuts(count, 1, 1, 2), cuts(count, 1, 3), [count]):
        given = iter(latents.split([cut for cut in counts if cut], dim=2))
        pieces = list(model.decode_stream(given, model.first_frame_features(first), generator()))
        torch.testing.assert_close(torch.cat(pieces, 2), whole, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("folded", [True, False])
def test_streams_are_exact_folded_and_plain(folded: bool) -> None:
    for kind in ("lite", "causal"):
        model = nonzero(kind)
        for module in model.modules():
            if isinstance(module, Upsample):
                module.folded = folded
        latents = torch.randn(2, 8, 4, 1, 1, dtype=torch.double)
        pieces = list(model.decode_stream(latents.split([2, 1, 1], dim=2)))
        torch.testing.assert_close(torch.cat(pieces, 2), model.decode(latents), rtol=0, atol=1e-10)


def test_a_stream_is_worked_on_as_it_comes() -> None:
    """No chunk is asked for before its turn, and the frames of a latent are given before the next is looked at."""
    model = nonzero("lite")
    asked: list[int] = []

    def latents() -> Iterator[Tensor]:
        for number in range(3):
            asked.append(number)
            yield torch.zeros(1, 8, 1, 1, 1, dtype=torch.double)

    with torch.no_grad():
        for number, _ in enumerate(model.decode_stream(latents())):
            assert asked == list(range(number + 1))


@torch.no_grad()
def test_what_is_kept_is_two_frames_or_one_and_no_view() -> None:
    for kind, frames in (("lite", 1), ("causal", 2)):
        model = nonzero(kind, first_frame_injection=False)
        cache = FrameCache()
        sizes = []
        x = torch.randn(1, 8, 9, 4, 4, dtype=torch.double)
        for part in x.split([1, 4, 4], dim=2):
            inner = model.decoder.inner(part, None, cache)
            model.decoder.outer(inner, None, [[], [], []], cache=cache)
            sizes.append(cache.nbytes)
        assert sizes[0] == sizes[1] == sizes[2] > 0
        kept = {name: cache[layer] for name, layer in model.named_modules() if layer in cache}
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in kept.values())
        convolutions = [name for name, layer in model.decoder.named_modules() if isinstance(layer, VideoConv3d)]
        assert len(kept) == sum(model.get_submodule(f"decoder.{name}").kernel_size[0] == 3 for name in convolutions)
        assert {part.shape[2] for name, part in kept.items() if not name.endswith(".up")} == {frames}
    encoder = nonzero("causal").encoder
    cache = FrameCache()
    encoder.inner(encoder.outer(clip(1, 64, 64), cache)[1], cache)
    kept_by_stride = {
        (layer.stride[0], cache[layer].shape[2])
        for layer in encoder.modules()
        if isinstance(layer, nn.Conv3d) and layer in cache
    }
    assert kept_by_stride == {(1, 2), (2, 1)}


def test_what_cannot_be_streamed_is_refused() -> None:
    model = nonzero("lite")
    with torch.no_grad():
        with pytest.raises(UserError, match="4 frames cannot be encoded"):
            model.encode_stream([clip(4, 64, 64)])
        for second, words in (
            (clip(5, 64, 64), "5 frames of 64x64"),
            (clip(4, 64, 128), "128x64 pixels cannot follow"),
        ):
            with pytest.raises(UserError, match=words):
                list(model.encode_stream([clip(1, 64, 64), second]))
        for none in (model.encode_stream, model.decode_stream):
            with pytest.raises(UserError, match="no chunks"):
                none(iter(()))
    with pytest.raises(ValueError, match="looks at later frames"):
        VideoConv3d(2, 2, time="standard")(torch.zeros(1, 2, 3, 4, 4), FrameCache())
    with pytest.raises(ValueError, match="no pieces"):
        joined(iter(()), 1)
