"""The Triton kernels, run by Triton's interpreter on the CPU, against the plain form and against float64.

Triton decides when it is imported whether it interprets, so these cases have a process of their own: `test_kernels.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsdit import FSDiT
from fsdit.kernels import layer_memory as kernels
from fsdit.layers import layer_memory as plain
from fsdit.layers.layer_memory import LayerRouter
from fsdit.model import MemoryKernel

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
def run(form: Any, states: Tensor, shift: Tensor, scale: Tensor, router: LayerRouter) -> tuple[Tensor, Tensor]:
    hidden = form.modulate(states[-1], shift, scale, EPS)
    return hidden, form.retrieve(states, router(hidden), shift, scale, EPS)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("batch, tokens, dim, count", SHAPES)
def test_equal_to_the_plain_form(batch: int, tokens: int, dim: int, count: int, gate: bool) -> None:
    states, shift, scale = inputs(batch, tokens, dim, count, torch.float32)
    given = states[:count], shift, scale, random_router(dim, count, gate)
    for ours, expected in zip(run(kernels, *given), run(plain, *given), strict=True):
        assert ours.dtype == expected.dtype and ours.shape == expected.shape
        assert (ours - expected).abs().max() < 2e-5 * expected.abs().max()


def test_bfloat16_states_are_summed_in_float32() -> None:
    count = 12
    states, shift, scale = inputs(2, 19, 200, count, torch.bfloat16)
    exact_states, *exact_modulation = states[:count].double(), shift.double(), scale.double()
    with torch.no_grad():
        exact_hidden = plain.modulate(exact_states[-1], *exact_modulation, EPS)
        weights = random_router(200, count, False).double()(exact_hidden)
        exact_memory = plain.retrieve(exact_states, weights, *exact_modulation, EPS)
        hidden = kernels.modulate(states[count - 1], shift, scale, EPS)
        memory = kernels.retrieve(states[:count], weights, shift, scale, EPS)
    assert hidden.dtype == memory.dtype == torch.bfloat16
    ulp = 2**-7  # the interpreter cuts bfloat16 off where a GPU rounds
    assert ((hidden - exact_hidden).abs() <= ulp * exact_hidden.abs() + 1e-6).all()
    # X̂ is rounded once, as a state is, and Ĥ once more.
    assert ((memory - exact_memory).abs() / (exact_memory.abs() + 1)).max() < 3 * ulp


def test_one_shift_serves_a_batch_and_planes_may_lie_apart() -> None:
    states, shift, scale = inputs(2, 5, 24, 3, torch.float32)
    router = random_router(24, 3, False)
    apart = torch.empty(6, 2, 5, 24)[::2]
    apart.copy_(states[:3])
    ours = run(kernels, apart, shift[:1], scale[:1], router)
    for found, expected in zip(ours, run(plain, states[:3], shift[:1], scale[:1], router), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


# --- training ----------------------------------------------------------------------------------------------------


class Naive:
    """The formula in functions that autograd differentiates itself."""

    @staticmethod
    def record(states: Sequence[Tensor], x: Tensor) -> Sequence[Tensor]:
        return *states, x

    @staticmethod
    def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift

    @classmethod
    def retrieve(cls, states: Sequence[Tensor], weights: Tensor, *modulation: Any) -> Tensor:
        return cls.modulate(torch.einsum("bnl,lbnd->bnd", weights, torch.stack(tuple(states))), *modulation)


class Layers(torch.nn.Module):
    """X_6 of three layers without a router and three with one, whose states have a part of their own each."""

    def __init__(self, batch: int, tokens: int, dim: int, gate: bool) -> None:
        super().__init__()
        parts, (shift, scale) = torch.randn(4, batch, tokens, dim), 0.2 * torch.randn(2, 1 if gate else batch, 1, dim)
        self.parts = torch.nn.ParameterList(part.bfloat16().float() for part in parts)
        self.shift, self.scale = torch.nn.Parameter(shift), torch.nn.Parameter(scale)
        self.routers = torch.nn.ModuleList(random_router(dim, states, gate) for states in (2, 4, 6))

    def forward(self, form: Any, dtype: torch.dtype) -> Tensor:
        states = form.record((), self.parts[0].to(dtype))
        for router, part in zip(self.routers, self.parts[1:], strict=True):
            states = form.record(states, torch.sin(0.5 * states[-1]) + part.to(dtype))
            hidden = form.modulate(states[-1], self.shift, self.scale, EPS)
            memory = form.retrieve(states, router(hidden), self.shift, self.scale, EPS)
            states = form.record(states, states[-1] + 0.3 * torch.tanh(hidden) * memory)
        last: Tensor = states[-1]
        return last

    def results(self, form: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        """The output and all gradients, when all and then some have been taken of the same graph before."""
        out = self(form, dtype)
        loss = (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum()
        loss.backward(retain_graph=True)
        torch.autograd.grad(loss, [self.routers[2].bias, self.parts[2]], retain_graph=True)
        self.zero_grad()
        loss.backward()
        return {"out": out.detach()} | {name: p.grad.clone() for name, p in self.named_parameters()}


@pytest.mark.parametrize("shape, gate", [((1, 1, 8), True), ((2, 9, 136), False), ((3, 3, 48), True)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])  # cut off, see above
def test_gradients_equal_float64(dtype: torch.dtype, tolerance: float, shape: tuple[int, int, int], gate: bool) -> None:
    """Tokens of the shape `B N D`."""
    torch.manual_seed(0)
    layers = Layers(*shape, gate)
    found = layers.results(kernels, dtype)
    exact = layers.double().results(Naive, torch.float64)
    floor = 0.01 * max(value.norm() for value in exact.values())  # below it, the terms cancel
    for name, expected in exact.items():
        assert (found[name] - expected).norm() < tolerance * max(expected.norm(), floor), name


def tiny_model() -> tuple[FSDiT, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    context = {"text_dim": 8, "text_len": 6, "image_dim": 8}
    model = FSDiT.from_preset("tiny", ffn_dim=96, num_layers=5, freq_dim=32, **context, latent_channels=4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model, (
        torch.randn(2, 12, 3, 1, 2),
        torch.tensor([100.0, 700.0]),
        torch.randn(2, 6, 8),
        torch.randn(2, 5, 8),
    )


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that the kernels' `retrieve` adds its numbers of states to."""
    calls: list[int] = []
    original = kernels.retrieve
    monkeypatch.setattr(kernels, "retrieve", lambda states, *rest: calls.append(len(states)) or original(states, *rest))
    return calls


def test_a_model_runs_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = tiny_model()
    calls = watch(monkeypatch)
    with torch.no_grad():
        expected = model(*arguments)
        assert calls == []  # "auto" takes the plain form without a GPU
        model.set_memory_kernel("fused")
        fused = model(*arguments)
        assert calls == [2, 3, 4, 5]
        model.set_memory_kernel("plain")
        assert torch.equal(model(*arguments), expected) and len(calls) == 4
    assert (fused - expected).norm() < 1e-5 * expected.norm()


FROZEN = ("patch_embedding", "blocks.0.", "blocks.1.", "time", "image", "text")


@pytest.mark.parametrize("checkpointing, frozen", [(False, ()), (True, ()), (False, FROZEN)])
def test_a_model_trains_on_them(monkeypatch: pytest.MonkeyPatch, checkpointing: bool, frozen: tuple[str, ...]) -> None:
    model, arguments = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    if checkpointing:
        model.enable_gradient_checkpointing()
    calls = watch(monkeypatch)

    def step(kernel: MemoryKernel) -> dict[str, Tensor]:
        stepped = deepcopy(model)
        stepped.set_memory_kernel(kernel)
        optimizer = torch.optim.SGD([p for p in stepped.parameters() if p.requires_grad], lr=0.01)
        stepped(*arguments).square().mean().backward()
        optimizer.step()
        return {name: p.detach() - model.get_parameter(name).detach() for name, p in stepped.named_parameters()}

    expected = step("auto")
    assert calls == []
    changes = step("fused")
    assert calls == [2, 3, 4, 5] + [5, 4, 3, 2] * checkpointing
    largest = max(change.norm() for change in expected.values())
    for name, change in changes.items():
        assert bool(change.any()) != name.startswith(frozen or ("none",)), name
        assert (change - expected[name]).norm() <= 1e-4 * max(expected[name].norm(), 1e-3 * largest), name


def test_a_state_holds_what_later_layers_left_no_longer_than_it_needs() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, requires_grad=True)
    states = kernels.record((), x)
    states = kernels.record(states, 2 * states[-1])
    kernels.retrieve(states, torch.rand(1, 3, 2), *torch.zeros(2, 1, 1, 8), EPS).square().sum().backward()
    assert states.owed == ({}, {})
    with pytest.raises(ValueError, match="all have one dtype"):
        kernels.record(states, x.bfloat16())


def test_they_are_interpreted() -> None:
    assert type(kernels._forward).__name__ == "InterpretedFunction"
