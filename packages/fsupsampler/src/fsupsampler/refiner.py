"""The refiner's condition (paper §2.4.2): the image's own latent, the upsampled draft, and how far to trust it.

The refiner is an FSDiT that denoises high-resolution latents from pure noise. Its condition has the shape of
the base model's (`fsdit.conditioning.Condition`), filled differently:

    latents  z_hr at frame 0, the upsampled base latents U at the frames after it      B C t h w
    mask     1 at frame 0, the dynamic mask m(h, w) at the frames after it             B mask_channels t h w

Latents are normalised and, all but the base's, of the high resolution: h, w are those of the output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from fsae.errors import UserError
from fsdit.conditioning.inputs import Condition, FlowBatch, model_input
from fsdit.flow.path import TIMESTEPS, interpolate

MaskRule = Callable[[Tensor], Tensor]
"""Error map `B 1 1 h w` -> mask `B 1 1 h w` in [0, 1]."""


def error_map(first_latent: Tensor, upsampled: Tensor) -> Tensor:
    """e(h, w) = mean over channels of |z_hr - U_0|: how wrong the draft is where the truth is known.

    The paper (§2.4.2) writes |z - ẑ| for tensors of two resolutions; both are taken at the high one here: z_hr, the
    image's latent, `B C 1 h w`, and U `B C t h w` -> `B 1 1 h w`, at least float32.
    """
    draft = upsampled[:, :, :1]
    if first_latent.shape != draft.shape:
        wanted, given = tuple(draft.shape), tuple(first_latent.shape)
        raise ValueError(f"the image's latent must be {wanted}, as the draft's first frame, but is {given}")
    error = (first_latent.float() - draft.float()) if first_latent.itemsize < 4 else first_latent - draft
    return error.abs().mean(dim=1, keepdim=True)


# The base class is diffusers' for a pipeline's component that has a configuration and no weights; no other
# will be saved and loaded with a pipeline.
class DynamicMask(SchedulerMixin, ConfigMixin):
    """The mask of the drafted frames, from the error of the first (paper §2.4.2).

        m(h, w) = high - (high - low) · clip((e(h, w) - e5) / (e95 - e5), 0, 1)

    1 would mean certain, 0 unknown. e5 and e95 are the error's percentiles over the training data, which
    `RunningMask` finds, so that m tells a good draft from a bad one; bounds taken from the sample itself
    would make all drafts alike.

    Args:
        low: the mask where the error is e95 or more; above 0, which means that nothing is known.
        high: the mask where the error is e5 or less; below 1, which is kept for true latents.
        error_5: e5. The default bounds fit latents of unit variance before any percentiles are known.
        error_95: e95, above e5.
        scalar: one number for the whole frame, from the mean of e.
        inverted: high where the error is high.
    """

    config_name = "mask_config.json"

    @register_to_config
    def __init__(
        self,
        low: float = 0.1,
        high: float = 0.9,
        error_5: float = 0.0,
        error_95: float = 1.0,
        scalar: bool = False,
        inverted: bool = False,
    ) -> None:
        if not 0 <= low <= high <= 1:
            raise UserError(f"mask range {low} to {high} given; 0 <= low <= high <= 1 is accepted")
        if not error_5 < error_95:
            raise UserError(f"mask error bounds {error_5} and {error_95} given; the first must be below the second")

    def __call__(self, error: Tensor) -> Tensor:
        """Error map `B 1 1 h w` -> mask `B 1 1 h w`."""
        return self.between(error, self.config.error_5, self.config.error_95)

    def between(self, error: Tensor, error_5: Tensor | float, error_95: Tensor | float) -> Tensor:
        """The mask under other percentiles than the configuration's."""
        if self.config.scalar:
            error = error.mean(dim=(-2, -1), keepdim=True).expand_as(error)
        share = ((error - error_5) / (error_95 - error_5)).clamp(0, 1)
        if self.config.inverted:
            share = 1 - share
        return self.config.high - (self.config.high - self.config.low) * share


class RunningMask(nn.Module):
    """A dynamic mask that learns its percentiles while the refiner trains.

    Each error map seen in training mode moves them: a plain average of the first maps' percentiles, then an
    exponential one. They are buffers, so that they are saved and resumed with the run. Processes that train together
    move theirs by the mean of what they saw, so that all hold the same.
    """

    error_5: Tensor
    error_95: Tensor
    updates: Tensor

    def __init__(self, mask: DynamicMask, decay: float = 0.99) -> None:
        super().__init__()
        self.mask = mask
        self.decay = decay
        self.register_buffer("error_5", torch.tensor(float(mask.config.error_5)))
        self.register_buffer("error_95", torch.tensor(float(mask.config.error_95)))
        self.register_buffer("updates", torch.tensor(0))

    def forward(self, error: Tensor) -> Tensor:
        """Error map `B 1 1 h w` -> mask `B 1 1 h w`."""
        if self.training:
            self._update(error.detach())
        return self.mask.between(error, *self._bounds())

    def frozen(self) -> DynamicMask:
        """The mask for inference, with the percentiles found so far."""
        kept = {name: self.mask.config[name] for name in ("low", "high", "scalar", "inverted")}
        error_5, error_95 = (float(bound) for bound in self._bounds())
        return DynamicMask(error_5=error_5, error_95=error_95, **kept)

    def _bounds(self) -> tuple[Tensor, Tensor]:
        """The percentiles, kept apart: equal errors everywhere would divide by zero."""
        return self.error_5, torch.maximum(self.error_95, self.error_5 + 1e-6)

    def pass_by(self) -> None:
        """Say of a batch that has no error map: in training, other processes may have one and wait for this one."""
        if self.training:
            self._update(None)

    @torch.no_grad()
    def _update(self, error: Tensor | None) -> None:
        levels = self.error_5.new_tensor([0.05, 0.95])
        seen = levels.new_zeros(3)  # sums of the percentiles, and how many they are of
        if error is not None:
            seen[:2], seen[2] = torch.quantile(error.to(levels).flatten(), levels), 1
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen)
        *found, count = seen.unbind()
        if count == 0:
            return
        rate = (1 / (self.updates + 1)).clamp(min=1 - self.decay)
        self.error_5.lerp_(found[0] / count, rate)
        self.error_95.lerp_(found[1] / count, rate)
        self.updates += 1


def refiner_condition(first_latent: Tensor, upsampled: Tensor, mask: MaskRule, mask_channels: int = 4) -> Condition:
    """The refiner's condition: [z_hr, U_1 ... U_{t-1}], and the mask 1 at frame 0 and m(h, w) after it.

    z_hr is the image's latent, `B C 1 h w`, U are the upsampled base latents, `B C t h w`; U_0 only serves to measure
    the error. All mask channels carry the same value.
    """
    confidence = mask(error_map(first_latent, upsampled)).to(upsampled)
    batch, _, t, h, w = upsampled.shape
    latents = torch.cat((first_latent.to(upsampled), upsampled[:, :, 1:]), dim=2)
    values = confidence.expand(batch, mask_channels, t, h, w).clone()
    values[:, :, 0] = 1
    return Condition(latents, values)


def deviation_estimate(noise: Tensor, predicted: Tensor) -> Tensor:
    """z̃_0 = ε - v̂, an imperfect clean latent from one step of the base model (paper §2.4.2, eq. 10-13).

    With the true velocity v = ε - z_0 this is z_0 + (v - v̂): the clean latent off by the velocity's error,
    at every noise level. (The estimate z_σ - σ·v̂ would shrink the error by σ.)
    """
    return noise - predicted


@torch.no_grad()
def deviation_latents(base: nn.Module, clean: FlowBatch, noise: Tensor, sigma: Tensor) -> Tensor:
    """What the refiner's draft is made of in training: the base model's `deviation_estimate` at sigma `B`, in one
    forward pass with its conditional branch alone. `clean` are low-resolution latents with the base's own condition and
    context."""
    inputs = model_input(interpolate(clean.latents, noise, sigma), clean.condition)
    predicted = base(inputs, TIMESTEPS * sigma, clean.context.text, clean.context.image)
    return deviation_estimate(noise, predicted.to(noise))
