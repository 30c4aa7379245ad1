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
from fsae.layers.blocks import BlockStyle
from fsae.layers.shortcuts import ShortcutKind
from fsae.presets import PRESETS
from fsae.shapes import Compression
from fsae.statistics import latent_statistics
from fsae.storage.checkpoint import StrictModelMixin
from fsae.tiling import Plan, Video, plan

# Latents that a stream's chunk is worked on at a time, where memory allows.
LONGEST_CHUNK = 64


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
        shortcut: ShortcutKind = "dc-ae",
        attention_head_dim: int = 32,
        noise: float = 0.05,
        norm_eps: float = 1e-5,
        norm_affine: bool = True,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        stages = {len(widths), len(encoder_depths), len(decoder_depths), len(decoder_widths or widths)}
        if len(stages) > 1:
            raise ValueError("widths and depths name different numbers of stages; each needs one value a stage")
        for width in {widths[-1], (decoder_widths or widths)[-1]}:
            if width % latent_channels:
                raise ValueError(f"{latent_channels} latent channels do not divide the innermost width {width}")
        style = BlockStyle(head_dim=attention_head_dim, eps=norm_eps, norm_affine=norm_affine, shortcut=shortcut)
        self.encoder = Encoder(widths, encoder_depths, latent_channels, residual_stages, temporal_stages, style)
        self.decoder = Decoder(
            decoder_widths or widths,
            decoder_depths,
            latent_channels,
            residual_stages,
            temporal_stages,
            decoder_kind,
            replace(style, noise=noise),
            context_widths=widths if first_frame_injection else None,
            injection_head_dim=injection_head_dim,
            injection_window=injection_window,
            injection_reach=injection_reach,
            injection_sampling=injection_sampling,
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
        latents = self.latent_shape(*video.shape[2:])[1]
        chosen = self._plan_encoding(video, latents, memory, latents)
        if chosen.latents == latents and len(chosen.windows) == 1:
            return self.normalize(self.encoder(video))
        return self.normalize(self.encoder.whole(video, chosen))

    def encode_stream(self, chunks: Iterable[Tensor], memory: int | None = None) -> Iterator[Tensor]:
        """Chunks `B 3 T H W` of one video -> the latents of each; together they are what `encode` gives for the whole.

        Args:
            chunks: 1 + 4n frames at first, then 4n; each is asked for when the latents of the one before are taken.
            memory: as in `encode`; what layers keep between chunks is counted, the chunks themselves are not.

        Raises:
            UserError: as in `encode`, or a chunk that does not go on from the one before.
        """
        first, rest = _first_of(chunks)
        self.latent_shape(*first.shape[2:])
        chosen = self._plan_encoding(first, None, memory, LONGEST_CHUNK)
        return map(self.normalize, self.encoder.stream(chain([first], self._checked(rest, first)), chosen))

    def _checked(self, chunks: Iterable[Tensor], first: Tensor) -> Iterator[Tensor]:
        """The chunks that follow `first`, whose size they must have."""
        time = self.temporal_compression
        for chunk in chunks:
            frames, *size = chunk.shape[2:]
            if frames < 1 or frames % time or size != [*first.shape[3:]]:
                raise UserError(
                    f"a chunk of {frames} frames of {size[1]}x{size[0]} pixels cannot follow; accepted are "
                    f"multiples of {time} frames of {first.shape[4]}x{first.shape[3]}"
                )
            yield chunk

    def _plan_encoding(self, video: Tensor, latents: int | None, memory: int | None, longest: int) -> Plan:
        stages = self.encoder.outer_stages
        height, width = (side // stages.cell for side in video.shape[3:])
        work = Video(video.shape[0], latents, height, width, video.element_size())
        return plan(stages, work, memory, "encode", longest)

    def first_frame_features(self, first_frame: Tensor, memory: int | None = None) -> list[Tensor | None]:
        """First frame `B 3 1 H W` in [-1, 1] -> the features that `decode` injects, fine to coarse, each `B C h w`.

        None stands for the stages that change the frame rate where they get none. memory: as in `encode`.
        """
        self.latent_shape(*first_frame.shape[2:])
        image = first_frame[:, :, :1]
        chosen = self._plan_encoding(image, 1, memory, 1)
        first = 0 if self.config.injection_sampling else self.config.temporal_stages
        features = [feature[:, :, 0] for feature in self.encoder.image_features(image, chosen, first)]
        return [None] * first + features

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
        frames = 1 + (latents.shape[2] - 1) * self.temporal_compression
        chosen = self._plan_decoding(latents, latents.shape[2], memory, latents.shape[2], frames)
        prepared = self._prepare(latents, first_frame, generator, memory)
        return self.decoder.whole(self.denormalize(latents), *prepared, chosen)

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
            return _pieces(self.decode(whole, first_frame, generator, memory), self.temporal_compression)
        longest = LONGEST_CHUNK
        if isinstance(latents, Tensor):
            latents, longest = [latents], 1
        first, rest = _first_of(latents)
        chosen = self._plan_decoding(first, None, memory, longest, 0)
        prepared = self._prepare(first, first_frame, generator, memory)
        return self.decoder.stream(map(self.denormalize, chain([first], rest)), *prepared, chosen)

    def _plan_decoding(
        self, latents: Tensor, length: int | None, memory: int | None, longest: int, frames: int
    ) -> Plan:
        """frames: of the video where it is made whole, else 0."""
        stages, space = self.decoder.outer_stages, self.spatial_compression
        batch, (height, width) = latents.shape[0], (side * space for side in latents.shape[3:])
        result = batch * 3 * frames * height * width
        cell = stages.cell
        work = Video(batch, length, height // cell, width // cell, latents.element_size(), result)
        return plan(stages, work, memory, "decode", longest)

    def _prepare(
        self,
        latents: Tensor,
        first_frame: Tensor | FirstFrame | None,
        generator: torch.Generator | None,
        memory: int | None,
    ) -> tuple[FirstFrame | None, list[list[Tensor]]]:
        """What all tiles and chunks share: the first frame's keys and values, and the noise."""
        contexts: FirstFrame | None = None
        if self.config.first_frame_injection and first_frame is not None:
            if isinstance(first_frame, Tensor):
                wanted = (latents.shape[0], 3, *(side * self.spatial_compression for side in latents.shape[3:]))
                given = (*first_frame.shape[:2], *first_frame.shape[3:])
                if given != wanted:
                    raise UserError(
                        f"first_frame is {tuple(first_frame.shape)}, but of {wanted[0]} clip(s) of latents of "
                        f"{latents.shape[4]}x{latents.shape[3]} it is {(wanted[0], 3, 1, *wanted[2:])}; give that frame"
                    )
                first_frame = self.first_frame_features(first_frame, memory)
            contexts = self.decoder.contexts(first_frame)
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        height, width = (side * self.spatial_compression for side in latents.shape[3:])
        return contexts, self.decoder.draw_noise(height, width, generator)

    def forward(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Video -> its reconstruction, in one encoder pass, which is causal and so gives frame 0's features as well."""
        self.latent_shape(*video.shape[2:])
        kept, latents = self.encoder.features(video)
        features = [feature[:, :, 0] for feature in kept] if self.config.first_frame_injection else None
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        return self.decoder(latents, features, generator)


def _first_of(chunks: Iterable[Tensor]) -> tuple[Tensor, Iterator[Tensor]]:
    """The first chunk, whose size decides the plan, and the rest."""
    rest = iter(chunks)
    first = next(rest, None)
    if first is None:
        raise UserError("a stream of no chunks was given; give one of at least one frame or latent")
    return first, rest


def _pieces(video: Tensor, length: int) -> Iterator[Tensor]:
    """Frame 0, then `length` frames at a time."""
    yield video[:, :, :1]
    for start in range(1, video.shape[2], length):
        yield video[:, :, start : start + length]
