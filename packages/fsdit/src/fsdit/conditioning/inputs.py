"""What one call of the transformer is given: noisy latents with what is known of them, and its context (paper §2.3.1).

Shapes: latents `B C t h w`, masks `B mask_channels t h w`, text embeddings `B L text_dim` (L = text_len), image
embeddings `B M image_dim` (M: patches and the class token).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """What cross-attention sees: text `B L D`, image `B M D'` and, for guidance, the negative text `B L D`."""

    text: Tensor
    image: Tensor | None = None
    negative: Tensor | None = None


@dataclass(frozen=True)
class Condition:
    """Known latents `B C t h w`, zero where nothing is known; the mask says how far to trust them, 0 to 1,
    `B mask_channels t h w`."""

    latents: Tensor
    mask: Tensor


@dataclass(frozen=True)
class FlowBatch:
    """A batch to learn from: clean latents `B C t h w`, the condition they are learned under, and the context."""

    latents: Tensor
    condition: Condition
    context: Context


def first_frame_condition(first_latent: Tensor, t: int, mask_channels: int = 4) -> Condition:
    """The image-to-video condition of t latent frames: the first, `B C 1 h w`, is known, the others are zero and
    masked.

    All mask channels carry the same value; four, as in Wan2.1, one for each video frame of a latent.
    """
    if first_latent.ndim != 5 or first_latent.shape[2] != 1 or t < 1:
        raise ValueError(f"expected a first latent B C 1 h w and t >= 1, got {tuple(first_latent.shape)} and t = {t}")
    batch, _, _, h, w = first_latent.shape
    latents = F.pad(first_latent, (0, 0, 0, 0, 0, t - 1))
    mask = first_latent.new_zeros(batch, mask_channels, t, h, w)
    mask[:, :, 0] = 1
    return Condition(latents, mask)


def nothing_known(latents: Tensor, mask_channels: int = 4) -> Condition:
    """The condition of clips `B C t h w` that are made from the prompt alone: latents and mask are zero."""
    batch, _, *grid = latents.shape
    return Condition(torch.zeros_like(latents), latents.new_zeros(batch, mask_channels, *grid))


def training_condition(latents: Tensor, mask_channels: int = 4) -> Condition:
    """The condition that clean clips `B C t h w` are learned under: their first latent is known.

    Of a single frame nothing is known: its first latent is the very target.
    """
    if latents.shape[2] == 1:
        return nothing_known(latents, mask_channels)
    return first_frame_condition(latents[:, :, :1], latents.shape[2], mask_channels)


def training_context(context: Context, t: int) -> Context:
    """The context that clips of t latent frames are learned under: of a single frame, zeros for the image features.

    Its image features are of the very target. The encoder still gets gradients, which are zero: several processes wait
    for the gradient of every trained weight.
    """
    if t > 1 or context.image is None:
        return context
    return replace(context, image=context.image.masked_fill(torch.ones_like(context.image, dtype=torch.bool), 0))


def model_input(noisy: Tensor, condition: Condition) -> Tensor:
    """noise ‖ mask ‖ condition on the channel axis: `B (C + mask_channels + C) t h w`; a `ValueError` if they do not
    fit."""
    for given in (condition.mask, condition.latents):
        if (len(given), *given.shape[2:]) != (len(noisy), *noisy.shape[2:]):
            raise ValueError(f"latents {tuple(noisy.shape)} with a condition {tuple(given.shape)}; only C may differ")
    mask, known = condition.mask.to(noisy), condition.latents.to(noisy)
    return torch.cat((noisy, mask, known), dim=1)
