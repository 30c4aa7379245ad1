"""How many numbers the latents really need (paper §2.2.2, Table 1): the intrinsic dimension by Gride.

Denti, Doimo, Laio and Mira, "The generalized ratios intrinsic dimension estimator", 2022. Where points lie with locally
constant density on a manifold of dimension d, the ratio mu = r_n2 / r_n1 of a point's distances to its n2-th and n1-th
neighbours has the density

    f(mu | d) = d (mu^d - 1)^(n2 - n1 - 1) / (mu^((n2 - 1) d + 1) B(n2 - n1, n1)),      mu > 1,

whatever the density of the points is. With n1 = k and n2 = 2k the maximum of the likelihood of all points' ratios is
the estimate at the scale of 2k neighbours; the paper lists 2, 4, 8, 16, 32 and 64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fsae.errors import UserError

NEIGHBOURS = (2, 4, 8, 16, 32, 64)

_CHUNK = 2**23  # numbers held at once: 64 MiB of doubles


@dataclass(frozen=True)
class IntrinsicDimension:
    """The estimate at each scale of n2 neighbours, of distinct points; duplicates were left out, as they equal another
    one."""

    neighbours: tuple[int, ...]
    dimension: tuple[float, ...]
    points: int
    duplicates: int


def latent_points(latents: Iterable[Tensor], per: Literal["position", "clip"] = "position") -> Tensor:
    """Latents of clips, each `c t h w` -> points `N D`, the vectors whose dimension is asked for; UserError without
    clips.

    "position" makes a point of each latent position (D = c): what one token of the diffusion transformer is drawn from.
    "clip" makes a point of each clip (D = c t h w): the manifold of whole clips, which must be of one size, and many.
    """
    clips = list(latents)
    if not clips:
        raise UserError("no latents are given; the intrinsic dimension needs those of one clip at least")
    if per == "position":
        return torch.cat([clip.flatten(1).T for clip in clips])
    if len({clip.shape for clip in clips}) > 1:
        raise UserError("clips of several sizes cannot be points of one space; give clips of one size, or positions")
    return torch.stack([clip.flatten() for clip in clips])


def intrinsic_dimension(points: Tensor, neighbours: Sequence[int] = NEIGHBOURS) -> IntrinsicDimension:
    """Gride's estimate for points `N D`, in double precision, from all N^2 distances.

    A point that equals another one has a neighbour at distance 0 and no ratio: of equal points one is kept, and the
    others are counted in the result.

    Raises:
        UserError: fewer distinct points than the most neighbours asked for and one more, an odd number of neighbours,
            points that are not finite, or ratios that are all 1.
    """
    wrong = [n2 for n2 in neighbours if n2 < 2 or n2 % 2]
    if wrong or not neighbours:
        raise UserError(f"{tuple(neighbours)} neighbours are given; each scale needs an even number of them")
    if points.ndim != 2 or not bool(torch.isfinite(points).all()):
        raise UserError(f"points of shape {tuple(points.shape)} are given; N D with finite numbers is wanted")
    distinct = torch.unique(points.detach().double(), dim=0)
    if len(distinct) <= max(neighbours):
        raise UserError(
            f"{len(distinct)} distinct points have no {max(neighbours)} neighbours each; give more points or ask for "
            "fewer neighbours"
        )
    distances = neighbour_distances(distinct, max(neighbours))
    estimates = tuple(
        most_likely_dimension((distances[:, n2 - 1] / distances[:, n2 // 2 - 1]).log(), n2 // 2) for n2 in neighbours
    )
    return IntrinsicDimension(tuple(neighbours), estimates, len(distinct), len(points) - len(distinct))


def neighbour_distances(points: Tensor, count: int) -> Tensor:
    """Distances `N count` of each of the points `N D` to its nearest others, in rising order."""
    centred = points - points.mean(0)
    squares = centred.square().sum(1)
    rows = max(1, _CHUNK // (len(points) + count * points.shape[1]))
    nearest = []
    for start in range(0, len(points), rows):
        chunk = centred[start : start + rows]
        # |x|^2 + |y|^2 - 2xy finds the neighbours, quickly; but it loses the small distances, which are the ones
        # wanted: those are measured again, by differences.
        apart = torch.addmm(squares, chunk, centred.T, alpha=-2)
        own = torch.arange(len(chunk), device=chunk.device)
        apart[own, own + start] = torch.inf
        found = apart.topk(count, largest=False).indices
        nearest.append((points[found] - points[start : start + rows, None]).norm(dim=2).sort(dim=1).values)
    return torch.cat(nearest)


def most_likely_dimension(log_ratios: Tensor, k: int) -> float:
    """The dimension d at which the ratios r_2k / r_k, given by their logarithms l_i `N`, are likeliest.

    The likelihood's derivative, times d and with x_i = d l_i,

        g(d) = N - 1 + (k - 1) sum_i x_i / (1 - exp(-x_i)) - (2k - 1) sum_i x_i,

    falls without end, so that it has one root. N - 1, where the plain derivative has N, takes the bias of a maximum of
    likelihood away (wholly for k = 1), and is what DADApy solves, whose figures the paper lists. Because
    x / (1 - exp(-x)) lies between 1 and 1 + x, sum_i x_i at the root lies between (kN - 1) / (2k - 1) and
    (kN - 1) / k; halving that interval finds it to the last bit.

    Raises:
        UserError: all ratios are 1, as of points on a lattice.
    """
    total = float(log_ratios.sum())
    if not total > 0:
        raise UserError(
            "all neighbours of a point are equally far, as on a lattice; no dimension can be told from them"
        )
    pairs = k * len(log_ratios) - 1
    low, high = pairs / (2 * k - 1) / total, pairs / k / total
    while low < (middle := (low + high) / 2) < high:
        if _slope(middle * log_ratios, k) > 0:
            low = middle
        else:
            high = middle
    return middle


def _slope(x: Tensor, k: int) -> float:
    """g of `most_likely_dimension`; x / (1 - exp(-x)) is 1 at 0."""
    attraction = torch.where(x > 0, x / -torch.expm1(-x), 1.0)
    return float(len(x) - 1 + (k - 1) * attraction.sum() - (2 * k - 1) * x.sum())
