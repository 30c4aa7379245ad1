"""FSAE (paper §2.2): a video autoencoder that compresses 64 x 64 pixels of 4 frames into 128 numbers.

    video `B 3 T H W` in [-1, 1], T = 1 + 4k, H and W multiples of 64   <->   latents `B 128 1+k H/64 W/64`

Deterministic, no patchify, no KL. Latents leave `encode` normalised by the statistics in the configuration, one mean
and one standard deviation a channel, and `decode` takes them so: what the diffusion transformer sees is what `encode`
returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from fsae.checkpoint import StrictModelMixin
from fsae.decoder import Decoder, DecoderKind
from fsae.encoder import Encoder
from fsae.errors import UserError
from fsae.layers.blocks import BlockStyle
from fsae.presets import PRESETS
from fsae.statistics import latent_statistics


class FSAE(StrictModelMixin):
    """The autoencoder of FSVideo; `from_preset("standard")` is the paper's, `"lite"` its fast form, `"nano"` a small
    one.

    Args:
        widths: channels of the stages, fine to coarse; one stage halves h and w on the way to the next.
        encoder_depths: blocks of each encoder stage.
        decoder_depths: blocks of each decoder stage.
        decoder_widths: channels of the decoder's stages, if they are not the encoder's.
        latent_channels: channels of a latent.
        residual_stages: how many of the finest stages are residual convolutions; the others are EfficientViT blocks.
        temporal_stages: how many of the finest stages change the frame rate, by two each.
        decoder_kind: "causal", "standard" or "lite".
        first_frame_injection: whether the decoder attends to the encoder's features of frame 0.
        injection_head_dim: channels a head of that attention.
        injection_window: side of its windows, in cells of a stage.
        injection_reach: pixels that the injection's offsets are counted in, so that it follows motion; 0 for none.
        attention_head_dim: channels a head of the linear attention.
        noise: weight of the noise in the decoder's residual blocks; 0 is none.
        norm_eps: epsilon of the pixel norms.
        norm_affine: whether pixel norms have a weight and a bias.
        latents_mean: mean of each latent channel over the training data; None is 0.
        latents_std: standard deviation of each; None is 1.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    @register_to_config
    def __init__(
        self,
        widths: Sequence[int] = (128, 256, 512, 512, 1024, 1024, 2048),
        encoder_depths: Sequence[int] = (2, 2, 2, 3, 3, 3, 3),
        decoder_depths: Sequence[int] = (3, 3, 3, 3, 3, 3, 3),
        decoder_widths: Sequence[int] | None = None,
        latent_channels: int = 128,
        residual_stages: int = 3,
        temporal_stages: int = 2,
        decoder_kind: DecoderKind = "standard",
        first_frame_injection: bool = True,
        injection_head_dim: int = 64,
        injection_window: int = 128,
        injection_reach: float = 0.0,
        attention_head_dim: int = 32,
        noise: float = 0.05,
        norm_eps: float = 1e-5,
        norm_affine: bool = True,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        style = BlockStyle(head_dim=attention_head_dim, eps=norm_eps, norm_affine=norm_affine)
        self.encoder = Encoder(widths, encoder_depths, latent_channels, residual_stages, temporal_stages, style)
        self.decoder = Decoder(
            decoder_widths or widths,
            decoder_depths,
            latent_channels,
            residual_stages,
            temporal_stages,
            decoder_kind,
            BlockStyle(head_dim=attention_head_dim, eps=norm_eps, norm_affine=norm_affine, noise=noise),
            context_widths=widths if first_frame_injection else None,
            injection_head_dim=injection_head_dim,
            injection_window=injection_window,
            injection_reach=injection_reach,
        )

    @property
    def spatial_compression(self) -> int:
        """Pixels a latent cell is wide and high: 64 with seven stages."""
        return int(2 ** (len(self.config.widths) - 1))

    @property
    def temporal_compression(self) -> int:
        """Frames a latent stands for, after the first: 4 with two temporal stages."""
        return int(2**self.config.temporal_stages)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(c, t, h, w) of the latents of a video; a size that does not fit is a `UserError`."""
        space, time = self.spatial_compression, self.temporal_compression
        if frames < 1 or (frames - 1) % time:
            raise UserError(
                f"{frames} frames cannot be encoded; accepted is 1 + {time}k (1, {1 + time}, {1 + 2 * time}, ...); "
                "repeat the last frame or cut the clip"
            )
        if height < space or width < space or height % space or width % space:
            raise UserError(
                f"{width}x{height} pixels cannot be encoded; accepted are multiples of {space}; "
                "resize, crop or pad the frames"
            )
        return self.config.latent_channels, 1 + (frames - 1) // time, height // space, width // space

    def normalize(self, latents: Tensor) -> Tensor:
        """The encoder's latents -> zero mean and unit deviation a channel, as measured on the training data."""
        mean, std = latent_statistics(self.config, latents)
        return (latents - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        mean, std = latent_statistics(self.config, latents)
        return latents * std + mean

    def encode(self, video: Tensor) -> Tensor:
        """Video `B 3 T H W` in [-1, 1] -> normalised latents `B c t h w`. An image is a video of one frame."""
        self.latent_shape(*video.shape[2:])
        return self.normalize(self.encoder(video))

    def first_frame_features(self, first_frame: Tensor) -> list[Tensor]:
        """First frame `B 3 1 H W` in [-1, 1] -> the features that `decode` injects, fine to coarse, each `B C h w`."""
        self.latent_shape(*first_frame.shape[2:])
        return [feature[:, :, 0] for feature in self.encoder.features(first_frame[:, :, :1])[0]]

    def decode(
        self,
        latents: Tensor,
        first_frame: Tensor | Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Normalised latents `B c t h w` -> video `B 3 1+4(t-1) 64h 64w`, about [-1, 1] and not clamped.

        Args:
            latents: as `encode` returns them.
            first_frame: the clip's first frame `B 3 1 H W` in [-1, 1], or what `first_frame_features` made of it;
                without it the injection is left out.
            generator: a CPU generator for the decoder's noise; None is one seeded with 0: decoding is a function.
        """
        features: Sequence[Tensor] | None = None
        if self.config.first_frame_injection and first_frame is not None:
            features = self.first_frame_features(first_frame) if isinstance(first_frame, Tensor) else first_frame
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        return self.decoder(self.denormalize(latents), features, generator)

    def forward(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Video -> its reconstruction, in one encoder pass, which is causal and so gives frame 0's features as well."""
        self.latent_shape(*video.shape[2:])
        kept, latents = self.encoder.features(video)
        features = [feature[:, :, 0] for feature in kept] if self.config.first_frame_injection else None
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        return self.decoder(latents, features, generator)
