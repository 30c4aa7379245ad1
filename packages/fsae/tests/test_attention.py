"""First-frame injection against a formula written pair by pair in float64, and the claims made for its start."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from fsae.layers.attention import THETA, FirstFrameAttention
from fsae.layers.config import Injection


def brute_force(layer: FirstFrameAttention, x: Tensor, first: Tensor, window: int) -> Tensor:
    """Each query alone: rotary scores to every context cell of its window, softmax, sum."""
    batch, channels, frames, height, width = x.shape
    head, quarter = layer.head_dim, layer.head_dim // 4

    def normed(norm: torch.nn.Module, v: Tensor) -> Tensor:
        return v / (v.square().mean() + 1e-5).sqrt() * norm.weight + norm.bias

    def angle(cell: tuple[float, float], pair: int) -> float:
        rate = THETA ** (-(pair % quarter) / quarter)
        return rate * (cell[0] if pair < quarter else cell[1])

    def turn(v: Tensor, cell: tuple[float, float]) -> Tensor:
        out = v.clone()
        for pair in range(head // 2):
            a = angle(cell, pair)
            out[2 * pair] = v[2 * pair] * math.cos(a) - v[2 * pair + 1] * math.sin(a)
            out[2 * pair + 1] = v[2 * pair] * math.sin(a) + v[2 * pair + 1] * math.cos(a)
        return out

    result = x.clone()
    for b, t, y, z in product(range(batch), range(frames), range(height), range(width)):
        top, left = y // window * window, z // window * window
        cells = list(product(range(top, min(top + window, height)), range(left, min(left + window, width))))
        query = normed(layer.norm_query, x[b, :, t, y, z])
        q = layer.to_q(query)
        offsets = torch.zeros(channels // head, 2, dtype=x.dtype)
        if layer.to_offset is not None:
            offsets = layer.reach * layer.to_offset(query).view(-1, 2)
        keys = [layer.to_k(normed(layer.norm_context, first[b, :, i, j])) for i, j in cells]
        values = [layer.to_v(normed(layer.norm_context, first[b, :, i, j])) for i, j in cells]
        mixed = []
        for h in range(channels // head):
            part = slice(h * head, (h + 1) * head)
            turned = turn(q[part], (y + float(offsets[h, 0]), z + float(offsets[h, 1])))
            scores = torch.stack([turned @ turn(k[part], c) for k, c in zip(keys, cells, strict=True)])
            weights = (scores / math.sqrt(head)).softmax(0)
            mixed.append(sum(w * v[part] for w, v in zip(weights, values, strict=True)))
        result[b, :, t, y, z] += layer.to_out(torch.cat(mixed))
    return result


def layer_with_weights(window: int, reach: float) -> FirstFrameAttention:
    torch.manual_seed(0)
    layer = FirstFrameAttention(16, 0, Injection((12,), head_dim=8, window=window, reach=reach)).double()
    for near in (layer.to_q, layer.to_k):
        torch.nn.init.constant_(near.bias, 1.0)
    for parameter in layer.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return layer


@torch.no_grad()
def test_equals_brute_force_whole_and_in_windows() -> None:
    x = torch.randn(1, 16, 2, 3, 5, dtype=torch.double)
    first = torch.randn(1, 12, 3, 5, dtype=torch.double)
    for window, reach in ((128, 0.0), (3, 0.0), (2, 0.0), (128, 2.0), (2, 0.5)):
        layer = layer_with_weights(window, reach)
        # The layer's rotary angles are fp32, the formula's float64.
        torch.testing.assert_close(layer(x, first), brute_force(layer, x, first, window), rtol=0, atol=1e-5)


@torch.no_grad()
def test_starts_as_the_identity_and_local() -> None:
    torch.manual_seed(0)
    layer = FirstFrameAttention(32, 0, Injection((32,), head_dim=32))
    x, first = torch.randn(1, 32, 3, 8, 8), torch.randn(1, 32, 8, 8)
    assert torch.equal(layer(x, first), x)
    # With W_o the identity, each position gets nearly the value of its own cell; without the large biases it does not.
    torch.nn.init.eye_(layer.to_out.weight)
    own = layer.to_v(layer.norm_context(first).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def agreement() -> float:
        got = (layer(x, first) - x)[:, :, 1]
        return float(torch.nn.functional.cosine_similarity(got.flatten(), own.flatten(), dim=0))

    local = agreement()
    torch.nn.init.zeros_(layer.to_q.bias)
    torch.nn.init.zeros_(layer.to_k.bias)
    assert local > 0.95
    assert agreement() < 0.5


@torch.no_grad()
def test_an_offset_looks_at_another_cell() -> None:
    """With an offset of two columns, each position gets the value two columns on; without, its own."""
    torch.manual_seed(0)
    layer = FirstFrameAttention(32, 0, Injection((32,), head_dim=32, reach=4.0))
    x, first = torch.randn(1, 32, 1, 8, 8), torch.randn(1, 32, 8, 8)
    torch.nn.init.eye_(layer.to_out.weight)
    values = layer.to_v(layer.norm_context(first).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def agreement(columns: int) -> float:
        got = (layer(x, first) - x)[:, :, 0, :, : 8 - columns]
        return float(torch.nn.functional.cosine_similarity(got.flatten(), values[..., columns:].flatten(), dim=0))

    assert agreement(0) > 0.95 > 0.3 > agreement(2)
    assert layer.to_offset is not None
    layer.to_offset.bias[1] = 0.5
    assert agreement(2) > 0.95 > 0.3 > agreement(0)
