"""Modules under one optimiser: what is trained, or what it is trained against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fsae.errors import UserError
from fsae.training import sharding
from fsae.training.checkpointing import load_optimizer, optimizer_tensors
from fsae.training.config import LoopConfig, OptimizerConfig

Groups = Callable[[OptimizerConfig], list[dict[str, Any]]]


class Trained:
    """Modules that are updated together: their AdamW, their loss scaler, their place on device and processes.

    Args:
        accelerator: The run's.
        modules: What to train, by name.
        groups: AdamW's groups of these modules' parameters.
        optimizer: AdamW's settings.
        config: The run's, for precision and accumulation.
        sharded: Whether each process holds a part of the weights (FSDP2) or all of them (DDP).

    Attributes:
        forward: ``forward(function, *arguments)`` calls the function so that DDP, FSDP2 and autocast see it.
        names: "<module>.<parameter>" of everything that is trained.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        modules: Mapping[str, nn.Module],
        groups: Groups,
        optimizer: OptimizerConfig,
        config: LoopConfig,
        sharded: bool = False,
    ) -> None:
        together = _Together(modules)
        if sharded:
            sharding.shard(together, accelerator.device)
        else:
            together.to(accelerator.device)
        self.accelerator, self.modules, self.sharded = accelerator, modules, sharded
        self.accumulation = config.gradient_accumulation_steps
        self.forward: nn.Module = accelerator.prepare_model(together, evaluation_mode=sharded)
        self.names: dict[nn.Parameter, str] = {
            p: f"{name}.{key}" for name, m in modules.items() for key, p in m.named_parameters() if p.requires_grad
        }
        self.optimizer = _adamw(groups(optimizer), optimizer)
        # One scaler for each optimiser: a shared one would be updated between their steps.
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.mixed_precision == "fp16")

    def set_rate(self, factor: float) -> float:
        """Set the learning rates to a share of their peaks; returns the first group's."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's loss."""
        self.scaler.scale(loss / self.accumulation).backward()

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradient down to the global L2 norm ``max_norm``, 0 for any; returns its norm before that."""
        self.scaler.unscale_(self.optimizer)
        return sharding.whole(nn.utils.clip_grad_norm_(list(self.names), max_norm or float("inf"))).float()

    def step(self) -> None:
        """Update the weights and forget the gradient."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """No parameter collects gradients while the context lasts."""
        for parameter in self.names:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self.names:
                parameter.requires_grad_(True)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Eval mode and no gathered weights left behind; every module then has the mode it had."""
        training = {m: m.training for module in self.modules.values() for m in module.modules()}
        for module in self.modules.values():
            module.eval()
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode
            sharding.release(self.forward)

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's state under "<moment>/<parameter>"."""
        return optimizer_tensors(self.optimizer, self.names)

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """The inverse of ``moments``, from whole tensors."""
        load_optimizer(self.optimizer, moments, self.names)


class _Together(nn.Module):
    """Modules under one forward, so that DDP, FSDP2 and autocast see the whole loss, whatever it calls."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.trained = nn.ModuleDict(dict(modules))

    def forward(self, function: Callable[..., dict[str, Tensor]], *arguments: Any) -> dict[str, Tensor]:
        return function(*arguments)


def _adamw(groups: list[dict[str, Any]], settings: OptimizerConfig) -> torch.optim.AdamW:
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise UserError("nothing to train: no parameter of the given modules requires a gradient")
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer
