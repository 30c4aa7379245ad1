"""The Triton kernels, run by Triton's interpreter on the CPU, against the plain form and against float64.

Triton decides when it is imported whether it interprets, so these cases have a process of their own: `test_kernels.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fsdit import FSDiT
from fsdit.kernels import layer_memory as kernels
from fsdit.layers.layer_memory import LayerRouter, mix_states
from fsdit.layers.modulation import modulate

EPS = 1e-6

# Batch, tokens, channels, states: none divides a block of 16 tokens or 128 channels but the last.
SHAPES = [(1, 1, 8, 2), (2, 19, 200, 5), (3, 7, 48, 17), (1, 33, 130, 39), (2, 16, 128, 4)]


def random_router(dim: int, states: int, gate: bool) -> LayerRouter:
    router = LayerRouter(dim, states, 1.0, gate)
    with torch.no_grad():
        router.weight.normal_(std=2 / dim**0.5)
        router.bias.normal_()
        if router.gate is not None:
            router.gate.fill_(0.7)
    return router


def inputs(batch: int, tokens: int, dim: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A buffer of states with more planes than are filled, shift and scale."""
    generator = torch.Generator().manual_seed(count)
    states = torch.randn(count + 2, batch, tokens, dim, generator=generator).to(dtype)
    states[count:] = float("nan")
    shift, scale = torch.randn(2, batch, 1, dim, generator=generator)
    return states, shift, scale


@torch.no_grad()
def plain(states: Tensor, shift: Tensor, scale: Tensor, router: LayerRouter) -> tuple[Tensor, Tensor, Tensor]:
    hidden = modulate(states[-1], shift, scale, EPS)
    weights = router(hidden)
    return hidden, weights, modulate(mix_states(states, weights), shift, scale, EPS)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("batch, tokens, dim, count", SHAPES)
def test_equal_to_the_plain_form(batch: int, tokens: int, dim: int, count: int, gate: bool) -> None:
    states, shift, scale = inputs(batch, tokens, dim, count, torch.float32)
    router = random_router(dim, count, gate)
    with torch.no_grad():
        hidden, weights = kernels.route(states[count - 1], shift, scale, EPS, router)
        memory = kernels.retrieve(states[:count], weights, shift, scale, EPS)
    for ours, expected in zip((hidden, weights, memory), plain(states[:count], shift, scale, router), strict=True):
        assert ours.dtype == expected.dtype and ours.shape == expected.shape
        assert (ours - expected).abs().max() < 2e-5 * expected.abs().max()


def test_bfloat16_states_are_summed_in_float32() -> None:
    count = 12
    states, shift, scale = inputs(2, 19, 200, count, torch.bfloat16)
    router = random_router(200, count, False)
    exact = plain(states[:count].double(), shift.double(), scale.double(), router)
    with torch.no_grad():
        hidden, weights = kernels.route(states[count - 1], shift, scale, EPS, router)
        memory = kernels.retrieve(states[:count], exact[1], shift, scale, EPS)
        rounded = router(hidden)  # of the same rounded H
    assert hidden.dtype == memory.dtype == torch.bfloat16 and weights.dtype == torch.float32
    assert (weights - rounded).abs().max() < 1e-5
    ulp = 2**-7  # the interpreter cuts bfloat16 off where a GPU rounds
    assert ((hidden - exact[0]).abs() <= ulp * exact[0].abs() + 1e-6).all()
    # X̂ is rounded once, as a state is, and Ĥ once more.
    assert ((memory - exact[2]).abs() / (exact[2].abs() + 1)).max() < 3 * ulp


def test_one_shift_serves_a_batch_and_planes_may_lie_apart() -> None:
    states, shift, scale = inputs(2, 5, 24, 3, torch.float32)
    router = random_router(24, 3, False)
    apart = torch.empty(6, 2, 5, 24)[::2]
    apart.copy_(states[:3])
    with torch.no_grad():
        hidden, weights = kernels.route(apart[2], shift[:1], scale[:1], EPS, router)
        memory = kernels.retrieve(apart, weights, shift[:1], scale[:1], EPS)
    expected = plain(states[:3], shift[:1], scale[:1], router)
    assert torch.allclose(hidden, expected[0], atol=1e-5) and torch.allclose(memory, expected[2], atol=1e-5)


def test_a_model_runs_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"dim": 64, "ffn_dim": 96, "num_heads": 2, "num_layers": 5, "freq_dim": 32}
    model = FSDiT(**sizes, text_dim=8, text_len=6, image_dim=8, latent_channels=4).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    arguments = torch.randn(2, 12, 3, 2, 3), torch.tensor([100.0, 700.0]), torch.randn(2, 6, 8), torch.randn(2, 5, 8)
    calls = []
    original = kernels.retrieve
    monkeypatch.setattr(kernels, "retrieve", lambda states, *rest: calls.append(len(states)) or original(states, *rest))
    with torch.no_grad():
        expected = model(*arguments)
        assert calls == []  # "auto" takes the plain form without a GPU
        model.set_memory_kernel("fused")
        fused = model(*arguments)
        assert calls == [2, 3, 4, 5]
        model.set_memory_kernel("plain")
        assert torch.equal(model(*arguments), expected) and len(calls) == 4
    assert (fused - expected).norm() < 1e-5 * expected.norm()


def test_they_are_interpreted() -> None:
    assert type(kernels._retrieve).__name__ == "InterpretedFunction"
