"""Encoder and decoder run by plan: in tiles of the frame and in chunks of time, with the numbers of the whole.

The outer stages run tile by tile (`fsae.tiling`), the inner ones on whole frames, and both chunk by chunk
(`fsae.streaming`). The order of the two loops decides what has to be kept:

    a clip      for each tile, its chunks     the stream of one tile at a time, and the result
    a stream    for each chunk, its tiles     the streams of all tiles, and nothing whole
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fsae.decoder import Decoder, FirstFrame
from fsae.encoder import Encoder
from fsae.streaming import FrameCache, joined
from fsae.tiling import TilePlan, Window, Workload, plan_recomputed, plan_tiles, tiled

# Latents that a stream's chunk is worked on at a time, where memory allows.
LONGEST_CHUNK = 64


@dataclass(frozen=True)
class PlannedEncoder:
    """An encoder and the plan it runs by."""

    encoder: Encoder
    plan: TilePlan

    @classmethod
    def of_clip(cls, encoder: Encoder, video: Tensor, memory: int | None) -> PlannedEncoder:
        """Planned for a whole video `B 3 T H W` in `memory` bytes; a `UserError` says how much would do."""
        latents = encoder.outer_stages.compression.latents(video.shape[2])
        return cls._within(encoder, video, latents, memory)

    @classmethod
    def of_stream(cls, encoder: Encoder, first: Tensor, memory: int | None) -> PlannedEncoder:
        """Planned for a video of any length, of which `first` is the first chunk."""
        return cls._within(encoder, first, None, memory)

    @classmethod
    def _within(cls, encoder: Encoder, video: Tensor, latents: int | None, memory: int | None) -> PlannedEncoder:
        height, width = (side // encoder.outer_stages.cell for side in video.shape[3:])
        work = Workload(video.shape[0], latents, height, width, video.element_size())
        return cls(encoder, plan_tiles(encoder.outer_stages, work, memory, "encode", latents or LONGEST_CHUNK))

    @classmethod
    def of_training(cls, encoder: Encoder, video: Tensor, memory: int | None) -> PlannedEncoder:
        """Planned for a whole video and its gradients, computed anew part by part."""
        stages = encoder.outer_stages
        height, width = (side // stages.cell for side in video.shape[3:])
        latents = stages.compression.latents(video.shape[2])
        work = Workload(video.shape[0], latents, height, width, _bytes_of_a_number(video))
        return cls(encoder, plan_recomputed(stages, work, memory, "train the encoder on"))

    def features(self, video: Tensor, first: int) -> tuple[list[Tensor], Tensor]:
        """Video -> (frame 0's features at stage `first` and those coarser than it, fine to coarse, and the latents).

        With gradients. Each part of the outer stages is computed anew in the backward pass where the encoder's layers
        are; its neighbours in time are given the frames that they need with their gradients.

        Returns:
            Features `B C h w`, and latents `B c t h w`, not normalised.
        """
        encoder, count = self.encoder, self.plan.latents
        chunked = encoder.outer_stages.frames(0, count, begun=False) < video.shape[2]
        if not chunked and len(self.plan.windows) == 1:
            kept, latents = encoder.features(video)
            return [feature[:, :, 0] for feature in kept[first:]], latents

        def part(video: Tensor, begun: bool, cache: FrameCache | None = None) -> tuple[list[Tensor], Tensor]:
            features, x = encoder.outer(video, cache)
            return [] if begun else [feature[:, :, 0].clone() for feature in features[first:]], x

        def compute(_: int, window: Window) -> list[Tensor]:
            cache = FrameCache() if chunked else None
            chunks = self._cut(self._crop(video, window), begun=False)
            found = [encoder.run(encoder, chunk, n > 0, cache=cache, call=part) for n, chunk in enumerate(chunks)]
            return [*found[0][0], torch.cat([x for _, x in found], dim=2)]

        *fine, x = self._tiled(compute)
        coarse, latents = encoder.inner(x)
        return fine + [feature[:, :, 0] for feature in coarse[max(first - encoder.outer_stages.count, 0) :]], latents

    def whole(self, video: Tensor) -> Tensor:
        """Video `B 3 T H W` -> its latents, not normalised."""
        chunked = self.encoder.outer_stages.frames(0, self.plan.latents, begun=False) < video.shape[2]
        if not chunked and len(self.plan.windows) == 1:
            return self.encoder(video)

        def compute(_: int, window: Window) -> list[Tensor]:
            cache = FrameCache() if chunked else None
            parts = self._cut(self._crop(video, window), begun=False)
            return [torch.cat([self.encoder.outer(part, cache)[1] for part in parts], dim=2)]

        (x,) = self._tiled(compute)
        kept = FrameCache() if chunked else None
        return torch.cat([self.encoder.inner(part, kept)[1] for part in x.split(self.plan.latents, dim=2)], dim=2)

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks of one video, 1 + 4n frames at first and 4n from then on -> the latents of each, not normalised."""
        kept, tiles_kept = FrameCache(), [FrameCache() for _ in self.plan.windows]

        def outer(video: Tensor) -> Tensor:
            def compute(index: int, window: Window) -> list[Tensor]:
                return [self.encoder.outer(self._crop(video, window), tiles_kept[index])[1]]

            return self._tiled(compute)[0]

        begun = False
        for chunk in chunks:
            yield torch.cat([self.encoder.inner(outer(part), kept)[1] for part in self._cut(chunk, begun)], dim=2)
            begun = True

    def image_features(self, image: Tensor, first: int) -> list[Tensor]:
        """The features of an image `B 3 1 H W` at stage `first` and those coarser than it, fine to coarse."""

        def compute(_: int, window: Window) -> list[Tensor]:
            features, out = self.encoder.outer(self._crop(image, window))
            return [*features[first:], out]

        *fine, x = self._tiled(compute)
        return fine + self.encoder.inner(x)[0]

    def _tiled(self, compute: Callable[[int, Window], list[Tensor]]) -> list[Tensor]:
        stages = self.encoder.outer_stages
        return tiled(self.plan.windows, stages.halo, self.plan.height, self.plan.width, compute)

    def _crop(self, video: Tensor, window: Window) -> Tensor:
        return window.scaled(self.encoder.outer_stages.cell).crop(video)

    def _cut(self, chunk: Tensor, begun: bool) -> Iterator[Tensor]:
        """A chunk of video into what stands for the plan's number of latents each."""
        start = 0
        while start < chunk.shape[2]:
            count = self.encoder.outer_stages.frames(0, self.plan.latents, begun or start > 0)
            yield chunk[:, :, start : start + count]
            start += count


@dataclass(frozen=True)
class PlannedDecoder:
    """A decoder and the plan it runs by."""

    decoder: Decoder
    plan: TilePlan

    @classmethod
    def of_clip(cls, decoder: Decoder, latents: Tensor, memory: int | None) -> PlannedDecoder:
        """Planned for all latents `B c t h w` of a clip in `memory` bytes; a `UserError` says how much would do."""
        count = latents.shape[2]
        frames, height, width = decoder.outer_stages.compression.video_size(count, *latents.shape[3:])
        work = cls._workload(decoder, latents, count, latents.shape[0] * 3 * frames * height * width)
        return cls(decoder, plan_tiles(decoder.outer_stages, work, memory, "decode", count))

    @classmethod
    def of_stream(cls, decoder: Decoder, first: Tensor, memory: int | None, longest: int) -> PlannedDecoder:
        """Planned for a clip of any length with latents of `first`'s size, `longest` of them at a time or fewer."""
        work = cls._workload(decoder, first, None, 0)
        return cls(decoder, plan_tiles(decoder.outer_stages, work, memory, "decode", longest))

    @classmethod
    def of_training(cls, decoder: Decoder, x: Tensor, memory: int | None) -> PlannedDecoder:
        """Planned for `outer` of x, what `Decoder.inner` gives or a part of it, and the gradients."""
        stages, (batch, _, latents, height, width) = decoder.outer_stages, x.shape
        result = batch * 3 * stages.compression.frames(latents) * height * width * stages.cell**2
        work = Workload(batch, latents, height, width, _bytes_of_a_number(x), result)
        return cls(decoder, plan_recomputed(stages, work, memory, "train the decoder on"))

    @staticmethod
    def _workload(decoder: Decoder, latents: Tensor, count: int | None, result: int) -> Workload:
        stages = decoder.outer_stages
        height, width = (side * stages.compression.space // stages.cell for side in latents.shape[3:])
        return Workload(latents.shape[0], count, height, width, latents.element_size(), result)

    def whole(self, latents: Tensor, first_frame: FirstFrame | None, noise: Sequence[Sequence[Tensor]]) -> Tensor:
        """Latents, not normalised -> the clip's video.

        first_frame and noise: as `Decoder.outer` has them, of the whole frame.
        """
        decoder, count = self.decoder, latents.shape[2]
        chunked = self.plan.latents < count
        kept = FrameCache() if chunked else None
        parts = [decoder.inner(part, first_frame, kept) for part in latents.split(self.plan.latents, dim=2)]
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        del parts, kept
        return self.outer(x, first_frame, noise)

    def outer(
        self,
        x: Tensor,
        first_frame: FirstFrame | None,
        noise: Sequence[Sequence[Tensor]],
        place: Window | None = None,
    ) -> Tensor:
        """What `Decoder.inner` gives -> the video. With gradients, each part is computed anew where layers are.

        place: the part of the frame that x, and the plan, are of; None is all of it.
        """
        decoder, count = self.decoder, x.shape[2]
        chunked = self.plan.latents < count
        one = not chunked and len(self.plan.windows) == 1

        def compute(_: int, window: Window) -> list[Tensor]:
            cache = FrameCache() if chunked else None
            at = window if place is None else window.moved(place.top, place.left)
            chunks = window.crop(x).split(self.plan.latents, dim=2)
            if one:
                return [decoder.outer(x, first_frame, noise, at)]
            pieces = (
                decoder.run(decoder, chunk, first_frame, noise, at, cache=cache, call=decoder.outer) for chunk in chunks
            )
            return [joined(pieces, decoder.outer_stages.frames(0, count, begun=False))]

        return self._tiled(compute)

    def stream(
        self, chunks: Iterable[Tensor], first_frame: FirstFrame | None, noise: Sequence[Sequence[Tensor]]
    ) -> Iterator[Tensor]:
        """Latents, not normalised, chunk by chunk -> their frames, as many latents' worth at a time as planned.

        Not for the Standard decoder, which looks ahead. The others keep no frames but those that their convolutions
        look back at. first_frame and noise: as `whole` has them.
        """
        kept, tiles_kept = FrameCache(), [FrameCache() for _ in self.plan.windows]

        def outer(x: Tensor) -> Tensor:
            def compute(index: int, window: Window) -> list[Tensor]:
                return [self.decoder.outer(window.crop(x), first_frame, noise, window, tiles_kept[index])]

            return self._tiled(compute)

        for chunk in chunks:
            for part in chunk.split(self.plan.latents, dim=2):
                # Nothing made here has a name: while the caller has the frames, only they are alive.
                yield outer(self.decoder.inner(part, first_frame, kept))

    def _tiled(self, compute: Callable[[int, Window], list[Tensor]]) -> Tensor:
        stages = self.decoder.outer_stages
        return tiled(self.plan.windows, stages.halo, self.plan.height, self.plan.width, compute)[0]


def _bytes_of_a_number(x: Tensor) -> int:
    """Of the activations that layers make of x: autocast makes smaller ones."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind).itemsize if torch.is_autocast_enabled(kind) else x.element_size()
