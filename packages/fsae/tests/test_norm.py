"""The pixel norm in training: the gradients of the plain form, and nothing kept but its input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fsae.layers import norm as norms
from fsae.layers.norm import PixelNorm


def drawn(affine: bool) -> PixelNorm:
    torch.manual_seed(0)
    norm = PixelNorm(6, affine=affine).double()
    for parameter in norm.parameters():
        parameter.data += torch.randn_like(parameter)
    return norm


def plain(norm: PixelNorm, x: Tensor) -> Tensor:
    made = x / (x.square().mean(1, keepdim=True) + norm.eps).sqrt()
    if norm.weight is None or norm.bias is None:
        return made
    shape = (1, -1, *(1,) * (x.ndim - 2))
    return made * norm.weight.view(shape) + norm.bias.view(shape)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("size", [(2, 6, 5, 3, 2), (2, 6, 3, 4), (3, 6)])
def test_gradients_are_those_of_the_plain_form(
    affine: bool, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsae.tiling.INSIDE", 200)  # two frames at a time
    norm, x = drawn(affine), torch.randn(size, dtype=torch.double, requires_grad=True)
    inputs = [x, *norm.parameters()]
    slope = torch.randn(size, dtype=torch.double)
    for got, want in zip(
        torch.autograd.grad(norm(x), inputs, slope), torch.autograd.grad(plain(norm, x), inputs, slope), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(lambda x, *_: norm(x), inputs)
    with torch.no_grad():
        assert torch.equal(norm(x), norm.forward(x.clone(), own=True))


def test_it_keeps_its_input_and_no_other_map() -> None:
    norm, x = PixelNorm(6), torch.randn(2, 6, 3, 4, 4).bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        made = norm(x)
    assert [t.data_ptr() for t in kept if t.numel() == x.numel()] == [x.data_ptr()]
    assert sum(t.numel() for t in kept) == x.numel() + x.numel() // 6 + 6
    made.float().square().sum().backward()
    assert made.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.bfloat16
    assert norm.weight is not None and norm.weight.grad is not None and norm.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_compile_change_nothing(dtype: torch.dtype) -> None:
    norm, x = drawn(True).float(), torch.randn(2, 6, 3, 4, 4).to(dtype)

    def gradients(call: object, autocast: bool) -> list[Tensor]:
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            made = call(given)  # type: ignore[operator]
        assert made.dtype == dtype
        return [made.detach(), *torch.autograd.grad(made.float().sin().sum(), [given, *norm.parameters()])]

    want = gradients(norm, autocast=False)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    for got in (gradients(norm, autocast=True), gradients(compiled, autocast=False)):
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
    wide = x.float().requires_grad_()
    for a, b in zip(
        want,
        [plain(norm, wide), *torch.autograd.grad(plain(norm, wide).sin().sum(), [wide, *norm.parameters()])],
        strict=True,
    ):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)


def test_a_clips_frames_are_taken_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a clip of eight frames, no fp32 form of more than two is made."""
    norm, x = PixelNorm(6), torch.randn(1, 6, 8, 4, 4).bfloat16().requires_grad_()
    monkeypatch.setattr("fsae.tiling.INSIDE", 2 * 6 * 16)
    sizes: list[int] = []
    wide = norms._wide
    monkeypatch.setattr(norms, "_wide", lambda t: sizes.append(t.shape[2]) or wide(t))  # type: ignore[func-returns-value]
    norm(x).sum().backward()
    assert set(sizes) == {2} and len(sizes) == 12
