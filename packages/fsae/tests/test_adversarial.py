"""The discriminator and its losses, against formulas in double precision and finite differences."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsae.losses.adversarial import Discriminator, discriminator_loss, generator_loss, r1_penalty


def small(scales: int = 3) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(width=2, scales=scales).double()


def clips(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_each_scale_has_the_parameters_of_the_formula() -> None:
    with torch.device("meta"):
        full = Discriminator()
    counts = [sum(p.numel() for p in scale.parameters()) for scale in full.scales]
    widths = [3, 64, 128, 256, 512, 1]
    expected = sum(27 * a * b + b for a, b in pairwise(widths))
    assert counts == [expected] * 3 == [4_664_833] * 3


def test_the_scales_see_the_clip_pooled_by_one_two_and_four() -> None:
    model, video = small(), clips(2, 3, 5, 32, 24)
    for factor, scale, score in zip((1, 2, 4), model.scales, model(video), strict=True):
        pooled = video.unflatten(3, (-1, factor)).mean(4).unflatten(4, (-1, factor)).mean(5)
        torch.testing.assert_close(score, scale(pooled))
    x = video  # the first scale, layer by layer
    for i, stride in enumerate([(2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 1, 1), (1, 1, 1)]):
        conv = model.scales[0].convs[i]
        x = F.conv3d(torch.where(x > 0, x, 0.2 * x) if i else x, conv.weight, conv.bias, stride, 1)
    torch.testing.assert_close(model(video)[0], x)


@pytest.mark.parametrize("shape", [(1, 3, 1, 64, 64), (1, 3, 1, 5, 3), (2, 3, 2, 3, 3), (1, 3, 17, 16, 24)], ids=str)
def test_any_length_and_size_is_scored(shape: tuple[int, ...]) -> None:
    model = small()
    scores = model(clips(*shape))
    assert [s.shape[:3] for s in scores] == [(shape[0], 1, -(-shape[2] // 4))] * 3
    assert all(s.isfinite().all() and s.numel() for s in scores)
    assert r1_penalty(model, clips(*shape)).isfinite()


def test_losses_are_the_mean_over_scales_of_the_non_saturating_ones() -> None:
    real, fake = ([clips(2, 1, 2, n, n, seed=seed + n) * 3 for n in (4, 2, 1)] for seed in (1, 20))

    def softplus(x: np.ndarray) -> np.ndarray:
        return np.log1p(np.exp(x))

    generator = np.mean([softplus(-f.numpy()).mean() for f in fake])
    both = np.mean([softplus(-r.numpy()).mean() + softplus(f.numpy()).mean() for r, f in zip(real, fake, strict=True)])
    assert generator_loss(fake).item() == pytest.approx(generator, rel=1e-6)
    assert discriminator_loss(real, fake).item() == pytest.approx(both, rel=1e-6)


def test_r1_against_finite_differences() -> None:
    """Every pixel of two small clips moved by hand."""
    model, video = small(scales=2), clips(2, 3, 5, 3, 9)

    def sums(x: Tensor) -> Tensor:
        with torch.no_grad():
            # Scales x samples, the root of N divided out.
            return torch.stack([score.flatten(1).sum(1) / score[0].numel() ** 0.5 for score in model(x)])

    step, total = 1e-5, torch.zeros(2, 2, dtype=torch.float64)
    for place in np.ndindex(*video.shape[1:]):
        shift = torch.zeros_like(video)
        shift[(slice(None), *place)] = step
        total += ((sums(video + shift) - sums(video - shift)) / (2 * step)).square()
    assert r1_penalty(model, video).item() == pytest.approx(total.mean().item(), rel=1e-6)


def test_r1_does_not_depend_on_the_size_of_clips() -> None:
    """Four times the pixels, once edges count for little: about the same penalty, and not of the mean logit."""
    model = small(scales=1)
    few, many = clips(1, 3, 17, 96, 96), clips(1, 3, 17, 192, 192)

    def of_the_mean(video: Tensor) -> float:
        x = video.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x)[0].flatten(1).mean(1).sum(), x)
        return slope.square().flatten(1).sum(1).mean().item()

    assert r1_penalty(model, many).item() / r1_penalty(model, few).item() == pytest.approx(1, abs=0.4)
    assert of_the_mean(many) < 0.4 * of_the_mean(few)


def test_r1_can_be_learned_from() -> None:
    model = small()
    penalty = r1_penalty(model, clips(1, 3, 5, 16, 16))
    penalty.backward()
    slopes = [scale.convs[0].weight.grad for scale in model.scales]
    assert all(slope is not None and slope.abs().sum() > 0 for slope in slopes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-2 * parameter.grad if parameter.grad is not None else 0
    assert r1_penalty(model, clips(1, 3, 5, 16, 16)) < penalty


def test_r1_leaves_autocast() -> None:
    model, video = small().float(), clips(1, 3, 1, 16, 16).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = r1_penalty(model, video)
    assert torch.equal(inside, r1_penalty(model, video)) and inside.dtype == torch.float32
