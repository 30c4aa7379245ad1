"""The optimisers of a training: AdamW for all of it, or Muon for its matrices and AdamW for the rest.

Muon (Jordan et al. 2024, with the step's size of Liu et al. 2025, arXiv:2502.16982) updates a matrix W `m n` by its
gradient G, momentum mu, rate r and decay d as

    B <- mu B + (1 - mu) G
    W <- (1 - r d) W - r 0.2 sqrt(max(m, n)) NewtonSchulz(mu B + (1 - mu) G)

where NewtonSchulz brings all singular values near 1. An entry of W then moves as far as AdamW would move it. A
convolution's kernel `O I kT kH kW` is the matrix `O I·kT·kH·kW`, whatever its memory format.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fsae.errors import UserError
from fsae.training.config import OptimizerConfig

_KERNELS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NARROWEST = 8


def matrices(modules: Iterable[nn.Module]) -> list[Tensor]:
    """What Muon trains: weights of linear layers and convolutions with 8 outputs and 8 inputs (a group) or more.

    So AdamW keeps a network's first and last layer where pixels enter and leave it, depthwise kernels, narrow
    read-outs, embeddings, and every parameter that is a module's own.
    """
    layers = (layer for module in modules for layer in module.modules() if isinstance(layer, _KERNELS))
    return [layer.weight for layer in layers if min(layer.weight.shape[:2]) >= _NARROWEST]


def make_optimizer(groups: list[dict[str, Any]], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of these groups; each group's "peak_lr" is its own "lr", or the settings'. UserError if no
    parameter is to be trained, or Muon is wanted of a torch without it."""
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise UserError("nothing to train: no parameter of the given modules requires a gradient")
    muon = settings.kind == "muon"
    made = MuonAdamW(groups, settings) if muon else torch.optim.AdamW(groups, **_adamw(settings))
    for group in made.param_groups:
        group["peak_lr"] = group["lr"]
    return made


def _adamw(settings: OptimizerConfig) -> dict[str, Any]:
    """What AdamW's groups do not say themselves."""
    rate, decay = settings.learning_rate, settings.weight_decay
    return {"lr": rate, "betas": settings.betas, "eps": settings.eps, "weight_decay": decay}


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the groups whose "kind" is "muon", AdamW for all others; torch's own, on this one's state.

    `settings` say what a group does not say itself. UserError if torch has no Muon.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerConfig) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise UserError(
                f"optimizer.kind is 'muon', which torch {torch.__version__} does not have; install torch 2.9 or newer, "
                "or set it to adamw"
            )
        super().__init__(groups, {**_adamw(settings), "kind": "adamw", "momentum": settings.momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            if group["kind"] == "muon":
                for kernel in group["params"]:
                    if kernel.grad is not None:
                        self._orthogonal_step(kernel, kernel.grad, group)
            else:
                adamw = torch.optim.AdamW([group])
                adamw.state = self.state
                adamw.step()

    def _orthogonal_step(self, kernel: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        """Muon on the kernel's matrix, since torch's takes no other shape; its moment is kept in the kernel's."""
        matrix = nn.Parameter(_matrix(kernel).clone())
        matrix.grad = _matrix(gradient)
        settings = {name: group[name] for name in ("lr", "weight_decay", "momentum")}
        muon = torch.optim.Muon([matrix], **settings, adjust_lr_fn="match_rms_adamw")
        muon.state[matrix] = {name: _matrix(moment) for name, moment in self.state[kernel].items()}
        muon.step()
        kernel.copy_(matrix.view_as(kernel))
        self.state[kernel] = {name: moment.view_as(kernel) for name, moment in muon.state[matrix].items()}


def _matrix(kernel: Tensor) -> Tensor:
    """`O I ...` as `O I·...`, laid out row by row, so that a product of it does not depend on the memory format."""
    return kernel.detach().flatten(1).contiguous()
