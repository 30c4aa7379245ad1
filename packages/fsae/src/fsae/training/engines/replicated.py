"""The whole model in each process: DDP averages the gradients; alone, a process trains by itself."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fsae.storage.pieces import Piece
from fsae.training.config import LoopConfig
from fsae.training.engines.protocol import Engine, ModuleSet, OneForward, eval_mode


class Replicated(Engine):
    """Modules that every process holds whole; the only engine that scales losses for fp16."""

    sharded = False

    def __init__(self, accelerator: Accelerator, trained: ModuleSet, config: LoopConfig) -> None:
        self.modules, self.device = trained.modules, accelerator.device
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

    def piece(self, tensor: Tensor) -> Piece:
        return Piece(tensor.detach(), 0, tuple(tensor.shape))

    def scaler_state(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(state))
