"""Exponential moving average of trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class MovingAverage:
    """Averages every weight that is trained, or a process's part of it: e <- d e + (1 - d) w after each update.

    The decay d of update number u is min(decay, (1 + u) / (10 + u)), so that the random start is forgotten
    early.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.shadow: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update number `step` (the first is 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1 - decay)

    @torch.no_grad()
    def copy_to_weights(self) -> None:
        """Overwrite the trained weights by their average."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.shadow[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The averaged weights stand in the modules while the context lasts."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.copy_to_weights()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(trained[name])
