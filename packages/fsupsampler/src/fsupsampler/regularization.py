"""What keeps the refiner from copying its draft (paper §2.4.2): the draft is shuffled, partly replaced by the truth,
or dropped.

A refiner that can copy its condition learns nothing else. Each function takes the condition of a batch
(latents `B C t h w`, mask `B mask_channels t h w`) and draws from a CPU generator for each sample on its own.
Frame 0 is the image's and is never touched.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from fsdit.conditioning.inputs import Condition
from fsupsampler.training.config import RegularizationConfig


def regularize(condition: Condition, clean: Tensor, config: RegularizationConfig, generator: Generator) -> Condition:
    """Shuffle, then replace by `clean`, then drop: so true frames keep their places, and a dropped draft is dropped
    whole."""
    shuffled = shuffle_frames(condition.latents, config, generator)
    replaced = replace_frames(Condition(shuffled, condition.mask), clean, config, generator)
    return drop_condition(replaced, config.dropout, generator)


def shuffle_frames(latents: Tensor, config: RegularizationConfig, generator: Generator) -> Tensor:
    """Frames after the first out of order, with `config.shuffle` probability (paper: 0.5)."""
    batch, _, t = latents.shape[:3]
    orders = [
        frame_order(t, config, generator) if _draw(generator) < config.shuffle else torch.arange(t)
        for _ in range(batch)
    ]
    index = torch.stack(orders).to(latents.device)
    return latents[torch.arange(batch, device=latents.device).unsqueeze(1), :, index].transpose(1, 2)


def frame_order(t: int, config: RegularizationConfig, generator: Generator) -> Tensor:
    """A permutation of `0 ... t-1` that keeps 0, of one of three kinds drawn in `config.shuffle_ratios`.

    Neighbours: a window of `config.shuffle_window` adjacent frames is permuted. Distant: two frames that
    are not adjacent change places. All: every frame. Clips too short for two distant frames (t < 4) have all
    permuted instead.
    """
    order = torch.arange(t)
    if t < 3:
        return order
    ratios = torch.tensor(config.shuffle_ratios, dtype=torch.float64)
    kind = int(torch.multinomial(ratios, 1, generator=generator))
    if kind == 0:
        size = min(config.shuffle_window, t - 1)
        start = int(torch.randint(1, t - size + 1, (1,), generator=generator))
        order[start : start + size] = start + torch.randperm(size, generator=generator)
    elif kind == 1 and t >= 4:
        pairs = torch.combinations(torch.arange(1, t))
        pairs = pairs[pairs[:, 1] - pairs[:, 0] > 1]
        first, second = pairs[int(torch.randint(len(pairs), (1,), generator=generator))].tolist()
        order[first], order[second] = second, first
    else:
        order[1:] = 1 + torch.randperm(t - 1, generator=generator)
    return order


def replace_frames(
    condition: Condition, clean: Tensor, config: RegularizationConfig, generator: Generator
) -> Condition:
    """Some drafted frames become the true ones, with mask 1, so that the model learns to trust the mask in every frame.

    In a share `config.replacement` of the samples; there, each frame with a probability that is uniform
    between 0 and `config.replacement_fraction`.
    """
    batch, _, t = clean.shape[:3]
    chosen = torch.rand(batch, 1, generator=generator) < config.replacement
    fraction = config.replacement_fraction * torch.rand(batch, 1, generator=generator)
    frames = chosen & (torch.rand(batch, t, generator=generator) < fraction)
    frames[:, 0] = False
    where = frames.view(batch, 1, t, 1, 1).to(clean.device)
    latents = torch.where(where, clean.to(condition.latents), condition.latents)
    return Condition(latents, condition.mask.masked_fill(where, 1))


def drop_condition(condition: Condition, probability: float, generator: Generator) -> Condition:
    """A share of the samples loses its draft, latents and mask, so that plain image-to-video is not forgotten."""
    batch, _, t = condition.latents.shape[:3]
    kept = torch.rand(batch, 1, generator=generator) >= probability
    frames = kept.expand(batch, t).clone()
    frames[:, 0] = True
    frames = frames.view(batch, 1, t, 1, 1).to(condition.latents.device)
    return Condition(condition.latents * frames, condition.mask * frames)


def _draw(generator: Generator) -> float:
    return float(torch.rand((), generator=generator))
