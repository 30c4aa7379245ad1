"""The flow's path, schedule and loss against their formulas in float64."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from fsae.errors import UserError
from fsdit.flow.path import FlowSchedule, clean_from_velocity, interpolate, pseudo_huber, velocity


def test_sigmas_are_diffusers_grid() -> None:
    for shift, steps in ((5.0, 30), (8.0, 8), (1.0, 4)):
        grid = [1 - (1 - 0.001) * i / steps for i in range(steps)]
        expected = [shift * s / (1 + (shift - 1) * s) for s in grid] + [0.0]
        sigmas = FlowSchedule(shift).sigmas(steps)
        assert sigmas == pytest.approx(expected, abs=1e-12)
    known = FlowSchedule(5.0).sigmas(30)
    assert [round(v, 5) for v in (known[1], known[2], known[28], known[29])] == [0.99316, 0.98593, 0.26606, 0.15081]


def test_training_levels_are_logit_normal_then_shifted() -> None:
    schedule = FlowSchedule(shift=5.0, mean=-0.3, std=1.7)
    sigma = schedule.sample(40_000, torch.Generator().manual_seed(0)).double()
    assert sigma.shape == (40_000,) and sigma.min() > 0 and sigma.max() < 1
    unshifted = sigma / (5.0 - 4.0 * sigma)  # the inverse of the shift
    normal = torch.logit(unshifted)
    assert normal.mean().item() == pytest.approx(-0.3, abs=0.03)
    assert normal.std().item() == pytest.approx(1.7, rel=0.02)
    quantiles = torch.quantile(normal, torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    assert quantiles == pytest.approx([-0.3 - 1.2816 * 1.7, -0.3 + 1.2816 * 1.7], abs=0.05)


def test_levels_follow_the_generator() -> None:
    schedule = FlowSchedule()
    a, b, c = (schedule.sample(5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_path_velocity_and_estimate_fit_together() -> None:
    clean, noise = torch.randn(2, 3, 4, 2, 2, 2, dtype=torch.float64).unbind()
    sigma = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    noisy = interpolate(clean, noise, sigma)
    assert torch.equal(noisy[0], clean[0]) and torch.equal(noisy[2], noise[2])
    assert torch.allclose(noisy[1], 0.7 * clean[1] + 0.3 * noise[1])
    step = 1e-6
    slope = (interpolate(clean, noise, sigma + step) - noisy) / step
    assert torch.allclose(slope, velocity(clean, noise), atol=1e-8)
    assert torch.allclose(clean_from_velocity(noisy, velocity(clean, noise), sigma), clean)


@pytest.mark.parametrize("delta", [0.25, 0.05])
def test_pseudo_huber(delta: float) -> None:
    prediction, target = torch.randn(2, 3, 8, 2, 2, dtype=torch.float64).unbind()
    expected = []
    for p, t in zip(prediction.flatten(1).tolist(), target.flatten(1).tolist(), strict=True):
        mse = sum((a - b) ** 2 for a, b in zip(p, t, strict=True)) / len(p)
        expected.append(math.sqrt(mse + delta**2) - delta)
    assert pseudo_huber(prediction, target, delta).tolist() == pytest.approx(expected, rel=1e-12)
    assert pseudo_huber(target, target, delta).tolist() == [0.0] * 3


def test_pseudo_huber_has_a_gradient_at_zero_and_a_bounded_one_far_away() -> None:
    for size, expected in ((0.0, 0.0), (1e4, 1.0)):
        prediction = torch.full((1, 16), size, requires_grad=True)
        pseudo_huber(prediction, torch.zeros(1, 16)).sum().backward()
        assert prediction.grad.norm().item() * 4 == pytest.approx(expected, abs=1e-3)  # sqrt(16) times the rms slope


def test_half_precision_is_summed_in_float32() -> None:
    prediction, target = torch.randn(2, 2, 5000).bfloat16().unbind()
    assert torch.equal(pseudo_huber(prediction, target), pseudo_huber(prediction.float(), target.float()))


def test_impossible_schedules_are_refused() -> None:
    for bad in ({"shift": 0.0}, {"std": -1.0}):
        with pytest.raises(UserError, match="above 0"):
            FlowSchedule(**bad)
    with pytest.raises(UserError, match="at least 1"):
        FlowSchedule().sigmas(0)


def test_configurations_can_hold_a_schedule_without_torch() -> None:
    code = "import sys, fsdit.flow.path, fsdit.training.config, fsdit.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
