"""The cheap paths of convolutions against the plain ones, float64: folded upsampling, group ends, one frame, parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fsae.tiling
from fsae import FSAE
from fsae.layers.blocks import EViTBlock, ResBlock
from fsae.layers.config import BlockStyle
from fsae.layers.conv import Kernel, TimeKind, VideoConv3d
from fsae.layers.norm import PixelNorm
from fsae.layers.resample import FOLDING_PAYS, Upsample
from fsae.streaming import FrameCache

KINDS: list[tuple[TimeKind, int, bool]] = [
    ("causal", 1, False),
    ("causal", 1, True),
    ("standard", 1, False),
    ("standard", 1, True),
    ("group_causal", 1, False),
    ("group_causal", 2, True),
    ("group_causal", 4, True),
    ("group_causal", 8, True),
]


def both_ways(up: Upsample, x: Tensor) -> tuple[Tensor, Tensor]:
    up.folded = False
    plain = up(x)
    up.folded = True
    return plain, up(x)


@pytest.mark.parametrize("channels", [(8, 4), (4, 4), (4, 8), (8, 2), (4, 3)])
@pytest.mark.parametrize(("time", "group", "double_time"), KINDS)
def test_folded_upsampling_equals_plain_up_to_the_borders(
    time: TimeKind, group: int, double_time: bool, channels: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    up = Upsample(*channels, BlockStyle(time, group), double_time=double_time).double()
    for frames in (1, 5, 9):
        for size in ((3, 5), (1, 1)):
            x = torch.randn(2, channels[0], frames, *size, dtype=torch.double)
            plain, folded = both_ways(up, x)
            assert plain.shape == (2, channels[1], 2 * frames - 1 if double_time else frames, 2 * size[0], 2 * size[1])
            torch.testing.assert_close(folded, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("time", "group", "double_time"), [kind for kind in KINDS if kind[0] != "standard"])
def test_folded_upsampling_streams(time: TimeKind, group: int, double_time: bool) -> None:
    torch.manual_seed(0)
    up = Upsample(8, 4, BlockStyle(time, group), double_time=double_time).double()
    x = torch.randn(1, 8, 9, 3, 4, dtype=torch.double)
    whole, _ = both_ways(up, x)
    step = max(group // 2, 1)
    for folded in (False, True):
        up.folded = folded
        for cuts in ([1] + [step] * (8 // step), [1 + step, 8 - step], [1, 8]):
            cache = FrameCache()
            parts = [up(part, cache) for part in x.split([cut for cut in cuts if cut], dim=2)]
            torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-12)


def test_gradients_of_the_folded_form_equal_the_plain() -> None:
    torch.manual_seed(0)
    for time, group, double_time in KINDS:
        up = Upsample(4, 4, BlockStyle(time, group), double_time=double_time).double()
        x = torch.randn(1, 4, 5, 3, 3, dtype=torch.double, requires_grad=True)
        plain, folded = both_ways(up, x)
        toward = torch.randn_like(plain)
        wrt = [x, up.conv.weight, up.conv.bias]
        want = torch.autograd.grad((plain * toward).sum(), wrt)
        for a, b in zip(torch.autograd.grad((folded * toward).sum(), wrt), want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_folding_is_for_eval_and_for_frames_of_some_size() -> None:
    class Seen(torch.overrides.TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.upsampled = False

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.upsampled |= getattr(func, "__name__", "") == "interpolate"
            return func(*args, **(kwargs or {}))

    up = Upsample(2, 2, BlockStyle("standard"), double_time=True)
    large, small = torch.randn(1, 2, 2, 32, FOLDING_PAYS // 32), torch.randn(1, 2, 2, 4, 4)
    for training, x, upsampled in ((True, large, True), (False, large, False), (False, small, True)):
        up.train(training)
        with Seen() as seen:
            up(x)
        assert seen.upsampled is upsampled
    up.eval()
    up.conv.weight.data += 1  # nothing is kept of the weights as they were
    plain, folded = both_ways(up, large)
    torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_group_ends_of_two_taps_equal_plain(group: int, groups: int) -> None:
    torch.manual_seed(0)
    conv = VideoConv3d(4, 4, Kernel(groups=groups), time="group_causal", group=group).double()
    for frames in (1, 5, 9):
        x = torch.randn(2, 4, frames, 4, 3, dtype=torch.double)
        plain = conv.train()(x)
        torch.testing.assert_close(conv.eval()(x), plain, rtol=0, atol=1e-12)
        cache = FrameCache()
        parts = [conv(part, cache) for part in (x[:, :, :1], *x[:, :, 1:].split(group, dim=2)) if part.shape[2]]
        torch.testing.assert_close(torch.cat(parts, 2), plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["standard", "lite", "causal"])
def test_a_folded_decoder_equals_its_plain_self(kind: Any) -> None:
    torch.manual_seed(0)
    widths = (4, 8, 8, 32, 32)
    model = FSAE(widths, (1,) * 5, (1,) * 5, latent_channels=8, decoder_kind=kind, injection_head_dim=4).double()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.eval()
    with torch.no_grad():
        for frames in (1, 9):
            video = torch.randn(1, 3, frames, 64, 96, dtype=torch.double)
            latents = model.encode(video)
            decoded = []
            for folded in (False, True):
                for module in model.modules():
                    if isinstance(module, Upsample):
                        module.folded = folded
                decoded.append(model.decode(latents, video[:, :, :1]))
            torch.testing.assert_close(decoded[1], decoded[0], rtol=0, atol=1e-10)
            plain = model.train().decode(latents, video[:, :, :1])
            torch.testing.assert_close(plain, decoded[0], rtol=0, atol=1e-10)
            model.eval()


@pytest.mark.parametrize(("time", "group"), [("causal", 1), ("standard", 1), ("group_causal", 1), ("group_causal", 2)])
def test_inner_blocks_give_the_same_some_frames_at_a_time(
    time: TimeKind, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    block = EViTBlock(32, BlockStyle(time=time, group=group)).double()
    x = torch.randn(1, 32, 7, 2, 3, dtype=torch.double)
    whole = block(x)
    for frames in (1, 2, 3):
        monkeypatch.setattr(fsae.tiling, "INSIDE", frames * 8 * 32 * 6)
        torch.testing.assert_close(block(x), whole, rtol=0, atol=1e-12)
        if time != "standard":
            cache = FrameCache()
            parts = [block(part, cache) for part in x.split([3, 4], dim=2)]
            torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-12)


def test_the_norm_in_place_is_the_norm() -> None:
    torch.manual_seed(0)
    for affine in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            norm, x = PixelNorm(8, affine=affine), torch.randn(2, 8, 3, 4, 4).to(dtype)
            if norm.weight is not None:
                norm.weight.data += torch.randn(8)
            kept = x.clone()
            want = norm(x)
            with torch.no_grad():
                assert torch.equal(norm(x), want)
                assert torch.equal(x, kept)
                assert torch.equal(norm(x, own=True), want)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("block", [ResBlock, EViTBlock])
def test_blocks_in_place_are_the_blocks(block: type[ResBlock | EViTBlock], autocast: bool) -> None:
    """Bit for bit, also where a residual of fp32 meets a branch of bf16, and what goes in stays as it was."""
    torch.manual_seed(0)
    layer, x = block(8, BlockStyle(head_dim=8, noise=0.5)), torch.randn(1, 8, 3, 8, 8)
    inputs = [x, torch.randn(1, 1, 1, 8, 8)] if block is ResBlock else [x]
    kept = x.clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = layer(*inputs)
        with torch.no_grad():
            got = layer(*inputs)
    assert got.dtype == want.dtype == torch.float32
    assert torch.equal(got, want)
    assert torch.equal(x, kept)


def test_a_single_precision_cpu_convolution_is_the_librarys() -> None:
    torch.manual_seed(0)
    conv = VideoConv3d(3, 5, time="standard")
    x = torch.randn(1, 3, 5, 16, 16, requires_grad=True)
    padded = torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2)
    plain = torch.nn.functional.conv3d(padded, conv.weight, conv.bias, padding=conv.padding)
    torch.testing.assert_close(conv(x), plain, rtol=1e-5, atol=1e-5)
    want = torch.autograd.grad(plain.square().sum(), [x, conv.weight], retain_graph=True)
    for a, b in zip(torch.autograd.grad(conv(x).square().sum(), [x, conv.weight]), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["standard", "lite"])
def test_what_stages_and_blocks_give_is_not_overwritten_later(kind: Any) -> None:
    """Hooks keep it: distillation looks at a teacher's stages, others at blocks."""
    torch.manual_seed(0)
    model = FSAE.from_preset("tiny", decoder_kind=kind).eval()
    seen: list[tuple[Tensor, Tensor]] = []
    for stage in model.decoder.stages:
        for layer in (stage, *stage.blocks):
            layer.register_forward_hook(lambda _module, _inputs, out: seen.append((out, out.clone())))
    model(torch.randn(1, 3, 5, 64, 64))
    assert len(seen) > 14
    assert all(torch.equal(out, kept) for out, kept in seen)
