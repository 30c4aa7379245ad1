"""Causal -> Standard -> Lite: what stays equal, what is approximated and how well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsae import FSAE
from fsae.errors import UserError
from fsae.layers.motion import FirstFrameSampling
from fsae.storage.foreign import Report
from fsae.weights import slicing
from fsae.weights.inflation import center_kernel, inflate
from fsae.weights.slicing import Moments, kept_channels
from fsae.weights.variants import to_lite, to_standard

SIZES: dict[str, Any] = {
    "widths": (8, 16, 32, 32),
    "encoder_depths": (1,) * 4,
    "decoder_depths": (2, 1, 1, 1),
    "latent_channels": 16,
    "injection_head_dim": 8,
    "decoder_kind": "causal",
    "first_frame_injection": False,
    "noise": 0.0,
}


def causal(seed: int = 0, **overrides: Any) -> FSAE:
    """A small causal model, 8 pixels a cell, with no parameter left at zero or one."""
    torch.manual_seed(seed)
    model = FSAE(**(SIZES | overrides)).double()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def static_clip(frames: int) -> Tensor:
    torch.manual_seed(7)
    return torch.randn(1, 3, 1, 16, 24, dtype=torch.double).expand(-1, -1, frames, -1, -1)


# --- causal -> Standard ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_standard_equals_causal_on_an_image_and_a_static_clip() -> None:
    model = causal()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = to_standard(model, noise=0.0)
    assert (result.config.decoder_kind, result.config.first_frame_injection) == ("standard", True)
    for frames in (1, 9):
        clip = static_clip(frames)
        latents = model.encode(clip)
        assert torch.equal(result.encode(clip), latents)
        want = model.decode(latents)
        for first_frame in (None, clip[:, :, :1]):
            torch.testing.assert_close(result.decode(latents, first_frame), want, rtol=1e-10, atol=1e-10)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert (model.config.decoder_kind, result.training) == ("causal", model.training)
    assert not {tensor.data_ptr() for tensor in after.values()} & {t.data_ptr() for t in result.state_dict().values()}


@torch.no_grad()
def test_standard_stays_close_on_motion_where_other_padding_alone_shifts_every_frame() -> None:
    model = causal()
    inflate(model)
    clip = torch.randn(1, 3, 9, 16, 16, dtype=torch.double)
    latents = model.encode(clip)
    want = model.decode(latents)
    result = to_standard(model, noise=0.0)
    # Kernels that look at the present alone still do: frame by frame the same video.
    torch.testing.assert_close(result.decode(latents), want, rtol=1e-10, atol=1e-10)
    shifted = to_standard(model, noise=0.0)
    shifted.load_state_dict(model.state_dict(), strict=False)
    assert (shifted.decode(latents) - want).abs().max() > 1e-2
    kernel = torch.randn(2, 3, 3, 1, 1)
    frames = torch.randn(3)
    # The causal kernel over (a, a, b) is the centred one over (a, b, anything).
    past, present, future = frames
    causal_sum = torch.einsum("oithw,t->oihw", kernel, torch.stack([past, past, present]))
    centred = torch.einsum("oithw,t->oihw", center_kernel(kernel), torch.stack([past, present, future]))
    torch.testing.assert_close(centred, causal_sum)


@torch.no_grad()
def test_the_injection_is_added_as_the_identity_and_can_learn() -> None:
    model = causal()
    result = to_standard(model, seed=3, injection_reach=8.0)
    assert result.config.injection_reach == 8.0 and result.config.noise == 0.05
    injections = [stage.injection for stage in result.decoder.stages if stage.injection is not None]
    assert len(injections) == 2
    assert all(not injection.to_out.weight.any() and not injection.to_out.bias.any() for injection in injections)
    clip = torch.randn(1, 3, 5, 16, 16, dtype=torch.double)
    latents = result.encode(clip)
    assert torch.equal(result.decode(latents, clip[:, :, :1]), result.decode(latents))
    with torch.enable_grad():
        result.decode(latents, clip[:, :, :1]).square().mean().backward()
    assert all(bool(injection.to_out.weight.grad.abs().max() > 0) for injection in injections)
    same, other = to_standard(model, seed=3, injection_reach=8.0), to_standard(model, seed=4, injection_reach=8.0)
    weights = [m.decoder.stages[2].injection.to_q.weight for m in (result, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    bare = to_standard(model, first_frame_injection=False)
    assert all(stage.injection is None for stage in bare.decoder.stages)


@torch.no_grad()
def test_an_injection_that_a_causal_model_has_is_kept_or_left_out() -> None:
    model = causal(first_frame_injection=True)
    for stage in model.decoder.stages[2:]:
        torch.nn.init.normal_(stage.injection.to_out.weight)
    clip = static_clip(5)
    latents = model.encode(clip)
    kept = to_standard(model, noise=0.0)
    want = model.decode(latents, clip[:, :, :1])
    torch.testing.assert_close(kept.decode(latents, clip[:, :, :1]), want, rtol=1e-10, atol=1e-10)
    bare = to_standard(model, noise=0.0, first_frame_injection=False)
    torch.testing.assert_close(bare.decode(latents), model.decode(latents), rtol=1e-10, atol=1e-10)


# --- Standard -> Lite --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_lite_of_the_same_widths_equals_standard_on_images_and_keeps_the_kernels() -> None:
    model = to_standard(causal(), noise=0.05)
    for stage in model.decoder.stages:
        if isinstance(stage.injection, FirstFrameSampling):
            torch.nn.init.ones_(stage.injection.strength)
        elif stage.injection is not None:
            torch.nn.init.normal_(stage.injection.to_out.weight)
    lite = to_lite(model, model.config.widths)
    assert (lite.config.decoder_kind, lite.config.noise) == ("lite", 0.05)
    before, after = model.state_dict(), lite.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    for frames in (1, 9):
        clip = static_clip(frames)
        latents = model.encode(clip)
        want = model.decode(latents, clip[:, :, :1])
        torch.testing.assert_close(lite.decode(latents, clip[:, :, :1]), want, rtol=1e-10, atol=1e-10)
    # A fresh Standard decoder has not learned to look ahead, so that groups change nothing yet; a trained one has.
    moving = torch.randn(1, 16, 3, 1, 1, dtype=torch.double)
    torch.testing.assert_close(lite.decode(moving), model.decode(moving), rtol=1e-10, atol=1e-10)
    for layer in model.decoder.modules():
        if getattr(layer, "kernel_size", (1,))[0] == 3:
            layer.weight[:, :, 2] = 0.3 * torch.randn_like(layer.weight[:, :, 2])
    lite = to_lite(model, model.config.widths)
    torch.testing.assert_close(lite.decode(moving[:, :, :1]), model.decode(moving[:, :, :1]), rtol=1e-10, atol=1e-10)
    assert (lite.decode(moving) - model.decode(moving)).abs().max() > 1e-3


@torch.no_grad()
def test_shortcuts_pass_where_both_widths_are_halved_and_keep_their_mean_where_one_is() -> None:
    model = to_standard(causal(), noise=0.0)
    for s in (0, 1):
        torch.nn.init.zeros_(model.decoder.stages[s].up.conv.weight)
    old, new = model.config.widths, (4, 8, 32, 32)
    latents = torch.randn(2, 16, 1, 2, 2, dtype=torch.double)
    moments = Moments()
    with moments.watching(model.decoder, 3):
        model.decode(latents)
    kept = kept_channels(model.decoder, old, new, moments)
    assert kept[1].tolist() == [feeder for c in kept[0].tolist() for feeder in (2 * c, 2 * c + 1)]
    assert all(kept[s].tolist() == list(range(old[s])) for s in (2, 3))
    lite = to_lite(model, latents=latents)
    assert tuple(lite.config.decoder_widths) == new
    fine = torch.randn(1, 16, 3, 4, 6, dtype=torch.double)
    whole = model.decoder.stages[0].up(fine)[:, kept[0]]
    torch.testing.assert_close(lite.decoder.stages[0].up(fine[:, kept[1]]), whole, rtol=1e-12, atol=1e-12)
    coarse = torch.randn(1, 32, 3, 4, 6, dtype=torch.double)
    whole, sliced = model.decoder.stages[1].up(coarse)[:, kept[1]], lite.decoder.stages[1].up(coarse)
    assert (whole - sliced).abs().max() > 0.1
    mean = [F.avg_pool3d(video, (1, 2, 2)) for video in (whole, sliced)]
    torch.testing.assert_close(mean[1], mean[0], rtol=1e-12, atol=1e-12)


def test_kernels_take_on_what_dropped_channels_gave() -> None:
    torch.manual_seed(0)
    kept = torch.tensor([0, 2, 3])
    x = torch.randn(5, 400, dtype=torch.double)
    mixing = torch.randn(2, 3, dtype=torch.double)
    x[[1, 4]] = mixing @ x[kept]
    kernel = torch.randn(6, 5, 3, 3, 3, dtype=torch.double)
    folded = slicing._fold_in(kernel, kept, x @ x.T / x.shape[1])
    want = torch.einsum("oithw,in->onthw", kernel, x)
    got = torch.einsum("oithw,in->onthw", folded, x[kept])
    plain = torch.einsum("oithw,in->onthw", kernel[:, kept], x[kept])
    assert (got - want).norm() < 0.01 * want.norm() < (plain - want).norm()
    # A layer that saw only zeros is sliced.
    torch.testing.assert_close(slicing._fold_in(kernel, kept, torch.zeros(5, 5).double()), kernel[:, kept])


def with_quiet_channels(seed: int) -> tuple[FSAE, Tensor]:
    """A Standard model half of whose channels, from latents to last norm, are nearly silent; and the latents' levels.

    All shortcuts copy channels 4c to 4c + 3 of the inner stages to 2c and 2c + 1 of stage 1 and to c of stage 0, and
    latents 2c and 2c + 1 to the inner ones.
    """
    model = to_standard(causal(seed), noise=0.0)
    quiet = torch.randperm(8)[:4]
    for s, stage in enumerate(model.decoder.stages):
        factor = 2 ** min(2, s)
        channels = (factor * quiet.unsqueeze(1) + torch.arange(factor)).flatten()
        writers = [norm for name, norm in stage.named_modules() if name.endswith("norm")]
        writers.append(model.decoder.conv_in if stage.up is None else stage.up.conv)
        for writer in writers:
            writer.weight.data[channels] *= 0.02
            writer.bias.data[channels] *= 0.02
    # What the shortcut to stage 1 loses is the same for all choices and not measured here.
    model.decoder.stages[1].up.conv.weight.data *= 10
    level = torch.ones(16, dtype=torch.double)
    level[2 * quiet] = level[2 * quiet + 1] = 0.02
    return model, level.view(1, 16, 1, 1, 1)


@torch.no_grad()
def test_channels_chosen_by_magnitude_beat_channels_chosen_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded against the Standard decoder, on latents that the choice did not see."""

    def error(model: FSAE, level: Tensor) -> float:
        torch.manual_seed(9)
        lite = to_lite(model, latents=level * torch.randn(8, 16, 1, 2, 2, dtype=torch.double))
        latents = level * torch.randn(1, 16, 3, 2, 2, dtype=torch.double)
        want = model.decode(latents)
        return float((lite.decode(latents) - want).norm() / want.norm())

    models = [with_quiet_channels(seed) for seed in range(3)]
    chosen = [error(*model) for model in models]
    generator = torch.Generator().manual_seed(0)
    widths = SIZES["widths"]
    monkeypatch.setattr(slicing, "_magnitude", lambda _d, s, _m: torch.rand(widths[s], generator=generator))
    by_chance = [error(*model) for model in models for _ in range(3)]
    assert sum(chosen) / len(chosen) < 0.5 * sum(by_chance) / len(by_chance)


@torch.no_grad()
def test_causal_goes_to_lite_through_standard_and_other_latents_may_choose() -> None:
    model = causal()
    lite = to_lite(model)
    assert (lite.config.decoder_kind, tuple(lite.config.decoder_widths)[:3]) == ("lite", (4, 8, 32))
    video = lite.decode(torch.randn(1, 16, 2, 1, 1, dtype=torch.double))
    assert video.shape == (1, 3, 5, 8, 8) and bool(video.isfinite().all())
    torch.manual_seed(1)
    other = to_lite(model, latents=5 * torch.randn(1, 16, 1, 1, 1))
    assert not torch.equal(other.decoder.conv_out.weight, lite.decoder.conv_out.weight)
    again = to_lite(model)
    assert all(torch.equal(a, b) for a, b in zip(lite.state_dict().values(), again.state_dict().values(), strict=True))
    report = Report.compare(to_standard(model), lite)
    assert report.parameters("carried") == sum(parameter.numel() for parameter in lite.parameters())
    assert report.parameters("new") == 0 < report.parameters("dropped", "decoder")
    assert report.parameters("dropped", "encoder") == 0


def test_dtype_and_mode_are_the_models() -> None:
    model = causal().to(torch.bfloat16).train()
    for result in (to_standard(model), to_lite(model)):
        assert (result.dtype, result.training) == (torch.bfloat16, True)
        assert all(parameter.requires_grad for parameter in result.parameters())


# --- what is refused ---------------------------------------------------------------------------------------------


def test_wrong_kinds_and_widths_are_refused() -> None:
    model = causal()
    standard = to_standard(model)
    lite = to_lite(standard)
    outer = list(SIZES["widths"])
    for build, word in (
        (lambda: to_standard(standard), "decoder is standard"),
        (lambda: to_standard(lite), "decoder is lite"),
        (lambda: to_lite(lite), "decoder is lite"),
        (lambda: to_standard(model, injection_head=4), "nearest: 'injection_head_dim'"),
        (lambda: to_standard(model, injection_head_dim=6), "head_dim is 6"),
        (lambda: to_lite(standard, (4, 8)), "2 decoder widths"),
        (lambda: to_lite(standard, (16, *outer[1:])), "can only become narrower"),
        (lambda: to_lite(standard, (0, *outer[1:])), "can only become narrower"),
        (lambda: to_lite(standard, (4, 8, 16, *outer[3:])), "keeps its width"),
        (lambda: to_lite(standard, (*outer[:3], 16)), "keeps its width"),
        (lambda: to_lite(standard, (4, 6, *outer[2:])), "do not divide"),
    ):
        with pytest.raises(UserError, match=word):
            build()
