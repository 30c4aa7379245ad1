"""Solvers of the flow's ordinary differential equation dz/ds = v on a given grid of noise levels (paper §3.2).

A solver's step is a weighted sum of tensors. All weights follow from the noise levels, so they are computed once, in
float64 on the host: a step then asks the device nothing, and a whole sampling run can be captured in a CUDA graph.

With m = z - s·v the model's estimate of the clean latents at level s, and λ = ln((1 - s) / s):

    Euler   z' = z + (s' - s)·v
    UniPC   (arXiv 2302.04867; order 2, bh2, predicting m, as Wan2.1 samples), with h = λ' - λ and e = exp(-h) - 1:
            predict   z' = (s'/s)·z - (1 - s')·e·(m + D/2),    D = (m_before - m) / r,  r = (λ_before - λ) / h
            correct   z' = (s'/s)·z - (1 - s')·e·(m + ρ_1·D + ρ_2·(m' - m)), once m' is known at s', from the same
                      evaluation that the next prediction starts with

The first step has no D, and the last is taken without: both are of order 1, with ρ_2 = 1/2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, get_args

from torch import Tensor

from fsae.errors import UserError

SolverName = Literal["unipc", "euler"]

_NOISE = 1.0 - 1e-6
"""UniPC's λ has no value at pure noise; diffusers begins here, and so do we."""


class Solver(Protocol):
    """Takes a sampling run from level to level.

    Attributes:
        sigmas: The levels, from noise to 0; the model is asked at all but the last.
    """

    sigmas: tuple[float, ...]

    def step(self, index: int, x: Tensor, velocity: Tensor) -> Tensor:
        """Latents at level `index + 1` from those at `index` and the velocity there. Call it once a level, in
        order."""


def make_solver(name: SolverName, sigmas: Sequence[float]) -> Solver:
    """A solver for one run over `sigmas`, whose last one is 0; UserError if there is none of that name."""
    if name == "unipc":
        return UniPC(sigmas)
    if name == "euler":
        return Euler(sigmas)
    raise UserError(f"solver {name!r} given; one of {', '.join(get_args(SolverName))} is accepted")


class Euler:
    """First order."""

    def __init__(self, sigmas: Sequence[float]) -> None:
        self.sigmas = tuple(sigmas)

    def step(self, index: int, x: Tensor, velocity: Tensor) -> Tensor:
        """z' = z + (s' - s)·v."""
        return x + (self.sigmas[index + 1] - self.sigmas[index]) * velocity


class _Weights(NamedTuple):
    """Of z, m, m_before and m' in one update."""

    x: float
    clean: float
    before: float = 0.0
    ahead: float = 0.0


class UniPC:
    """Predictor and corrector of second order, one evaluation of the model a step."""

    def __init__(self, sigmas: Sequence[float]) -> None:
        self.sigmas = (min(sigmas[0], _NOISE), *sigmas[1:])
        steps = len(self.sigmas) - 1
        orders = [1 if index in (0, steps - 1) else 2 for index in range(steps)]
        self._predict = [self._predictor(index, order) for index, order in enumerate(orders)]
        # The corrector of a step has that step's order; none follows the last, where nothing is evaluated any more.
        self._correct = [self._corrector(index, order) for index, order in enumerate(orders[:-1])]
        self._x: Tensor | None = None
        self._clean: list[Tensor] = []

    def step(self, index: int, x: Tensor, velocity: Tensor) -> Tensor:
        """Correct what the last step predicted, then predict."""
        clean = x - self.sigmas[index] * velocity
        if index > 0:
            assert self._x is not None
            x = _update(self._correct[index - 1], self._x, self._clean, clean)
        self._x, self._clean = x, [clean, *self._clean[:1]]
        return _update(self._predict[index], x, self._clean, None)

    def _predictor(self, index: int, order: int) -> _Weights:
        start, end = self.sigmas[index : index + 2]
        factor = -(1 - end) * math.expm1(-self._h(index))
        if order == 1:
            return _Weights(end / start, factor)
        share = factor / (2 * self._r(index))
        return _Weights(end / start, factor - share, share)

    def _corrector(self, index: int, order: int) -> _Weights:
        start, end = self.sigmas[index : index + 2]
        h = self._h(index)
        growth = math.expm1(-h)
        factor = -(1 - end) * growth
        if order == 1:
            return _Weights(end / start, factor / 2, 0.0, factor / 2)
        # ρ_1 + ρ_2 = b_1 and r·ρ_1 + ρ_2 = b_2, with b_k from the exponential's series.
        first = growth / -h - 1
        b1, b2 = first / growth, 2 * (first / -h - 0.5) / growth
        r = self._r(index)
        rho1 = (b2 - b1) / (r - 1)
        rho2 = b1 - rho1
        return _Weights(end / start, factor * (1 - rho1 / r - rho2), factor * rho1 / r, factor * rho2)

    def _h(self, index: int) -> float:
        """λ' - λ of a step; infinite for the last one."""
        return _log_ratio(self.sigmas[index + 1]) - _log_ratio(self.sigmas[index])

    def _r(self, index: int) -> float:
        """(λ_before - λ) / h."""
        return -self._h(index - 1) / self._h(index)


def _log_ratio(sigma: float) -> float:
    """λ = ln((1 - s) / s)."""
    return math.log1p(-sigma) - math.log(sigma) if sigma > 0 else math.inf


def _update(weights: _Weights, x: Tensor, clean: list[Tensor], ahead: Tensor | None) -> Tensor:
    total = weights.x * x + weights.clean * clean[0]
    if weights.before:
        total = total + weights.before * clean[1]
    if ahead is not None:
        total = total + weights.ahead * ahead
    return total
