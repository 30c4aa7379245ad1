"""The latent upsampler: twice the height and width, without leaving latent space (paper §2.4.1).

    latents `B C t h w`  ->  latents `B C t 2h 2w`

    z -> un-normalise -> Conv3d C -> 4M -> PixelShuffle(2) -> norm, SiLU -> ResBlock x n -> Conv3d M -> C
      -> + nearest-neighbour copy of the input -> normalise

Shuffling before the residual blocks lets all of them work at the high resolution. The last convolution starts
at zero, so that training starts from the nearest-neighbour copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from fsae.errors import UserError
from fsae.layers.conv import VideoConv3d
from fsae.layers.norm import PixelNorm
from fsae.statistics import latent_statistics
from fsae.storage.checkpoint import StrictModelMixin
from fsupsampler.presets import PRESETS

NormKind = Literal["group", "pixel"]
TemporalPadding = Literal["zeros", "replicate"]


def _conv(in_channels: int, out_channels: int, padding: TemporalPadding) -> nn.Conv3d:
    """3 x 3 x 3, zeros around each frame; before the first and after the last frame zeros or copies of it."""
    if padding == "zeros":
        return nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
    return VideoConv3d(in_channels, out_channels, time="standard")


def _norm(channels: int, kind: NormKind, groups: int) -> nn.Module:
    return nn.GroupNorm(groups, channels) if kind == "group" else PixelNorm(channels)


class ResBlock(nn.Module):
    """SiLU(x + norm(conv(SiLU(norm(conv x))))): the activation follows the sum, as LTX-Video has it."""

    def __init__(self, channels: int, norm: NormKind, groups: int, padding: TemporalPadding) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels, padding)
        self.norm1 = _norm(channels, norm, groups)
        self.conv2 = _conv(channels, channels, padding)
        self.norm2 = _norm(channels, norm, groups)

    def forward(self, x: Tensor) -> Tensor:
        """`B M t h w` -> the same shape."""
        branch = F.silu(self.norm1(self.conv1(x)))
        return F.silu(x + self.norm2(self.conv2(branch)))


class LatentUpsampler(StrictModelMixin):
    """Spatial x2 for latents of one autoencoder; `from_preset("paper")`.

    Takes and gives latents as `FSAE.encode` returns them. The network itself sees them un-normalised, so it
    carries the autoencoder's statistics (its `latents_mean` and `latents_std`) in its own configuration.

    Args:
        latent_channels: C.
        mid_channels: M, the width of the residual blocks.
        num_blocks: n, residual blocks.
        norm: "group": statistics over groups of channels and the whole clip, so that an output depends on the
            clip's size and length; "pixel": statistics of one position, for training at mixed resolutions and
            for tiles.
        norm_groups: groups of "group"; they divide mid_channels.
        temporal_padding: "zeros", or "replicate": before the first and after the last frame stand copies of
            them, and one image is treated as a static clip.
        latents_mean: mean of each latent channel; None is 0.
        latents_std: standard deviation of each; None is 1.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS
    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResBlock"]
    _repeated_blocks = ["ResBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 128,
        mid_channels: int = 512,
        num_blocks: int = 16,
        norm: NormKind = "group",
        norm_groups: int = 32,
        temporal_padding: TemporalPadding = "zeros",
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _check(
            norm,
            temporal_padding,
            latent_channels,
            {"latents_mean": latents_mean, "latents_std": latents_std},
        )
        if norm == "group" and mid_channels % norm_groups:
            raise UserError(f"mid_channels {mid_channels} given with {norm_groups} norm groups; they must divide it")
        self.conv_in = _conv(latent_channels, 4 * mid_channels, temporal_padding)
        self.norm_in = _norm(mid_channels, norm, norm_groups)
        self.blocks = nn.ModuleList(
            ResBlock(mid_channels, norm, norm_groups, temporal_padding) for _ in range(num_blocks)
        )
        self.conv_out = _conv(mid_channels, latent_channels, temporal_padding)
        nn.init.zeros_(self.conv_out.weight)
        if self.conv_out.bias is not None:
            nn.init.zeros_(self.conv_out.bias)
        self.gradient_checkpointing = False

    def forward(self, latents: Tensor) -> Tensor:
        """Normalised latents `B C t h w` -> normalised latents `B C t 2h 2w`."""
        if latents.ndim != 5 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(f"expected B {self.config.latent_channels} t h w, got {tuple(latents.shape)}")
        mean, std = latent_statistics(self.config, latents)
        raw = latents * std + mean
        x = F.silu(self.norm_in(pixel_shuffle(self.conv_in(raw))))
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x)
        return (self.conv_out(x) + nearest_upsample(raw) - mean) / std


def pixel_shuffle(x: Tensor) -> Tensor:
    """Four channels to a square of four cells, frame by frame: `B 4M t h w` -> `B M t 2h 2w`."""
    frames = F.pixel_shuffle(x.transpose(1, 2).flatten(0, 1), 2)
    return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def nearest_upsample(latents: Tensor) -> Tensor:
    """Every cell copied into a square of four: `B C t h w` -> `B C t 2h 2w`."""
    return latents.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)


def _check(norm: str, padding: str, channels: int, statistics: dict[str, Sequence[float] | None]) -> None:
    for name, value, kind in (("norm", norm, NormKind), ("temporal_padding", padding, TemporalPadding)):
        if value not in get_args(kind):
            raise UserError(f"{name} {value!r} given; one of {', '.join(get_args(kind))} is accepted")
    for name, values in statistics.items():
        if values is not None and len(values) != channels:
            raise UserError(
                f"{name} has {len(values)} numbers; one for each of the {channels} latent channels is needed"
            )
