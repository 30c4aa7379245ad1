"""Denoising: from noise to latents along the flow, with classifier-free guidance in one batch (paper §3.2).

Shapes: noise and latents `B C t h w`. State and guidance are kept in float32, and the model's timestep 1000·sigma is
not rounded, as in training. What cross-attention makes of prompt and image is the same in every step and is made once.
Between the first step and the last the host waits for nothing, so that a GPU is never idle and the whole run can be one
CUDA graph (`fsdit.flow.capture`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    """What a callback sees after step `index` of `total`: the noise level it started from, the latents `B C t h w`
    after it, and the model's (guided) estimate of the clean latents at that level."""

    index: int
    total: int
    sigma: float
    latents: Tensor
    clean: Tensor


StepCallback = Callable[[Step], bool | None]
"""Called after every step. True ends the sampling with that step's clean estimate; an exception ends it without."""


class GuidedVelocity:
    """v_uncond + guidance·(v_cond - v_uncond) in float32; the branches differ in their text alone and share one batch.

    With guidance 1 the unconditional branch has no say and is not run. UserError for guidance without a negative
    embedding, or with one of another length than the text's.
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
        """Text and negative, `2B L D`; a single one of either is repeated."""
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
        """Latents `B C t h w` at 1000·sigma = timestep -> velocity `B C t h w`."""
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
    """Clean latents from noise, `B C t h w` float32.

    Args:
        model: an FSDiT, or anything called as one.
        noise: `B C t h w`, standard normal, drawn by the caller from a CPU generator.
        condition: known latents and their mask (`fsdit.conditioning.first_frame_condition`).
        context: text, image and negative-text embeddings.
        schedule: the noise levels.
        steps: model evaluations; each costs two samples of batch when guided.
        guidance: classifier-free guidance scale; 1 switches it off.
        solver: `unipc` or `euler`.
        callback: called after every step; it may end the sampling.
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
