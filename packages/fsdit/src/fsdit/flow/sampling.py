"""Denoising: from noise to latents along the flow, with classifier-free guidance in one batch (paper §3.2).

Shapes: noise and latents ``B C t h w``. State and guidance are kept in float32, and the model is told the unrounded
timestep 1000·sigma, as in training. What cross-attention makes of prompt and image is the same in every step and is
made once. Between the first step and the last the host waits for nothing, so that a GPU is never idle and the whole
run can be one CUDA graph (`CapturedDenoise`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fsae.errors import UserError
from fsdit.conditioning.inputs import Condition, Context, model_input
from fsdit.flow.path import TIMESTEPS, FlowSchedule
from fsdit.flow.solvers import SolverName, make_solver
from fsdit.layers.context import ContextCache
from fsdit.model import FSDiT


@dataclass(frozen=True)
class Step:
    """What a callback sees after each step.

    Attributes:
        index: 0 ... total - 1.
        total: number of steps.
        sigma: the noise level the step started from.
        latents: ``B C t h w`` after the step.
        clean: the model's (guided) estimate of the clean latents at ``sigma``.
    """

    index: int
    total: int
    sigma: float
    latents: Tensor
    clean: Tensor


StepCallback = Callable[[Step], bool | None]
"""Called after every step. True ends the sampling with the clean estimate of that step; what it raises, without one."""


class GuidedVelocity:
    """v_uncond + guidance·(v_cond - v_uncond) in float32; the branches differ in their text alone and share one batch.

    With guidance 1 the unconditional branch has no say and is not run.

    Args:
        model: an FSDiT, or anything called as one.
        condition: known latents and their mask.
        context: text, image and negative-text embeddings.
        guidance: the scale.

    Raises:
        UserError: guidance without a negative embedding, or with one of another length than the text's.
    """

    def __init__(self, model: nn.Module, condition: Condition, context: Context, guidance: float) -> None:
        self.model, self.condition, self.guidance = model, condition, guidance
        self.text, self.image = context.text, context.image
        self.branches = 1 if guidance == 1 else 2
        if self.branches == 2:
            self.text = self._both_texts(context)
            # One image serves any batch; attention broadcasts it.
            if context.image is not None and len(context.image) > 1:
                self.image = torch.cat((context.image, context.image))
        self.cache = {"cache": ContextCache()} if isinstance(model, FSDiT) else {}

    def _both_texts(self, context: Context) -> Tensor:
        """Text and negative, ``2B L D``; a single one of either is repeated."""
        text, negative = context.text, context.negative
        if negative is None:
            raise UserError(
                f"guidance {self.guidance} needs the embedding of a negative (or empty) prompt; none was given"
            )
        if negative.shape[1:] != text.shape[1:]:
            raise UserError(
                f"the negative embedding is {tuple(negative.shape)}, the text's {tuple(text.shape)}; give both at one "
                "length"
            )
        batch = len(self.condition.latents)
        return torch.cat([part.expand(batch, -1, -1) if len(part) == 1 else part for part in (text, negative)])

    def __call__(self, latents: Tensor, timestep: float) -> Tensor:
        """Latents ``B C t h w`` at 1000·sigma = timestep -> velocity ``B C t h w``."""
        inputs = model_input(latents, self.condition)
        if self.branches == 2:
            inputs = torch.cat((inputs, inputs))
        times = latents.new_full((len(inputs),), timestep)
        velocity = self.model(inputs, times, self.text, self.image, **self.cache).float()
        if self.branches == 1:
            return velocity
        conditional, unconditional = velocity.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)


@torch.no_grad()
def denoise(
    model: nn.Module,
    noise: Tensor,
    condition: Condition,
    context: Context,
    *,
    schedule: FlowSchedule,
    steps: int,
    guidance: float = 1.0,
    solver: SolverName = "unipc",
    callback: StepCallback | None = None,
) -> Tensor:
    """Clean latents from noise.

    Args:
        model: an FSDiT, or anything called as one.
        noise: ``B C t h w``, standard normal, drawn by the caller from a CPU generator.
        condition: known latents and their mask (`fsdit.conditioning.first_frame_condition`).
        context: text, image and negative-text embeddings.
        schedule: the noise levels.
        steps: model evaluations; each costs two samples of batch when guided.
        guidance: classifier-free guidance scale; 1 switches it off.
        solver: ``unipc`` or ``euler``.
        callback: called after every step; it may end the sampling.

    Returns:
        ``B C t h w`` float32.
    """
    run = make_solver(solver, schedule.sigmas(steps))
    velocity_of = GuidedVelocity(model, condition, context, guidance)
    latents = noise.float()
    for index, sigma in enumerate(run.sigmas[:-1]):
        velocity = velocity_of(latents, TIMESTEPS * sigma)
        before, latents = latents, run.step(index, latents, velocity)
        if callback is not None:
            clean = before - sigma * velocity
            if callback(Step(index, steps, sigma, latents, clean)):
                return clean
    return latents


class CapturedDenoise:
    """`denoise` as one CUDA graph: all steps of all blocks are launched at once and the host has nothing to do.

    The graph holds for the shapes, the steps and the weights' places that it was made with; weights may change in
    place. It keeps its own working memory, about what one forward takes and the keys and values of every block.

    Args:
        model: on a GPU, in eval mode, compiled or not.
        noise: as `denoise` takes it; so are ``condition`` and ``context``. Their values are examples.
        condition: likewise.
        context: likewise.
        options: of `denoise`; a callback cannot be one of them.

    Raises:
        UserError: no GPU, or a callback.
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
        """As `denoise`, ``B C t h w`` float32.

        Raises:
            ValueError: shapes other than those of the examples.
        """
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
