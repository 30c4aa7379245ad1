"""Tiles against the whole frame, float64; the halo; the plan's foresight against what is measured."""

from __future__ import annotations

import re
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fsae import FSAE
from fsae.errors import UserError
from fsae.planned import PlannedDecoder, PlannedEncoder
from fsae.tiling import (
    MAX_ELEMENTS,
    OuterStages,
    TilePlan,
    Window,
    Workload,
    foresee,
    foresee_recomputed,
    plan_tiles,
    tiled,
)

NOTHING_TO_SPARE = 1


def nonzero(kind: str, dtype: torch.dtype = torch.double, **overrides: Any) -> FSAE:
    """A model of few stages whose outer ones are the large ones, with every weight drawn."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "widths": (4, 8, 8, 32, 32),
        "encoder_depths": (1,) * 5,
        "decoder_depths": (1,) * 5,
        "latent_channels": 8,
        "decoder_kind": kind,
        "injection_head_dim": 4,
        "injection_window": 12,
        "injection_reach": 8.0,
        "noise": 0.5,
    }
    model = FSAE(**{**settings, **overrides}).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def least_memory(call: Any) -> int:
    """What the error for a byte of memory says would do."""
    with pytest.raises(UserError, match="give that much") as refusal:
        call(NOTHING_TO_SPARE)
    found = re.search(r"at least (\d+)", str(refusal.value))
    assert found
    return int(found[1])


class Memory(TorchDispatchMode):
    """Bytes of the storages that are made inside and alive, at their most, and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.now = self.peak = self.largest = 0

    def _gone(self, key: int, nbytes: int) -> None:
        self.seen.discard(key)
        self.now -= nbytes

    def _found(self, tensor: Tensor, made: bool) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            nbytes = storage.nbytes() if made else 0
            self.seen.add(storage._cdata)
            self.now += nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, nbytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._found(given, made=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                self._found(tensor, made=True)
        return out


# --- exact -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["standard", "lite", "causal"])
@pytest.mark.parametrize("size", [(1, 64, 144), (5, 160, 48), (9, 64, 48)])
def test_tiled_equals_whole(kind: str, size: tuple[int, int, int]) -> None:
    model = nonzero(kind)
    latents = torch.randn(1, *model.latent_shape(*size), dtype=torch.double)
    features = model.first_frame_features(torch.randn(1, 3, 1, *size[1:], dtype=torch.double))
    contexts = model.decoder.contexts(features)
    noise = model.decoder.draw_noise(*size[1:], torch.Generator().manual_seed(0))
    whole, frames = model.decode(latents, features), latents.shape[2]
    for grid in ((2, 2), (1, 3)):
        for length in {frames} if kind == "standard" else {frames, 1}:
            stages = model.decoder.outer_stages
            found = foresee(stages, Workload(1, frames, size[1] // 8, size[2] // 8, 8), length, grid)
            assert len(found.windows) == grid[0] * grid[1]
            got = PlannedDecoder(model.decoder, found).whole(latents, contexts, noise)
            torch.testing.assert_close(got, whole, rtol=0, atol=1e-10)
        if kind != "standard":
            streamed = torch.cat(
                list(PlannedDecoder(model.decoder, found).stream(latents.split(1, dim=2), contexts, noise)), 2
            )
            torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 64, 144), (5, 160, 48), (9, 64, 48)])
def test_the_encoder_in_tiles_equals_the_whole(size: tuple[int, int, int]) -> None:
    model, video = nonzero("causal"), torch.randn(1, 3, *size, dtype=torch.double)
    whole = model.encode(video)
    for grid in ((2, 2), (1, 3)):
        for length in {whole.shape[2], 1}:
            work = Workload(1, whole.shape[2], size[1] // 8, size[2] // 8, 8)
            found = foresee(model.encoder.outer_stages, work, length, grid)
            torch.testing.assert_close(PlannedEncoder(model.encoder, found).whole(video), whole, rtol=0, atol=1e-10)
        chunks = [video[:, :, :1], *(video[:, :, 1:].split(4, dim=2) if size[0] > 1 else [])]
        streamed = torch.cat(list(PlannedEncoder(model.encoder, found).stream(chunks)), 2)
        torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["standard", "lite"])
def test_memory_reaches_the_plan(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that takes `memory`: a byte is refused, and with a little less than the whole needs, it is cut."""
    model, video = nonzero(kind, widths=(16, 16, 16, 32, 32)), torch.randn(1, 3, 5, 64, 128, dtype=torch.double)
    latents = model.encode(video)
    features = model.first_frame_features(video[:, :, :1])
    whole = model.decode(latents, features)
    plans: list[TilePlan] = []

    def seen(*args: Any) -> TilePlan:
        plans.append(plan_tiles(*args))
        return plans[-1]

    monkeypatch.setattr("fsae.planned.plan_tiles", seen)
    calls: list[tuple[Any, Tensor]] = [
        (lambda memory: model.encode(video, memory), latents),
        (lambda memory: torch.cat(list(model.encode_stream([video], memory)), 2), latents),
        (lambda memory: model.decode(latents, features, memory=memory), whole),
        (lambda memory: torch.cat(list(model.decode_stream(latents, features, memory=memory)), 2), whole),
        (lambda memory: model.first_frame_features(video[:, :, :1], memory)[3], features[3]),
    ]
    for call, want in calls:
        least_memory(call)
        plans.clear()
        call(None)
        (free,) = plans
        assert len(free.windows) == 1
        plans.clear()
        torch.testing.assert_close(call(free.nbytes - 1), want, rtol=0, atol=1e-10)
        (cut,) = plans
        assert len(cut.windows) > 1 or cut.latents < free.latents
        assert cut.nbytes < free.nbytes


@torch.no_grad()
def test_features_of_the_first_frame_in_tiles() -> None:
    model, image = nonzero("standard"), torch.randn(1, 3, 1, 96, 144, dtype=torch.double)
    whole = model.first_frame_features(image)
    memory = least_memory(lambda m: model.first_frame_features(image, memory=m))
    for got, want in zip(model.first_frame_features(image, memory=memory), whole, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@torch.no_grad()
def test_keys_and_values_are_made_once_for_all_tiles() -> None:
    model = nonzero("lite")
    latents = torch.randn(1, 8, 2, 4, 6, dtype=torch.double)
    image = torch.randn(1, 3, 1, 64, 96, dtype=torch.double)
    calls = []
    for stage in model.decoder.stages:
        if stage.injection is not None:
            stage.injection.to_k.register_forward_hook(lambda *_: calls.append(1))
    contexts = model.decoder.contexts(model.first_frame_features(image))
    tiles = foresee(model.decoder.outer_stages, Workload(1, 2, 8, 12, 8), 1, (2, 2))
    PlannedDecoder(model.decoder, tiles).whole(latents, contexts, model.decoder.draw_noise(64, 96, torch.Generator()))
    list(model.decode_stream(latents, image))
    assert len(calls) == 2 * 3


@torch.no_grad()
@pytest.mark.parametrize("depths", [(1, 1, 1, 1, 1), (3, 3, 3, 1, 1), (2, 1, 3, 1, 1)])
def test_the_halo_is_enough_and_a_cell_less_is_not(depths: tuple[int, ...]) -> None:
    model = nonzero("standard", decoder_depths=depths, encoder_depths=depths, noise=0.0, first_frame_injection=False)
    cells = 20
    x = torch.randn(1, 32, 1, 3, cells, dtype=torch.double)
    noise: list[list[Tensor]] = [[], [], []]
    whole = model.decoder.outer(x, None, noise)
    video = torch.randn(1, 3, 1, 24, cells * 8, dtype=torch.double)
    encoded = model.encoder.outer(video)[1]
    for stages, enough in ((model.decoder.outer_stages, True), (model.decoder.outer_stages, False)):
        halo = stages.halo - (not enough)
        (got,) = decoded_tiles(model, x, stages, halo)
        assert torch.allclose(got, whole, rtol=0, atol=1e-12) is enough
    for less, enough in ((0, True), (1, False)):
        stages = model.encoder.outer_stages

        def compute(_: int, window: Window) -> list[Tensor]:
            return [model.encoder.outer(window.scaled(8).crop(video))[1]]

        windows = (Window(0, 0, 3, 10), Window(0, 10, 3, 1), Window(0, 11, 3, 9))
        (got,) = tiled(windows, stages.halo - less, 3, cells, compute)
        assert torch.allclose(got, encoded, rtol=0, atol=1e-12) is enough


def decoded_tiles(model: FSAE, x: Tensor, stages: OuterStages, halo: int) -> list[Tensor]:
    def compute(_: int, window: Window) -> list[Tensor]:
        return [model.decoder.outer(window.crop(x), None, [[], [], []], window)]

    windows = (Window(0, 0, 3, 10), Window(0, 10, 3, 1), Window(0, 11, 3, 9))
    return tiled(windows, halo, *x.shape[3:], compute)


def test_the_halos_of_the_paper() -> None:
    with torch.device("meta"):
        model = FSAE.from_preset("standard")
    assert model.decoder.halo == 7
    assert model.encoder.outer_stages.halo == 5


@torch.no_grad()
def test_a_patch_with_its_borders_is_the_whole_frames() -> None:
    """What training on patches does: crop `inner`'s output, run `outer` there, look at the inside alone."""
    model = nonzero("standard")
    latents, image = torch.randn(2, 8, 3, 8, 9, dtype=torch.double), torch.randn(2, 3, 1, 128, 144, dtype=torch.double)
    decoder, features = model.decoder, model.first_frame_features(image)
    noise = decoder.draw_noise(128, 144, torch.Generator().manual_seed(0))
    x = decoder.inner(latents, features)
    whole = decoder.outer(x, features, noise)
    for window in (Window(3, 5, 9, 9), Window(0, 9, 8, 9)):
        patch = decoder.outer(window.crop(x), features, noise, window)
        inside = Window(window.top + 3 if window.top else 0, window.left + 3, window.height - 6, 3)
        got = inside.inside(window).scaled(8).crop(patch)
        torch.testing.assert_close(got, inside.scaled(8).crop(whole), rtol=0, atol=1e-10)


# --- the plan ----------------------------------------------------------------------------------------------------


def test_more_memory_is_fewer_tiles() -> None:
    stages = nonzero("standard").decoder.outer_stages
    video = Workload(1, 9, 12, 20, 4, 3 * 33 * 96 * 160)
    counts = []
    most = foresee(stages, video, 9, (1, 1)).nbytes
    least = least_memory(lambda memory: plan_tiles(stages, video, memory, "decode", 9))
    for memory in (*range(least, most, (most - least) // 7), most):
        found = plan_tiles(stages, video, memory, "decode", 9)
        assert found.nbytes <= memory
        counts.append(len(found.windows))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[3] > counts[-1] == 1
    with pytest.raises(UserError, match=rf"memory is {least - 1} bytes.*160x96 pixels and 9 latents.*least {least}"):
        plan_tiles(stages, video, least - 1, "decode", 9)


def test_windows_cover_the_frame_once() -> None:
    stages = nonzero("standard").decoder.outer_stages
    for grid in ((1, 1), (2, 3), (4, 5), (7, 1)):
        found = foresee(stages, Workload(1, 2, 7, 10, 4), 2, grid)
        seen = torch.zeros(7, 10)
        for window in found.windows:
            window.crop(seen).add_(1)
        assert bool((seen == 1).all())


def test_time_is_cut_before_space_where_it_can_be() -> None:
    for kind, latents, tiles in (("lite", 1, 1), ("causal", 1, 1), ("standard", 9, 4)):
        stages = nonzero(kind).decoder.outer_stages
        video = Workload(1, 9, 24, 40, 4, 3 * 33 * 192 * 320)
        memory = int(0.6 * foresee(stages, video, 9, (1, 1)).nbytes)
        found = plan_tiles(stages, video, memory, "decode", 9)
        assert found.latents < 9 if latents == 1 else found.latents == 9
        assert (len(found.windows) == 1) is (tiles == 1)


@pytest.mark.parametrize("preset", ["standard", "lite"])
@pytest.mark.parametrize(("frames", "side"), [(121, 1024), (1, 4096)])
def test_no_tensor_passes_two_to_the_31_at_full_size(preset: str, frames: int, side: int) -> None:
    with torch.device("meta"):
        model = FSAE.from_preset(preset)
    latents = 1 + (frames - 1) // 4
    work = Workload(1, latents, side // 8, side // 8, 2, 3 * frames * side * side)
    for stages in (model.decoder.outer_stages, model.encoder.outer_stages):
        if stages.widths[0] == 128 or frames > 1:
            assert foresee(stages, work, latents, (1, 1)).elements > MAX_ELEMENTS
        found = plan_tiles(stages, work, None, "decode", latents)
        assert found.elements <= MAX_ELEMENTS
        width, halo = stages.widths[0], stages.halo
        for window in found.windows:
            wide = window.grown(halo, side // 8, side // 8)
            made = 1 if frames == 1 else min(4 * found.latents, frames) + 2
            assert width * made * wide.height * wide.width * 64 <= MAX_ELEMENTS
    with pytest.raises(UserError, match="fewer at once"):
        plan_tiles(model.decoder.outer_stages, Workload(1, 31, 512, 512, 2, 3 * 121 * 4096**2), None, "decode", 31)


# --- what is foreseen is what is taken ---------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["standard", "lite", "causal"])
def test_peak_memory_is_as_foreseen(kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = nonzero(kind, dtype, widths=(16, 32, 32, 32, 32))
        latents, image = torch.randn(1, 8, 3, 8, 8).to(dtype), torch.randn(1, 3, 1, 128, 128).to(dtype)
        contexts = model.decoder.contexts(model.first_frame_features(image))
        noise = model.decoder.draw_noise(128, 128, torch.Generator())
        work = Workload(1, 3, 16, 16, latents.element_size(), 3 * 9 * 128 * 128)
        largest = []
        for grid in ((1, 1), (2, 3)):
            for length in (3,) if kind == "standard" else (3, 1):
                found = foresee(model.decoder.outer_stages, work, length, grid)
                with Memory() as memory:
                    PlannedDecoder(model.decoder, found).whole(latents, contexts, noise)
                check(memory, found)
                largest.append(memory.largest)
        assert largest == sorted(largest, reverse=True) or kind != "standard"
        assert largest[-1] < 0.8 * largest[0]


@torch.no_grad()
def test_peak_memory_of_the_encoder_and_of_streams_is_as_foreseen() -> None:
    model = nonzero("lite", torch.float32, widths=(16, 32, 32, 32, 32))
    video = torch.randn(1, 3, 9, 128, 128)
    for grid, length in (((1, 1), 3), ((1, 1), 1), ((2, 2), 3), ((2, 2), 1)):
        found = foresee(model.encoder.outer_stages, Workload(1, 3, 16, 16, 4), length, grid)
        with Memory() as memory:
            PlannedEncoder(model.encoder, found).whole(video)
        check(memory, found)
    noise = model.decoder.draw_noise(128, 128, torch.Generator())
    for grid in ((1, 1), (2, 2)):
        found = foresee(model.decoder.outer_stages, Workload(1, None, 16, 16, 4), 1, grid)
        peaks = []
        for count in (3, 7):
            latents = torch.randn(1, 8, count, 8, 8)
            with Memory() as memory:
                for piece in PlannedDecoder(model.decoder, found).stream([latents], None, noise):
                    del piece
            peaks.append(memory.peak)
        check(memory, found)
        assert peaks[1] <= 1.02 * peaks[0]  # more latents, no more memory


def planned_peaks(model: FSAE, video: Tensor, length: int, grid: tuple[int, int]) -> list[tuple[int, TilePlan]]:
    """Most bytes alive in training of the encoder and of the decoder, and the plans."""
    latents = 1 + (video.shape[2] - 1) // 4
    work = Workload(1, latents, *(side // 8 for side in video.shape[3:]), 4)
    stages = model.encoder.outer_stages
    plan = foresee_recomputed(stages, work, length, grid)
    with Memory() as memory:
        made = PlannedEncoder(model.encoder, plan).features(video, 2)[1]
        made.square().sum().backward()
    found = [(memory.peak, plan)]
    result = 3 * video[0, 0].numel()
    plan = foresee_recomputed(model.decoder.outer_stages, replace(work, result=result), length, grid)
    x = torch.randn(1, model.decoder.outer_stages.widths[-1], latents, *(side // 8 for side in video.shape[3:]))
    noise = model.decoder.draw_noise(*video.shape[3:], torch.Generator())
    with Memory() as memory:
        PlannedDecoder(model.decoder, plan).outer(x.requires_grad_(), None, noise).square().sum().backward()
    return [*found, (memory.peak, plan)]


@pytest.mark.parametrize("kind", ["causal", "lite"])
def test_peak_memory_of_training_is_as_foreseen(kind: str) -> None:
    model = nonzero(
        kind, torch.float32, widths=(16, 32, 32, 32, 32), encoder_depths=(2, 2, 2, 1, 1), decoder_depths=(3, 3, 3, 1, 1)
    )
    model.enable_gradient_checkpointing()
    video = torch.randn(1, 3, 17, 64, 96)
    for length, grid in ((5, (1, 1)), (5, (1, 2)), (2, (1, 1)), (2, (2, 2))):
        for peak, plan in planned_peaks(model, video, length, grid):
            assert 0.4 * plan.nbytes <= peak <= plan.nbytes


def check(memory: Memory, found: TilePlan) -> None:
    assert 0.5 * found.nbytes <= memory.peak <= found.nbytes
    assert memory.largest <= found.elements
