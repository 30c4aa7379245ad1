"""The whole model in each process: DDP averages the gradients; alone, a process trains by itself."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fsae.training.checkpointing import load_modules, load_optimizer
from fsae.training.config import LoopConfig
from fsae.training.engines.protocol import Engine, ModuleSet, OneForward, eval_mode


class Replicated(Engine):
    """Modules that every process holds whole; the only engine that scales losses for fp16."""

    sharded = False

    def __init__(self, accelerator: Accelerator, trained: ModuleSet, config: LoopConfig) -> None:
        self.modules = trained.modules
        self.accumulation = config.gradient_accumulation_steps
        self.forward = accelerator.prepare_model(OneForward(self.modules).to(accelerator.device))
        self.names = trained.names()
        self.optimizer = trained.make_optimizer()
        # One scaler for each optimiser: a shared one would be updated between their steps.
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.mixed_precision == "fp16")

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss / self.accumulation).backward()

    def clip(self, max_norm: float) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(list(self.names), max_norm or float("inf")).float()

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def evaluating(self) -> AbstractContextManager[None]:
        return eval_mode(self.modules)

    def gathered(self, parts: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in parts.items()} if keep else {}

    def parts(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensors[name] for name in self.weights}

    def load_modules(self, folder: Path) -> None:
        load_modules(folder, self.modules)

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        load_optimizer(self.optimizer, moments, self.names)

    def scaler_state(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(state))

    def export(self, name: str) -> nn.Module:
        return self.modules[name].eval()
