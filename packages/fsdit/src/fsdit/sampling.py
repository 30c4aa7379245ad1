"""Denoising: from noise to latents along the flow, with classifier-free guidance in one batch (paper §3.2).

Shapes: noise and latents ``B C t h w``. The solvers are diffusers' (UniPC of order 2 in its bh2 form, as Wan2.1
samples, and Euler); they are handed our noise levels and shift nothing themselves. State and guidance are kept in
float32, and the model is told the unrounded timestep 1000·sigma, as in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fsae.errors import UserError
from fsdit.conditioning import Condition, Context, model_input
from fsdit.flow import TIMESTEPS, FlowSchedule, clean_from_velocity

Solver = Literal["unipc", "euler"]


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


StepCallback = Callable[[Step], None]


def make_scheduler(solver: Solver, sigmas: Tensor) -> Any:
    """A diffusers scheduler set to ``sigmas``, whose last one is 0."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    if solver == "unipc":
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, solver_type="bh2", flow_shift=1.0
        )
    elif solver == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    else:
        raise UserError(f"solver {solver!r} given; one of {', '.join(get_args(Solver))} is accepted")
    scheduler.set_timesteps(sigmas=sigmas[:-1].numpy())
    scheduler.set_begin_index(0)
    return scheduler


def guided_velocity(
    model: nn.Module, latents: Tensor, condition: Condition, context: Context, timestep: float, guidance: float
) -> Tensor:
    """v_uncond + guidance·(v_cond - v_uncond) in float32; the branches differ in their text alone and share one batch.

    With guidance 1 the unconditional branch has no say and is not run.
    """
    inputs = model_input(latents, condition)
    if guidance == 1:
        times = latents.new_full((len(latents),), timestep)
        return model(inputs, times, context.text, context.image).float()
    if context.negative is None:
        raise UserError(f"guidance {guidance} needs the embedding of a negative (or empty) prompt; none was given")
    text = torch.cat((context.text, context.negative))
    image = None if context.image is None else torch.cat((context.image, context.image))
    times = latents.new_full((2 * len(latents),), timestep)
    conditional, unconditional = model(torch.cat((inputs, inputs)), times, text, image).float().chunk(2)
    return unconditional + guidance * (conditional - unconditional)


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
    solver: Solver = "unipc",
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
        callback: called after every step; what it raises ends the sampling.

    Returns:
        ``B C t h w`` float32.
    """
    scheduler = make_scheduler(solver, schedule.sigmas(steps))
    latents = noise.float()
    levels = zip(scheduler.sigmas[:-1].tolist(), scheduler.timesteps, strict=True)
    for index, (sigma, timestep) in enumerate(levels):
        v = guided_velocity(model, latents, condition, context, TIMESTEPS * sigma, guidance)
        clean = clean_from_velocity(latents, v, torch.tensor(sigma))
        latents = scheduler.step(v, timestep, latents, return_dict=False)[0]
        if callback is not None:
            callback(Step(index, steps, sigma, latents, clean))
    return latents
