"""Gride against dadapy's numbers, against its likelihood on a grid, and on manifolds of known dimension."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fsae.errors import UserError
from fsae.evaluation.intrinsic_dimension import (
    intrinsic_dimension,
    latent_points,
    most_likely_dimension,
    neighbour_distances,
)

# dadapy 0.3.4 (numpy 1.26.4): Data(points, maxk=128).return_id_scaling_gride(range_max=64)[0] for `clouds()`.
DADAPY = {
    "cube": [
        4.537939933656685,
        4.66377638881185,
        4.2442995164182795,
        4.284127428286098,
        4.215727907176915,
        3.9911807874643417,
    ],
    "roll": [
        2.0842276618099715,
        1.8697148925202491,
        1.9580645455884225,
        1.86592965211629,
        2.1593413134760624,
        2.4794086808341387,
    ],
    "gaussian": [
        15.624098070322912,
        14.729968640439704,
        14.139219273125256,
        13.492589384853577,
        12.261159004471583,
        11.16034712484505,
    ],
}


def clouds() -> dict[str, NDArray[np.float64]]:
    """500 points each of a five-dimensional cube, a rolled-up rectangle, and Gaussian noise of 20 dimensions."""
    rng = np.random.default_rng(1)
    cube = rng.uniform(size=(500, 5))
    angle = 1.5 * np.pi * (1 + 2 * rng.uniform(size=500))
    roll = np.stack([angle * np.cos(angle), 21 * rng.uniform(size=500), angle * np.sin(angle)], 1)
    gaussian = rng.normal(size=(500, 20))
    return {"cube": cube, "roll": roll, "gaussian": gaussian}


@pytest.mark.parametrize("name", DADAPY)
def test_agrees_with_dadapy(name: str) -> None:
    found = intrinsic_dimension(torch.from_numpy(clouds()[name]))
    assert found.neighbours == (2, 4, 8, 16, 32, 64) and (found.points, found.duplicates) == (500, 0)
    # dadapy halves [0.001, 1000] until it is shorter than 1e-7.
    np.testing.assert_allclose(found.dimension, DADAPY[name], atol=2e-7)


def log_likelihood(d: Tensor, mu: Tensor, k: int) -> Tensor:
    """The density of the module's docstring, summed in logarithms over the ratios `N`, for dimensions `M`."""
    n1, n2 = k, 2 * k
    log_beta = math.lgamma(n2 - n1) + math.lgamma(n1) - math.lgamma(n2)
    grown = mu[:, None] ** d
    density = d.log() + (n2 - n1 - 1) * (grown - 1).log() - ((n2 - 1) * d + 1) * mu[:, None].log() - log_beta
    return density.sum(0)


@pytest.mark.parametrize("k", [1, 2, 8, 32])
def test_the_estimate_is_the_likelihoods_maximum(k: int) -> None:
    """Less log d, by which the derivative has N - 1 in place of N."""
    points = torch.from_numpy(clouds()["cube"])
    distances = neighbour_distances(points, 2 * k)
    mu = distances[:, 2 * k - 1] / distances[:, k - 1]
    found = most_likely_dimension(mu.log(), k)
    grid = torch.linspace(0.5, 12, 4_001, dtype=torch.float64)
    assert found == pytest.approx(grid[(log_likelihood(grid, mu, k) - grid.log()).argmax()].item(), abs=3e-3)


def test_the_density_integrates_to_one() -> None:
    mu = torch.linspace(1 + 1e-9, 60, 400_001, dtype=torch.float64)
    for k, d in ((1, 3.0), (4, 2.0), (4, 7.0)):
        values = torch.tensor([d], dtype=torch.float64)
        density = torch.stack([log_likelihood(values, part, k)[0].exp() for part in mu[1::4000].split(1)])
        assert bool((density >= 0).all())
        fine = d * (mu**d - 1) ** (k - 1) / mu ** ((2 * k - 1) * d + 1)
        beta = math.exp(2 * math.lgamma(k) - math.lgamma(2 * k))
        assert torch.trapezoid(fine, mu).item() / beta == pytest.approx(1, abs=2e-3)
        torch.testing.assert_close(density, fine[1::4000] / beta)


def test_neighbour_distances_by_brute_force() -> None:
    points = clouds()["gaussian"][:90]
    brute = np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))
    np.testing.assert_allclose(neighbour_distances(torch.from_numpy(points), 64), np.sort(brute, 1)[:, 1:65])


@pytest.mark.parametrize("dimension", [1, 2, 4, 8])
def test_known_dimensions(dimension: int) -> None:
    """Noise of d dimensions, turned into 32: its dimension is d, a line bent through them keeps 1."""
    rng = np.random.default_rng(dimension)
    turned = rng.normal(size=(2000, dimension)) @ np.linalg.qr(rng.normal(size=(32, dimension)))[0].T
    found = intrinsic_dimension(torch.from_numpy(turned), (2, 4, 8)).dimension
    np.testing.assert_allclose(found, dimension, rtol=0.12)


def test_a_bent_line_and_its_noise() -> None:
    """A curve has dimension 1 at scales above its noise, the noise's own dimension at those below."""
    rng = np.random.default_rng(0)
    t = rng.uniform(0, 40, 3000)
    curve = np.stack([np.cos(t / 3), np.sin(t / 3), t / 8, np.cos(t / 5)], 1)
    noisy = curve + 3e-3 * rng.normal(size=curve.shape)
    clean, thick = (intrinsic_dimension(torch.from_numpy(x)).dimension for x in (curve, noisy))
    np.testing.assert_allclose(clean, 1, atol=0.06)
    assert thick[0] > 2 and thick[-1] < 1.2


def test_equal_points_are_counted_once() -> None:
    points = torch.from_numpy(clouds()["cube"])
    doubled = torch.cat([points, points[:40], points[:1]])
    found = intrinsic_dimension(doubled[torch.randperm(541, generator=torch.Generator().manual_seed(0))])
    assert (found.points, found.duplicates) == (500, 41)
    np.testing.assert_allclose(found.dimension, DADAPY["cube"], atol=2e-7)


def test_some_equal_distances_are_no_harm() -> None:
    rng = np.random.default_rng(0)
    logs = torch.from_numpy(rng.exponential(0.2, 1000)).index_fill_(0, torch.arange(10), 0.0)
    mu = logs.exp().clamp_min(1 + 1e-15)
    grid = torch.linspace(1, 20, 9_001, dtype=torch.float64)
    assert most_likely_dimension(logs, 1) == pytest.approx(
        grid[(log_likelihood(grid, mu, 1) - grid.log()).argmax()].item(), abs=3e-3
    )
    assert math.isfinite(most_likely_dimension(logs, 4))


def test_points_of_clips() -> None:
    clips = [torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5) + 1000 * i for i in range(2)]
    positions = latent_points(clips)
    assert positions.shape == (120, 2)
    assert positions[60 + 7].tolist() == clips[1][:, 0, 1, 2].tolist()
    whole = latent_points(clips, "clip")
    assert whole.shape == (2, 120) and torch.equal(whole[1], clips[1].flatten())
    assert latent_points([clips[0], clips[1][:, :1]]).shape == (80, 2)


def test_bad_input_is_a_sentence() -> None:
    cube = torch.from_numpy(clouds()["cube"])
    clip = torch.zeros(2, 1, 1, 1)
    cases = [
        (lambda: intrinsic_dimension(cube[:64]), "64 distinct points have no 64 neighbours"),
        (lambda: intrinsic_dimension(cube, (2, 3)), "even number"),
        (lambda: intrinsic_dimension(cube, ()), "even number"),
        (lambda: intrinsic_dimension(cube[0]), "N D with finite"),
        (lambda: intrinsic_dimension(cube / 0), "finite"),
        (lambda: intrinsic_dimension(torch.eye(9), (2, 4)), "lattice"),
        (lambda: latent_points([]), "no latents"),
        (lambda: latent_points([clip, clip.expand(2, 2, 1, 1)], "clip"), "several sizes"),
    ]
    for call, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            call()
