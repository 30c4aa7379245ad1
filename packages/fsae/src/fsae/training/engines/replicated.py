"""Modules under one optimiser: what is trained, or what it is trained against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fsae.training.checkpointing import load_modules, load_optimizer, optimizer_tensors
from fsae.training.config import LoopConfig, OptimizerConfig
from fsae.training.engines import fsdp2 as sharding
from fsae.training.optimizers import make_optimizer

Groups = Callable[[OptimizerConfig], list[dict[str, Any]]]


class Trained:
    """Modules that are updated together: their optimiser, their loss scaler, their place on device and processes.

    Args:
        accelerator: The run's.
        modules: What to train, by name.
        groups: The optimiser's groups of these modules' parameters.
        optimizer: The optimiser's settings.
        config: The run's, for precision and accumulation.
        sharded: Whether each process holds a part of the weights (FSDP2) or all of them (DDP).

    Attributes:
        forward: ``forward(function, *arguments)`` calls the function so that DDP, FSDP2 and autocast see it.
        names: "<module>.<parameter>" of everything that is trained.
        templates: What ``export`` fills where the modules hold but a part of the weights; None where they hold all.
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
        self.accelerator, self.modules, self.sharded = accelerator, modules, sharded
        self.templates = {name: sharding.template(m) for name, m in modules.items()} if sharded else None
        self.accumulation = config.gradient_accumulation_steps
        self.forward = self._placed()
        self.names: dict[nn.Parameter, str] = {
            p: f"{name}.{key}" for name, m in modules.items() for key, p in m.named_parameters() if p.requires_grad
        }
        self.optimizer = make_optimizer(groups(optimizer), optimizer)
        # One scaler for each optimiser: a shared one would be updated between their steps.
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.mixed_precision == "fp16")

    def _placed(self) -> nn.Module:
        """``forward``: the modules where they are trained, ready to be called."""
        together = Together(self.modules)
        if self.sharded:
            sharding.shard(together, self.accelerator.device)
        else:
            together.to(self.accelerator.device)
        placed: nn.Module = self.accelerator.prepare_model(together, evaluation_mode=self.sharded)
        return placed

    # --- a step
    # ---------------------------------------------------------------------------------------------------

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

    # --- what is kept of it: whole tensors go out and come in, whatever a process holds; all processes take part
    # ---------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, Tensor]:
        """What this process holds of the trained weights, to be averaged as it is."""
        return {name: parameter for parameter, name in self.names.items()}

    def gathered(self, parts: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """Whole tensors, for who ``keep``s them, of what the processes hold; split as the weights of these names."""
        return sharding.gathered(parts, keep)

    def parts(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of ``gathered``, for all ``weights``."""
        return {name: sharding.placed(tensors[name], weight) for name, weight in self.weights.items()}

    def state(self, name: str, keep: bool) -> dict[str, Tensor]:
        """Weights and buffers of the module ``name``."""
        return sharding.gathered(self.modules[name].state_dict(), keep)

    def load_modules(self, folder: Path) -> None:
        """Load each module strictly from a checkpoint."""
        load_modules(folder, self.modules)

    def moments(self, keep: bool) -> dict[str, Tensor]:
        """The optimiser's state under "<moment>/<parameter>"."""
        return sharding.gathered(optimizer_tensors(self.optimizer, self.names), keep)

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        """The inverse of ``moments``."""
        load_optimizer(self.optimizer, moments, self.names)

    def export(self, name: str) -> nn.Module:
        """The module ``name``, whole and in eval mode, in every process."""
        if self.templates is None:
            return self.modules[name].eval()
        whole = sharding.assembled(self.templates[name], self.state(name, keep=True))
        return whole.to(self.accelerator.device).eval()


class Together(nn.Module):
    """Modules under one forward, so that DDP, FSDP2 and autocast see the whole loss, whatever it calls."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.trained = nn.ModuleDict(dict(modules))

    def forward(self, function: Callable[..., dict[str, Tensor]], *arguments: Any) -> dict[str, Tensor]:
        return function(*arguments)
