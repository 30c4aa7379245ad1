"""Gradient checkpointing: what a layer does inside is computed anew in the backward pass rather than kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fsae.streaming import FrameCache


class Recomputed(nn.Module):
    """A module that runs its parts so where that is asked for.

    Attributes:
        gradient_checkpointing: whether it is; `enable_gradient_checkpointing` of the model sets it.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any]

    @property
    def recomputes(self) -> bool:
        """Whether what runs now is computed anew later."""
        return self.gradient_checkpointing and torch.is_grad_enabled()

    def run(
        self,
        layer: nn.Module,
        *inputs: Any,
        cache: FrameCache | None = None,
        call: Callable[..., Any] | None = None,
    ) -> Any:
        """layer(*inputs), or call(*inputs), with the cache where there is one.

        Args:
            layer: what runs, or the layers whose frames `call` keeps.
            inputs: tensors, and what does not change before the backward pass.
            cache: the state of a stream. It moves on, while what is computed anew sees the frames of the first time;
                gradients pass through them from chunk to chunk.
            call: what runs, if it is not the layer itself.
        """
        function: Callable[..., Any] = layer if call is None else call
        if not self.recomputes:
            return function(*inputs) if cache is None else function(*inputs, cache=cache)
        if cache is None:
            return self._gradient_checkpointing_func(function, *inputs)
        before = cache.of(layer)

        def chunk(*inputs: Any) -> tuple[Any, FrameCache]:
            after = before.copy()
            return function(*inputs, cache=after), after

        made, after = self._gradient_checkpointing_func(chunk, *inputs)
        cache.update(after)
        return made
