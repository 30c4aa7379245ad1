"""The one definition of the flow, for training and sampling alike: path, noise levels, loss (paper §2.3.2).

    z_s = (1 - s)·z0 + s·eps,    v = eps - z0,    z0 = z_s - s·v,    0 <= s <= 1, and s = 1 is pure noise

The model's timestep is 1000·s, a float. A resolution's shift k moves levels towards 1: s -> k·s / (1 + (k - 1)·s).
This file imports no torch, so that configurations can hold a schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from fsae.errors import UserError
from fsdit.annotations import Generator, Tensor

Level = TypeVar("Level", float, Tensor)

TIMESTEPS = 1000.0
"""The model's timestep is this times sigma."""


@dataclass(frozen=True)
class FlowSchedule:
    """Noise levels, for training and for sampling.

    Args:
        shift: k > 0; larger clips and images want larger k (5 for the base model, 8 for the refiner).
        mean: of the normal variable whose sigmoid is the training noise level, before the shift.
        std: its standard deviation.
    """

    shift: float = 5.0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (self.shift > 0 and self.std > 0):
            raise UserError(f"flow schedule: shift {self.shift} and std {self.std} given; both must be above 0")

    def warp(self, sigma: Level) -> Level:
        """k·s / (1 + (k - 1)·s)."""
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def sigmas(self, steps: int) -> tuple[float, ...]:
        """The `steps + 1` levels of a sampling run, from 1 down to 0.

        A uniform grid from 1 to 0.001 without its last point, shifted, then 0: diffusers' grid for flow models.
        """
        if steps < 1:
            raise UserError(f"{steps} sampling steps given; at least 1 is needed")
        grid = (1 + index / steps * (1 / TIMESTEPS - 1) for index in range(steps))
        return (*(self.warp(sigma) for sigma in grid), 0.0)

    def sample(self, batch: int, generator: Generator | None = None) -> Tensor:
        """`batch` training levels on the CPU: logit-normal, shifted (paper §2.3.2)."""
        import torch

        return self.warp(torch.sigmoid(self.mean + self.std * torch.randn(batch, generator=generator)))


def per_sample(sigma: Tensor, like: Tensor) -> Tensor:
    """`B` shaped to broadcast over `like` `B ...`; a scalar stays one."""
    return sigma if sigma.ndim == 0 else sigma.view(-1, *[1] * (like.ndim - 1))


def interpolate(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """z_s = (1 - s)·z0 + s·eps for sigma `B`."""
    sigma = per_sample(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """v = eps - z0, the model's target."""
    return noise - clean


def clean_from_velocity(noisy: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The estimate z0 = z_s - s·v for sigma `B`."""
    return noisy - per_sample(sigma, noisy) * v


def pseudo_huber(prediction: Tensor, target: Tensor, delta: float = 0.25, elements: bool = False) -> Tensor:
    """sqrt(MSE + delta²) - delta for each sample (`B`), computed in at least float32 (paper §2.3.2).

    Half a squared error over delta where the error is small, the root mean square error where it is large, so that a
    single bad clip pulls with bounded force. With `elements` each element's error takes the place of the root mean
    square error, and the sample's mean is taken last: then a single bad element does.
    """
    error = prediction.float() - target.float() if prediction.itemsize < 4 else prediction - target
    squares = error.square().flatten(1)
    if not elements:
        squares = squares.mean(dim=1, keepdim=True)
    return ((squares + delta**2).sqrt() - delta).mean(dim=1)
