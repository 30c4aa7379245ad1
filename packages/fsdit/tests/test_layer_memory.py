"""Layer Memory against its formula in float64, at its start, and where it must do nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsdit import FSDiT
from fsdit.layers.layer_memory import LayerRouter, mix_states, retrieve


def tiny(layers: int, **overrides: Any) -> FSDiT:
    return FSDiT.from_preset("tiny", num_layers=layers, ffn_dim=176, freq_dim=32, text_len=6, **overrides)


def random_model(layers: int, **overrides: Any) -> FSDiT:
    torch.manual_seed(3)
    model = tiny(layers, **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.normal_(std=0.3)
            elif parameter.ndim == 1 or "head" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return draw(2, 20, 3, 2, 2), torch.tensor([120.0, 733.5]), draw(2, 6, 32), draw(2, 5, 16)


# --- the formula, written once more and naively, with a stack and an einsum ---------------------------------------


def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return x if weight is None or bias is None else x * weight + bias


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turn(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Rotary positions as complex numbers; head width 32 gives 6 + 5 + 5 pairs."""
    positions = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))
    angles = [
        positions[:, axis : axis + 1] * 10000 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        for axis, pairs in enumerate((6, 5, 5))
    ]
    angle = torch.cat(angles, dim=1).unsqueeze(1)
    phase = torch.complex(angle.cos().float().double(), angle.sin().float().double())  # tables are rounded by design
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * phase).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v).flatten(2)


def reference(p: dict[str, Tensor], x: Tensor, t: Tensor, text: Tensor, image: Tensor) -> Tensor:
    def linear(name: str, value: Tensor) -> Tensor:
        return value @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def heads(value: Tensor) -> Tensor:
        return value.unflatten(-1, (2, 32))

    grid = tuple(x.shape[2:])
    frequencies = 10000 ** (-torch.arange(16, dtype=torch.float64) / 16)
    angles = t[:, None] * frequencies
    time = linear("time_embedding.2", F.silu(linear("time_embedding.0", torch.cat([angles.cos(), angles.sin()], 1))))
    six = linear("time_projection", F.silu(time)).unflatten(1, (6, 64))
    text = linear("text_embedding.2", F.gelu(linear("text_embedding.0", text), approximate="tanh"))
    image = norm(image, p["image_embedding.0.weight"], p["image_embedding.0.bias"], 1e-5)
    image = linear("image_embedding.3", F.gelu(linear("image_embedding.1", image)))
    image = norm(image, p["image_embedding.4.weight"], p["image_embedding.4.bias"], 1e-5)
    tokens = x.flatten(2).transpose(1, 2) @ p["patch_embedding.weight"].flatten(1).T + p["patch_embedding.bias"]

    states = [tokens]
    for i in range(sum(name.endswith("self_attn.to_q.weight") for name in p)):
        b = f"blocks.{i}."
        shift1, scale1, gate1, shift2, scale2, gate2 = (p[b + "modulation"] + six).unsqueeze(2).unbind(1)
        hidden = norm(states[-1]) * (1 + scale1) + shift1
        memory = hidden
        if i > 0:
            weights = linear(b + "router", hidden).softmax(-1)
            mixed = torch.einsum("bnl,lbnd->bnd", weights, torch.stack(states))
            memory = norm(mixed) * (1 + scale1) + shift1
        q = turn(heads(rms(linear(b + "self_attn.to_q", hidden), p[b + "self_attn.norm_q.weight"])), grid)
        k, v = linear(b + "self_attn.to_kv", memory).chunk(2, -1)
        k = turn(heads(rms(k, p[b + "self_attn.norm_k.weight"])), grid)
        out = states[-1] + gate1 * linear(b + "self_attn.to_out", attend(q, k, heads(v)))

        inner = norm(out, p[b + "norm3.weight"], p[b + "norm3.bias"])
        q = heads(rms(linear(b + "cross_attn.to_q", inner), p[b + "cross_attn.norm_q.weight"]))
        k, v = linear(b + "cross_attn.to_kv", text).chunk(2, -1)
        both = attend(q, heads(rms(k, p[b + "cross_attn.norm_k.weight"])), heads(v))
        k, v = linear(b + "cross_attn.to_kv_image", image).chunk(2, -1)
        both = both + attend(q, heads(rms(k, p[b + "cross_attn.norm_k_image.weight"])), heads(v))
        out = out + linear(b + "cross_attn.to_out", both)

        inner = norm(out) * (1 + scale2) + shift2
        states.append(out + gate2 * linear(b + "ffn.2", F.gelu(linear(b + "ffn.0", inner), approximate="tanh")))
    shift, scale = (p["head.modulation"] + time[:, None]).unsqueeze(2).unbind(1)
    return linear("head.head", norm(states[-1]) * (1 + scale) + shift).transpose(1, 2).unflatten(2, grid)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers", [4, 6])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_output_and_gradients_equal_the_formula(
    layers: int, dtype: torch.dtype, tolerance: float, checkpointing: bool
) -> None:
    model = random_model(layers).to(dtype)
    if checkpointing:
        model.enable_gradient_checkpointing()
    x, t, text, image = batch()
    out = model(x, t, text, image)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    (out * weight).sum().backward()

    p = {name: v.detach().double().requires_grad_() for name, v in model.named_parameters()}
    expected = reference(p, x.double(), t.double(), text.double(), image.double())
    (expected * weight).sum().backward()
    assert (out - expected).norm() / expected.norm() < tolerance
    largest = max(float(v.grad.norm()) for v in p.values())
    for name, parameter in model.named_parameters():
        error, size = float((parameter.grad - p[name].grad).norm()), float(p[name].grad.norm())
        floor = 1e-3 * largest if dtype == torch.float32 else 0.0  # below it, float32 cancels
        assert size > 0 and error < tolerance * max(size, floor), f"{name}: {error} of {size}"


def test_router_starts_with_one_weight_at_every_depth() -> None:
    for c in (1.0, 7.0):
        for states in range(2, 41):
            router = LayerRouter(16, states, c)
            weights = router(torch.randn(2, 5, 16))
            assert torch.allclose(weights[..., -1], torch.tensor(math.e**c / (math.e**c + 1)), rtol=1e-6)
            assert torch.allclose(weights.sum(-1), torch.ones(2, 5))


def deviation(memory_bias: float) -> float:
    """How far routers at their start move a model whose other weights are random."""
    plain = random_model(6, layer_memory=False)
    model = tiny(6, memory_bias=memory_bias)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all("router" in name for name in missing)
    with torch.no_grad():
        expected = plain(*batch())
        return float((model(*batch()) - expected).norm() / expected.norm())


def test_a_pretrained_model_is_left_as_it_is_with_c_7() -> None:
    assert deviation(7.0) < 1e-2
    assert deviation(1.0) > 1e-2  # the control: c = 1 is for training from scratch


def test_a_closed_gate_is_exact_and_learns() -> None:
    plain = random_model(5, layer_memory=False)
    model = tiny(5, memory_gate=True)
    model.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.weight"):
                parameter.normal_(std=0.3)
        assert torch.equal(model(*batch()), plain(*batch()))
    model(*batch()).square().sum().backward()
    for block in model.blocks[1:]:
        assert block.router.gate.grad.abs() > 0
        with torch.no_grad():
            block.router.gate.fill_(1.0)
    open_gates = random_model(5, layer_memory=False)
    ungated = tiny(5)
    ungated.load_state_dict({k: v for k, v in model.state_dict().items() if "gate" not in k})
    with torch.no_grad():
        assert torch.allclose(model(*batch()), ungated(*batch()), atol=1e-5)
        assert not torch.allclose(model(*batch()), open_gates(*batch()), atol=1e-2)


def test_a_router_of_the_newest_state_alone_is_exact() -> None:
    model = random_model(5)
    plain = tiny(5, layer_memory=False)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "router" not in k})
    with torch.no_grad():
        assert not torch.equal(model(*batch()), plain(*batch()))
        for block in model.blocks[1:]:
            block.router.weight.zero_()
            block.router.bias.fill_(-1e4)
            block.router.bias[-1] = 0.0
        assert torch.equal(model(*batch()), plain(*batch()))


def test_logits_stay_float32_under_autocast() -> None:
    router = LayerRouter(64, 4, 1.0)
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(2, 5, 64)
    expected = router(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(hidden), expected)
    assert router(hidden.bfloat16()).dtype == torch.float32


def test_mix_keeps_the_states_dtype_and_sums_in_float32() -> None:
    states = [torch.randn(1, 3, 8).bfloat16() for _ in range(4)]
    weights = torch.rand(1, 3, 4).softmax(-1)
    mixed = mix_states(states, weights)
    expected = torch.einsum("bnl,lbnd->bnd", weights.double(), torch.stack(states).double())
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, expected.bfloat16()) or (mixed - expected).abs().max() < 2**-8 * expected.abs().max()
    with pytest.raises(ValueError, match="4 router weights for 3 states"):
        mix_states(states[:3], weights)


# --- the two forms of the states -------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [True, False])
def test_a_buffer_in_inference_equals_separate_states_in_training(memory: bool) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = random_model(6, layer_memory=memory).to(dtype)
        trained = model(*batch()).detach()
        with torch.no_grad():
            sampled = model(*batch())
        assert (sampled - trained).norm() <= tolerance * trained.norm()


def test_retrieve_differentiates_as_autograd_would() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 4), (2, 1, 5), (2, 1, 5), *[(2, 3, 5)] * 4]
    weights, shift, scale, *states = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    )

    def function(weights: Tensor, shift: Tensor, scale: Tensor, *states: Tensor) -> Tensor:
        return retrieve(states, weights, shift, scale, 1e-6)

    assert torch.autograd.gradcheck(function, (weights, shift, scale, *states))
    frozen = [state.detach() for state in states[:3]]
    out = function(weights, shift, scale, *frozen, states[3])
    out.sum().backward()
    assert states[3].grad is not None and states[0].grad is None


def kept_numbers(layers: int, memory: bool) -> int:
    """Distinct numbers that autograd keeps for the backward pass of a model's forward."""
    model = random_model(layers, layer_memory=memory)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(*batch())
    del out
    return sum(kept.values())


def test_memory_grows_with_the_depth_and_not_with_its_square() -> None:
    plain = [kept_numbers(layers, False) for layers in (4, 8, 16)]
    ours = [kept_numbers(layers, True) for layers in (4, 8, 16)]
    extra = [with_memory - without for with_memory, without in zip(ours, plain, strict=True)]
    # A layer adds Ĥ, H as the router's input, and a weight for each state: the last alone is quadratic, and tiny.
    first, second = extra[1] - extra[0], extra[2] - extra[1]
    assert second < 2.2 * first
    assert ours[2] < 1.3 * plain[2]


def graphs(layers: int) -> list[int]:
    """Graphs that a compiler makes of a model's blocks in sampling, and then in training."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = random_model(layers).eval()
    with torch.no_grad():
        expected = model(*batch())
    counter, counts = CompileCounter(), []
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(model(*batch()), expected, atol=1e-5)
    counts.append(counter.frame_count)
    model(*batch()).sum().backward()
    torch._dynamo.reset()
    return [*counts, counter.frame_count - counts[0]]


@pytest.mark.slow
def test_compiled_it_is_the_same_and_depth_adds_no_graphs() -> None:
    # The first block's H and Ĥ are one tensor, so it has a graph of its own.
    assert graphs(3) == graphs(6) == [2, 2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_whole_model_compiles_with_its_gradients() -> None:
    torch._dynamo.reset()
    model = random_model(4)
    model(*batch()).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(*batch()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-3, atol=1e-4 * expected[name].abs().max()), name
    torch._dynamo.reset()
