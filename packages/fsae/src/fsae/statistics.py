"""The statistics that latents are normalised by: one mean and one standard deviation a channel."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def latent_statistics(config: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, each `1 C 1 1 1`, in the dtype and on the device of `like`.

    config: of a model, with `latent_channels`, `latents_mean` and `latents_std`, C numbers each; None is 0 and 1.
    """
    ones = [1.0] * config.latent_channels
    mean = [0.0] * config.latent_channels if config.latents_mean is None else config.latents_mean
    std = ones if config.latents_std is None else config.latents_std
    return like.new_tensor(mean).view(1, -1, 1, 1, 1), like.new_tensor(std).view(1, -1, 1, 1, 1)
