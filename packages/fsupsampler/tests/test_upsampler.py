"""The latent upsampler: size, shapes, the plain formula in float64, and how it is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn

from fsae.errors import UserError
from fsupsampler import LatentUpsampler
from fsupsampler.upsampler import nearest_upsample

SMALL: dict[str, Any] = {"latent_channels": 6, "num_blocks": 3}
MEAN, STD = [0.3, -0.2, 0.0, 1.0, -1.0, 0.1], [0.5, 2.0, 1.0, 0.7, 1.3, 0.9]


def randomised(**options: Any) -> LatentUpsampler:
    """A small upsampler whose every weight counts, the zero ones of the start as well."""
    torch.manual_seed(0)
    model = LatentUpsampler.from_preset("tiny", **{**SMALL, **options}).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def count(preset: str) -> int:
    with init_empty_weights():
        return sum(p.numel() for p in LatentUpsampler.from_preset(preset).parameters())


@pytest.mark.parametrize(("preset", "channels", "mid", "blocks"), [("paper", 128, 512, 16), ("nano", 128, 32, 8)])
def test_parameter_count_is_the_arithmetic(preset: str, channels: int, mid: int, blocks: int) -> None:
    def conv(inputs: int, outputs: int) -> int:
        return inputs * outputs * 27 + outputs

    norm = 2 * mid
    by_hand = conv(channels, 4 * mid) + norm + blocks * 2 * (conv(mid, mid) + norm) + conv(mid, channels)
    assert count(preset) == by_hand
    assert by_hand == {"paper": 235_392_128, "nano": 997_184}[preset]


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 2, 3), (1, 9, 1, 1), (2, 1, 1, 1)])
def test_height_and_width_double(shape: tuple[int, int, int, int]) -> None:
    batch, t, h, w = shape
    model = LatentUpsampler.from_preset("tiny", **SMALL)
    assert model(torch.randn(batch, 6, t, h, w)).shape == (batch, 6, t, 2 * h, 2 * w)


@pytest.mark.parametrize("statistics", [False, True])
def test_untrained_it_copies_each_cell_into_four(statistics: bool) -> None:
    options = {"latents_mean": MEAN, "latents_std": STD} if statistics else {}
    model = LatentUpsampler.from_preset("tiny", **SMALL, **options).double()
    latents = torch.randn(1, 6, 3, 2, 3, dtype=torch.float64)
    copied = F.interpolate(latents, scale_factor=(1, 2, 2), mode="nearest")
    assert torch.allclose(model(latents), copied, rtol=0, atol=1e-14)
    assert torch.equal(nearest_upsample(latents), copied)


# --- the formula, written out over the state dict ----


def plain_conv(x: Tensor, state: dict[str, Tensor], name: str, padding: str) -> Tensor:
    """The 27 taps one by one."""
    mode = "constant" if padding == "zeros" else "replicate"
    x = F.pad(x, (0, 0, 0, 0, 1, 1), mode=mode)
    x = F.pad(x, (1, 1, 1, 1))
    t, h, w = (size - 2 for size in x.shape[2:])
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    out = bias.view(1, -1, 1, 1, 1).expand(len(x), -1, t, h, w)
    for i in range(3):
        for j in range(3):
            for k in range(3):
                window = x[:, :, i : i + t, j : j + h, k : k + w]
                out = out + torch.einsum("oc,bcthw->bothw", weight[:, :, i, j, k], window)
    return out


def plain_norm(x: Tensor, state: dict[str, Tensor], name: str, kind: str, groups: int) -> Tensor:
    scale, shift = (state[f"{name}.{key}"].view(1, -1, 1, 1, 1) for key in ("weight", "bias"))
    if kind == "pixel":
        return x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * scale + shift
    flat = x.reshape(len(x), groups, -1)
    mean, variance = flat.mean(-1, keepdim=True), flat.var(-1, unbiased=False, keepdim=True)
    return ((flat - mean) / (variance + 1e-5).sqrt()).view(x.shape) * scale + shift


def plain_upsampler(latents: Tensor, model: LatentUpsampler) -> Tensor:
    state, config = model.state_dict(), model.config

    def conv(x: Tensor, name: str) -> Tensor:
        return plain_conv(x, state, name, config.temporal_padding)

    def norm(x: Tensor, name: str) -> Tensor:
        return plain_norm(x, state, name, config.norm, config.norm_groups)

    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    mean = torch.tensor(config.latents_mean or [0.0] * 6, dtype=torch.float64).view(1, -1, 1, 1, 1)
    std = torch.tensor(config.latents_std or [1.0] * 6, dtype=torch.float64).view(1, -1, 1, 1, 1)
    raw = latents * std + mean
    wide = conv(raw, "conv_in")
    batch, _, t, h, w = wide.shape
    # Channel 4m + 2a + b becomes the cell in row a and column b of the square of four.
    x = wide.view(batch, config.mid_channels, 2, 2, t, h, w).permute(0, 1, 4, 5, 2, 6, 3)
    x = silu(norm(x.reshape(batch, -1, t, 2 * h, 2 * w), "norm_in"))
    for i in range(config.num_blocks):
        branch = silu(norm(conv(x, f"blocks.{i}.conv1"), f"blocks.{i}.norm1"))
        x = silu(x + norm(conv(branch, f"blocks.{i}.conv2"), f"blocks.{i}.norm2"))
    draft = conv(x, "conv_out") + F.interpolate(raw, scale_factor=(1, 2, 2), mode="nearest")
    return (draft - mean) / std


@pytest.mark.parametrize("norm", ["group", "pixel"])
@pytest.mark.parametrize("padding", ["zeros", "replicate"])
@pytest.mark.parametrize("t", [1, 4])
def test_forward_is_the_plain_formula(norm: str, padding: str, t: int) -> None:
    model = randomised(norm=norm, temporal_padding=padding, latents_mean=MEAN, latents_std=STD)
    latents = torch.randn(2, 6, t, 3, 2, dtype=torch.float64)
    expected = plain_upsampler(latents, model)
    assert expected.std() > 0.1
    assert torch.allclose(model(latents), expected, rtol=1e-12, atol=1e-12)


def test_replicated_time_treats_an_image_as_a_static_clip_and_zeros_do_not() -> None:
    image = torch.randn(1, 6, 1, 2, 2, dtype=torch.float64)
    clip = image.expand(-1, -1, 5, -1, -1)
    replicate, zeros = (randomised(temporal_padding=padding) for padding in ("replicate", "zeros"))
    assert torch.allclose(replicate(clip), replicate(image).expand(-1, -1, 5, -1, -1), atol=1e-12)
    assert not torch.allclose(zeros(clip), zeros(image).expand(-1, -1, 5, -1, -1), atol=1e-3)


def test_pixel_norm_looks_no_further_than_its_kernels_and_group_norm_at_the_whole_clip() -> None:
    latents = torch.randn(1, 6, 1, 1, 30, dtype=torch.float64)
    changed = latents.clone()
    changed[..., -1] += 1
    reach = {}
    for norm in ("pixel", "group"):
        model = randomised(norm=norm, num_blocks=1)
        reach[norm] = (model(changed) - model(latents))[..., :40].abs().max().item()
    assert reach["pixel"] == 0 and reach["group"] > 1e-6


def test_statistics_undo_the_autoencoders_normalisation() -> None:
    """Raw latents in and out of a net without statistics are normalised ones of a net that carries them."""
    bare, carrying = randomised(), randomised(latents_mean=MEAN, latents_std=STD)
    carrying.load_state_dict(bare.state_dict())
    mean = torch.tensor(MEAN, dtype=torch.float64).view(1, -1, 1, 1, 1)
    std = torch.tensor(STD, dtype=torch.float64).view(1, -1, 1, 1, 1)
    raw = torch.randn(1, 6, 2, 2, 2, dtype=torch.float64)
    assert torch.allclose(carrying((raw - mean) / std) * std + mean, bare(raw), atol=1e-12)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = randomised()
    latents = torch.randn(1, 6, 2, 2, 2, dtype=torch.float64)
    gradients = []
    for enabled in (False, True):
        if enabled:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(latents).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model = randomised(latents_mean=MEAN, latents_std=STD).float().eval()
    model.save_pretrained(tmp_path / "upsampler")
    assert json.loads((tmp_path / "upsampler" / "config.json").read_text())["latents_std"] == STD
    loaded = LatentUpsampler.from_pretrained(tmp_path / "upsampler")
    latents = torch.randn(1, 6, 2, 2, 2)
    assert torch.equal(loaded(latents), model(latents))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"norm": "batch"}, "norm 'batch' given; one of group, pixel"),
        ({"temporal_padding": "reflect"}, "temporal_padding 'reflect' given; one of zeros, replicate"),
        ({"norm_groups": 3}, "mid_channels 8 given with 3 norm groups"),
        ({"latents_mean": [0.0]}, "latents_mean has 1 numbers; one for each of the 6"),
    ],
)
def test_an_impossible_configuration_is_a_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        LatentUpsampler.from_preset("tiny", **{**SMALL, **options})


def test_wrong_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="expected B 6 t h w"):
        LatentUpsampler.from_preset("tiny", **SMALL)(torch.randn(1, 5, 1, 2, 2))
