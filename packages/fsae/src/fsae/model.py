"""FSAE (paper §2.2): a video autoencoder that compresses 64 x 64 pixels of 4 frames into 128 numbers.

    video `B 3 T H W` in [-1, 1], T = 1 + 4k, H and W multiples of 64   <->   latents `B 128 1+k H/64 W/64`

Deterministic, no patchify, no KL. Latents leave `encode` normalised by the statistics in the configuration, one mean
and one standard deviation a channel, and `decode` takes them so: what the diffusion transformer sees is what `encode`
returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from fsae.decoder import Decoder, DecoderKind, FirstFrame
from fsae.encoder import Encoder
from fsae.errors import UserError
from fsae.layers.config import BlockStyle, Injection, StackConfig
from fsae.layers.shortcuts import ShortcutKind
from fsae.planned import LONGEST_CHUNK, PlannedDecoder, PlannedEncoder
from fsae.presets import PRESETS
from fsae.shapes import Compression
from fsae.statistics import latent_statistics
from fsae.storage.checkpoint import StrictModelMixin
from fsae.streaming import checked, first_of, pieces


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
        injection_sampling: the residual stages sample frame 0's features along the motion that the decoder reads off
            the latents, those at higher frame rates too, in place of attending to them (`fsae.layers.motion`).
        frame_matching: the encoder compares each latent's frame with that of the latent before, patch by patch, so that
            a small one sees motion (`fsae.layers.matching`).
        shortcut: "dc-ae", which its weights need, or "even", for training from scratch (`fsae.layers.shortcuts`).
        attention_head_dim: channels a head of the linear attention.
        noise: weight of the noise in the decoder's residual blocks; 0 is none.
        norm_eps: epsilon of the pixel norms.
        norm_affine: whether pixel norms have a weight and a bias.
        latents_mean: mean of each latent channel over the training data; None is 0.
        latents_std: standard deviation of each; None is 1.

    Raises:
        ValueError: numbers of stages or of channels that do not fit together.
    """

    _supports_gradient_checkpointing = True
    # What is gathered whole at a time where the model is sharded over processes.
    _no_split_modules: ClassVar[list[str]] = ["ResBlock", "EViTBlock"]

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
        injection_sampling: bool = False,
        frame_matching: bool = False,
        shortcut: ShortcutKind = "dc-ae",
        attention_head_dim: int = 32,
        noise: float = 0.05,
        norm_eps: float = 1e-5,
        norm_affine: bool = True,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if len(encoder_depths) != len(decoder_depths):
            raise ValueError("widths and depths name different numbers of stages; each needs one value a stage")
        stack = StackConfig(
            tuple(widths),
            tuple(encoder_depths),
            latent_channels,
            residual_stages,
            temporal_stages,
            BlockStyle(head_dim=attention_head_dim, eps=norm_eps, norm_affine=norm_affine, shortcut=shortcut),
        )
        injection = Injection(tuple(widths), injection_head_dim, injection_window, injection_reach, injection_sampling)
        self.encoder = Encoder(replace(stack, matching=frame_matching))
        self.decoder = Decoder(
            replace(
                stack,
                widths=tuple(decoder_widths or widths),
                depths=tuple(decoder_depths),
                style=replace(stack.style, noise=noise),
            ),
            decoder_kind,
            injection if first_frame_injection else None,
        )

    @property
    def compression(self) -> Compression:
        """How many pixels and frames a latent stands for."""
        return Compression.of(self.config)

    @property
    def spatial_compression(self) -> int:
        """Pixels a latent cell is wide and high: 64 with seven stages."""
        return self.compression.space

    @property
    def temporal_compression(self) -> int:
        """Frames a latent stands for, after the first: 4 with two temporal stages."""
        return self.compression.time

    @property
    def first_injected_stage(self) -> int:
        """The finest stage whose features of frame 0 the decoder looks at, where it does."""
        return 0 if self.config.injection_sampling else self.config.temporal_stages

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(c, t, h, w) of the latents of a video; a size that does not fit is a `UserError`."""
        return self.config.latent_channels, *self.compression.latent_size(frames, height, width)

    def normalize(self, latents: Tensor) -> Tensor:
        """The encoder's latents -> zero mean and unit deviation a channel, as measured on the training data."""
        mean, std = latent_statistics(self.config, latents)
        return (latents - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        mean, std = latent_statistics(self.config, latents)
        return latents * std + mean

    def encode(self, video: Tensor, memory: int | None = None) -> Tensor:
        """Video `B 3 T H W` in [-1, 1] -> normalised latents `B c t h w`. An image is a video of one frame.

        Args:
            video: the clip.
            memory: bytes that activations may take. Where the clip takes more, it is encoded in chunks of time and then
                in tiles, which gives the same latents. None is no limit: then only what passes 2^31 elements is cut.

        Raises:
            UserError: a size that does not fit (see `latent_shape`), or too little memory, and how much would do.
        """
        self.compression.check(*video.shape[2:])
        return self.normalize(PlannedEncoder.of_clip(self.encoder, video, memory).whole(video))

    def encode_stream(self, chunks: Iterable[Tensor], memory: int | None = None) -> Iterator[Tensor]:
        """Chunks `B 3 T H W` of one video -> the latents of each; together they are what `encode` gives for the whole.

        Args:
            chunks: 1 + 4n frames at first, then 4n; each is asked for when the latents of the one before are taken.
            memory: as in `encode`; what layers keep between chunks is counted, the chunks themselves are not.

        Raises:
            UserError: as in `encode`, or a chunk that does not go on from the one before.
        """
        first, rest = first_of(chunks)
        self.compression.check(*first.shape[2:])
        encoder = PlannedEncoder.of_stream(self.encoder, first, memory)
        following = checked(rest, first, self.compression.time)
        return map(self.normalize, encoder.stream(chain([first], following)))

    def first_frame_features(self, first_frame: Tensor, memory: int | None = None) -> list[Tensor | None]:
        """First frame `B 3 1 H W` in [-1, 1] -> the features that `decode` injects, fine to coarse, each `B C h w`.

        None stands for the stages that change the frame rate where they get none. memory: as in `encode`.
        """
        self.compression.check(*first_frame.shape[2:])
        image = first_frame[:, :, :1]
        first = self.first_injected_stage
        features = PlannedEncoder.of_clip(self.encoder, image, memory).image_features(image, first)
        return [None] * first + [feature[:, :, 0] for feature in features]

    def decode(
        self,
        latents: Tensor,
        first_frame: Tensor | FirstFrame | None = None,
        generator: torch.Generator | None = None,
        memory: int | None = None,
    ) -> Tensor:
        """Normalised latents `B c t h w` -> video `B 3 1+4(t-1) 64h 64w`, about [-1, 1] and not clamped.

        Args:
            latents: as `encode` returns them.
            first_frame: the clip's first frame `B 3 1 H W` in [-1, 1], or what `first_frame_features` made of it;
                without it the injection is left out.
            generator: a CPU generator for the decoder's noise; None is one seeded with 0: decoding is a function.
            memory: bytes that activations and the video may take. Where the clip takes more, the outer stages run in
                tiles (and, but for the Standard decoder, in chunks of time), which gives the same video. None is no
                limit: then only what passes 2^31 elements is cut.

        Raises:
            UserError: too little memory, and how much would do.
        """
        decoder = PlannedDecoder.of_clip(self.decoder, latents, memory)
        contexts = self._contexts(latents, first_frame, memory)
        return decoder.whole(self.denormalize(latents), contexts, self._noise(latents, generator))

    def decode_stream(
        self,
        latents: Tensor | Iterable[Tensor],
        first_frame: Tensor | FirstFrame | None = None,
        generator: torch.Generator | None = None,
        memory: int | None = None,
    ) -> Iterator[Tensor]:
        """Normalised latents -> pieces `B 3 T' H W` of their video, in order; together they are `decode`'s.

        The Lite and the causal decoder give the frames of one latent after another as they are done, in memory that
        does not grow with the clip. The Standard decoder looks at later frames as well: it decodes the whole clip, in
        tiles if `memory` asks for them, before it gives its first piece, and holds the whole video meanwhile.

        Args:
            latents: the clip's, `B c t h w`, or chunks of them; a chunk may give several pieces.
            first_frame, generator: as in `decode`; the noise is drawn once for all pieces.
            memory: as in `decode`; the pieces given out are not counted.

        Raises:
            UserError: as in `decode`.
        """
        if self.config.decoder_kind == "standard":
            whole = latents if isinstance(latents, Tensor) else torch.cat(list(latents), dim=2)
            return pieces(self.decode(whole, first_frame, generator, memory), self.compression.time)
        longest = LONGEST_CHUNK
        if isinstance(latents, Tensor):
            latents, longest = [latents], 1
        first, rest = first_of(latents)
        decoder = PlannedDecoder.of_stream(self.decoder, first, memory, longest)
        contexts = self._contexts(first, first_frame, memory)
        chunks = map(self.denormalize, chain([first], rest))
        return decoder.stream(chunks, contexts, self._noise(first, generator))

    def _contexts(
        self, latents: Tensor, first_frame: Tensor | FirstFrame | None, memory: int | None
    ) -> FirstFrame | None:
        """What all tiles and chunks look at: the first frame's keys and values."""
        if first_frame is None or not self.config.first_frame_injection:
            return None
        if isinstance(first_frame, Tensor):
            _, height, width = self.compression.video_size(1, *latents.shape[3:])
            if (*first_frame.shape[:2], *first_frame.shape[3:]) != (len(latents), 3, height, width):
                raise UserError(
                    f"first_frame is {tuple(first_frame.shape)}, but of {len(latents)} clip(s) of latents of "
                    f"{latents.shape[4]}x{latents.shape[3]} it is {(len(latents), 3, 1, height, width)}; "
                    "give that frame"
                )
            first_frame = self.first_frame_features(first_frame, memory)
        return self.decoder.contexts(first_frame)

    def _noise(self, latents: Tensor, generator: torch.Generator | None) -> list[list[Tensor]]:
        """The noise of the whole frame, for all tiles and chunks."""
        _, height, width = self.compression.video_size(1, *latents.shape[3:])
        return self.decoder.draw_noise(height, width, generator or _seeded())

    def forward(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Video -> its reconstruction, in one encoder pass, which is causal and so gives frame 0's features as well."""
        self.compression.check(*video.shape[2:])
        kept, latents = self.encoder.features(video)
        features = [feature[:, :, 0] for feature in kept] if self.config.first_frame_injection else None
        return self.decoder(latents, features, generator or _seeded())


def _seeded() -> torch.Generator:
    """What draws the noise where no generator is given, so that decoding is a function."""
    return torch.Generator().manual_seed(0)
