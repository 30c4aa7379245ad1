"""A whole sampling run as one CUDA graph, for as many videos of one shape as there are (paper §3.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fsae.errors import UserError
from fsdit.conditioning.inputs import Condition, Context
from fsdit.flow.sampling import denoise
from fsdit.model import FSDiT


class CapturedDenoise:
    """`denoise` as one CUDA graph: all steps of all blocks are launched at once and the host has nothing to do.

    The graph is bound to the shapes, the steps and the weights' memory that it was made with; weights may change in
    place. It keeps working memory of its own: that of one forward, and the keys and values of every block.

    Arguments are those of `denoise`, values of noise, condition and context but examples; the model is in eval mode on
    a GPU, compiled or not. UserError without a GPU, or with a callback.
    """

    def __init__(self, model: nn.Module, noise: Tensor, condition: Condition, context: Context, **options: Any) -> None:
        if not noise.is_cuda:
            raise UserError(f"a CUDA graph needs tensors on an NVIDIA GPU, these are on {noise.device}; call denoise")
        if options.get("callback") is not None:
            raise UserError("a CUDA graph runs without the host, so there is no callback; call denoise to have one")
        self._inputs = noise.clone(), _map(condition, Tensor.clone), _map(context, Tensor.clone)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what runs a first time allocates, compiles and fills tables: not in the graph
            denoise(model, *self._inputs, **{**options, "steps": 2})
        torch.cuda.current_stream().wait_stream(side)
        # The graph reads these tables where they are, also when no other call has needed them for long.
        self._tables = model.rotary(noise) if isinstance(model, FSDiT) else None
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._latents = denoise(model, *self._inputs, **options)

    def __call__(self, noise: Tensor, condition: Condition, context: Context) -> Tensor:
        """As `denoise`, `B C t h w` float32; a `ValueError` for shapes other than those of the examples."""
        for given, kept in zip(_tensors(noise, condition, context), _tensors(*self._inputs), strict=True):
            if given.shape != kept.shape:
                raise ValueError(f"captured for {tuple(kept.shape)}, {tuple(given.shape)} given")
            kept.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._latents.clone()


def _map(group: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A Condition or Context of changed tensors."""
    values = {field.name: getattr(group, field.name) for field in fields(group)}
    return replace(group, **{name: function(value) for name, value in values.items() if value is not None})


def _tensors(noise: Tensor, condition: Condition, context: Context) -> list[Tensor]:
    groups = (condition, context)
    found = [getattr(group, field.name) for group in groups for field in fields(group)]
    return [noise, *(tensor for tensor in found if tensor is not None)]
