"""Streaming (exact in time): what one stream of chunks keeps of the frames that have passed.

A convolution that looks back needs, at the start of a chunk, the last frames of the chunk before: two for a causal
kernel of three taps, one for a causal stride of two and for a group-causal kernel. A `FrameCache` holds them; it is
made by who streams, passed down explicitly, and never kept by a layer, so that one model serves many streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from fsae.errors import UserError


class FrameCache:
    """One stream's state: the input frames that each layer has kept for its next chunk.

    A layer that is in the cache has begun its stream; one that is not sees the clip's first frame next. A spatial tile
    is a stream of its own and needs a cache of its own.
    """

    def __init__(self) -> None:
        self._frames: dict[nn.Module, Tensor] = {}

    def copy(self) -> FrameCache:
        """Another stream that goes on from here: the same frames, which nobody writes to."""
        other = FrameCache()
        other._frames = dict(self._frames)
        return other

    def of(self, layer: nn.Module) -> FrameCache:
        """A copy with the frames of `layer` and of what is in it alone."""
        other = FrameCache()
        other._frames = {m: self._frames[m] for m in layer.modules() if m in self._frames}
        return other

    def update(self, other: FrameCache) -> None:
        """Take over the frames that another stream keeps."""
        self._frames.update(other._frames)

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self._frames

    def __getitem__(self, layer: nn.Module) -> Tensor:
        """The frames `B C n H W` that `layer` kept."""
        return self._frames[layer]

    def __setitem__(self, layer: nn.Module, frames: Tensor) -> None:
        # A copy: a view would keep the whole chunk alive.
        self._frames[layer] = frames.clone(memory_format=torch.contiguous_format)

    @property
    def nbytes(self) -> int:
        """Bytes of all kept frames."""
        return sum(frames.nbytes for frames in self._frames.values())


def joined(pieces: Iterator[Tensor], frames: int) -> Tensor:
    """Pieces `B C T' H W` written one after another into a clip of `frames` frames, so that no two copies stand.

    With gradients, which would copy the clip for each piece, they are put together in the end.
    """
    if torch.is_grad_enabled() and (parts := list(pieces)):
        return torch.cat(parts, dim=2)
    clip: Tensor | None = None
    start = 0
    for piece in pieces:
        if piece.shape[2] == frames:
            return piece
        if clip is None:
            clip = piece.new_empty(*piece.shape[:2], frames, *piece.shape[3:])
        clip[:, :, start : start + piece.shape[2]] = piece
        start += piece.shape[2]
        del piece  # not alive beside the next
    if clip is None:
        raise ValueError("a clip of no pieces was asked for")
    return clip


def pieces(video: Tensor, length: int) -> Iterator[Tensor]:
    """A video `B C T H W` cut into frame 0, then `length` frames at a time."""
    yield video[:, :, :1]
    for start in range(1, video.shape[2], length):
        yield video[:, :, start : start + length]


def first_of(chunks: Iterable[Tensor]) -> tuple[Tensor, Iterator[Tensor]]:
    """The first chunk, whose size decides the plan, and the rest; a `UserError` if there is none."""
    rest = iter(chunks)
    first = next(rest, None)
    if first is None:
        raise UserError("a stream of no chunks was given; give one of at least one frame or latent")
    return first, rest


def checked(chunks: Iterable[Tensor], first: Tensor, multiple: int) -> Iterator[Tensor]:
    """The chunks that follow `first`: of its size, or a `UserError`, and of a `multiple` of frames."""
    for chunk in chunks:
        frames, *size = chunk.shape[2:]
        if frames < 1 or frames % multiple or size != [*first.shape[3:]]:
            raise UserError(
                f"a chunk of {frames} frames of {size[1]}x{size[0]} pixels cannot follow; accepted are "
                f"multiples of {multiple} frames of {first.shape[4]}x{first.shape[3]}"
            )
        yield chunk
