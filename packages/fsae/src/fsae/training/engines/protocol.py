"""What the loop asks of an engine, and what every engine is made of.

An engine holds modules that one optimiser updates, and decides how they lie on devices and processes. There are three:
`Replicated` (each process has the whole model), `Fsdp2` and `Zero3` (each has a part of every weight, gradient and
moment). What goes to disk and comes from it are pieces of whole tensors (`fsae.storage.pieces`), so a run may go on
under another engine, in any number of processes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fsae.errors import CheckpointError
from fsae.storage.pieces import Piece, StoredTensor, load_pieces, stored_tensors
from fsae.training.config import OptimizerConfig
from fsae.training.optimizers import make_optimizer


@dataclass(frozen=True)
class ModuleSet:
    """Modules that are updated together: what is trained, or what it is trained against. `parameter_groups` makes the
    optimiser's groups of their parameters."""

    modules: Mapping[str, nn.Module]
    parameter_groups: Callable[[OptimizerConfig], list[dict[str, Any]]]
    optimizer: OptimizerConfig

    def names(self) -> dict[nn.Parameter, str]:
        """ "<module>.<parameter>" of everything that is trained."""
        return {
            p: f"{name}.{key}" for name, m in self.modules.items() for key, p in m.named_parameters() if p.requires_grad
        }

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the parameters as they are now."""
        return make_optimizer(self.parameter_groups(self.optimizer), self.optimizer)


class OneForward(nn.Module):
    """Modules under one forward, so that DDP, FSDP2 and autocast see the whole loss, whatever it calls."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.trained = nn.ModuleDict(dict(modules))

    def forward(self, function: Callable[..., dict[str, Tensor]], *arguments: Any) -> dict[str, Tensor]:
        return function(*arguments)


class Engine(Protocol):
    """Modules that are updated together: a step of theirs, and what is kept of them.

    Attributes:
        sharded: Whether each process holds but a part of the weights.
        modules: What is trained, by name.
        names: "<module>.<parameter>" of each trained parameter.
        optimizer: What updates them.
        device: Where it computes.
        forward: `forward(function, *arguments)` calls the function so that DDP, FSDP2, ZeRO-3 and autocast see it.
    """

    sharded: bool
    modules: Mapping[str, nn.Module]
    names: Mapping[nn.Parameter, str]
    optimizer: torch.optim.Optimizer
    device: torch.device
    forward: nn.Module

    # --- the same in every engine

    def set_rate(self, factor: float) -> float:
        """Set the learning rates to a share of their peaks; returns the first group's."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    @contextmanager
    def without_gradients(self) -> Iterator[None]:
        """No parameter collects gradients while the context lasts."""
        for parameter in self.names:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self.names:
                parameter.requires_grad_(True)

    # --- a step

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's loss, a share of the step's."""

    @abstractmethod
    def clip(self, max_norm: float) -> Tensor:
        """The gradient's global L2 norm; it is scaled down to `max_norm` (0 for any) before the step."""

    @abstractmethod
    def step(self) -> None:
        """Update the weights and forget the gradient."""

    @abstractmethod
    def evaluating(self) -> AbstractContextManager[None]:
        """Eval mode, in which weights may be exchanged; every module then has the mode it had."""

    # --- what is kept

    @property
    def weights(self) -> dict[str, Tensor]:
        """What this process holds of each trained weight, to be averaged as it is."""
        return {name: parameter for parameter, name in self.names.items()}

    @abstractmethod
    def piece(self, tensor: Tensor) -> Piece:
        """What this process holds of a tensor that lies as a weight, a buffer or a moment of one does."""

    def state(self, name: str) -> dict[str, Piece]:
        """Weights and buffers of the module `name`."""
        return {key: self.piece(tensor) for key, tensor in self.modules[name].state_dict().items()}

    def average(self, shadow: Mapping[str, Tensor]) -> dict[str, Piece]:
        """An average of the `weights`."""
        return {name: self.piece(tensor) for name, tensor in shadow.items()}

    def moments(self) -> dict[str, Piece]:
        """The optimiser's state under "<moment>/<parameter>"."""
        state = self.optimizer.state
        return {
            f"{moment}/{name}": self.piece(torch.as_tensor(value))
            for parameter, name in self.names.items()
            for moment, value in state.get(parameter, {}).items()
        }

    def load_modules(self, folder: Path) -> None:
        """Load each module strictly from a checkpoint."""
        for name, module in self.modules.items():
            stored = stored_tensors(folder, name)
            load_pieces(self.state(name), stored, type(module).__name__, folder / f"{name}.safetensors")

    def load_moments(self, stored: Mapping[str, StoredTensor]) -> None:
        """The inverse of `moments`.

        Raises:
            CheckpointError: it names what is not trained.
        """
        parameters = {name: parameter for parameter, name in self.names.items()}
        self.optimizer.state.clear()
        for key, tensor in stored.items():
            moment, name = key.split("/", 1)
            if name not in parameters:
                raise untrained(name)
            like = parameters[name]
            if moment == "step" or tensor.shape != like.shape:
                value = tensor.whole()
            else:
                value = torch.empty_like(like, requires_grad=False)
                piece = self.piece(value)
                piece.values.copy_(tensor.read(piece.start, piece.values.numel()).view(piece.values.shape))
            self.optimizer.state[like][moment] = value

    def scaler_state(self) -> dict[str, Any]:
        """The loss scaler's state; empty without one."""
        return {}

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `scaler_state`."""

    def template(self, name: str) -> nn.Module | None:
        """The module `name` as it was before it was split, without its weights; None where it is whole."""
        return None


def untrained(name: str) -> CheckpointError:
    """The error of an optimiser's state that names what there is none of."""
    return CheckpointError(f"the optimiser's state names {name}, which is not trained in this run")


@contextmanager
def eval_mode(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Eval mode while the context lasts; every module then has the mode it had."""
    training = {m: m.training for module in modules.values() for m in module.modules()}
    for module in modules.values():
        module.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
