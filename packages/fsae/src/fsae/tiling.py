"""Tiling (exact in space): the outer stages in parts of the frame, each with a halo, and how large the parts may be.

The convolutional stages see a few cells around each place, so that a part of the frame with a halo of so many cells
gives the part's inside exactly: no seam, no blend. The inner stages attend to the whole frame and run whole.

Peak memory is foreseen by a plain count. At a stage, a block holds its input, its inside, the inside with neighbour
frames and its output: `TENSORS` tensors of the stage's size; in half precision the norm makes two more, as it computes
in fp32. The finest stage's tensors are the largest. Beside them stand the inner stages' output, the frames that a
stream keeps, and the result. Weights are not counted, nor is what a library uses inside one operation.

In training each part is computed anew in the backward pass, which then holds what enters its blocks, the inside of one
block with the gradients there, and the frames that all parts keep for those behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain

import torch
from torch import Tensor

from fsae.errors import UserError
from fsae.shapes import Compression

# Many kernels index with 32 bits.
MAX_ELEMENTS = 2**31 - 1

# Elements of an attention layer's inside, several times as wide as its input, that are made at once.
INSIDE = 2**26

# As much more where it is computed anew in the backward pass, since neighbours are computed with each part.
RECOMPUTED = 4

TENSORS, TENSORS_IN_HALF = 4, 6

# Of a block's inside in the backward pass, its gradients among them.
TENSORS_BACK = 9

# Percent: for what is small and not counted.
MARGIN = 110


def frames_at_once(x: Tensor, wider: int) -> int:
    """Frames of x `B C T H W` whose tensors of `wider` x C channels hold about `INSIDE` elements; at least one."""
    batch, channels, _, height, width = x.shape
    return max(INSIDE // max(batch * wider * channels * height * width, 1), 1)


@dataclass(frozen=True)
class Window:
    """A rectangle of a frame, in cells of the resolution where the outer stages meet the inner ones."""

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        return self.top + self.height

    @property
    def right(self) -> int:
        return self.left + self.width

    def scaled(self, factor: int) -> Window:
        """The same place where a cell is `factor` x `factor` smaller cells."""
        return Window(self.top * factor, self.left * factor, self.height * factor, self.width * factor)

    def grown(self, halo: int, height: int, width: int) -> Window:
        """With `halo` more cells on every side, as far as a frame of `height` x `width` cells has them."""
        top, left = max(self.top - halo, 0), max(self.left - halo, 0)
        bottom, right = min(self.bottom + halo, height), min(self.right + halo, width)
        return Window(top, left, bottom - top, right - left)

    def moved(self, top: int, left: int) -> Window:
        """So many cells further down and to the right."""
        return Window(self.top + top, self.left + left, self.height, self.width)

    def inside(self, other: Window) -> Window:
        """This window as seen from the corner of `other`, which holds it."""
        return self.moved(-other.top, -other.left)

    @property
    def slices(self) -> tuple[slice, slice]:
        """Its rows and columns."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def crop(self, x: Tensor) -> Tensor:
        """The window's part of `... H W`, a view."""
        return x[..., *self.slices]


def tiled(
    windows: Sequence[Window],
    halo: int,
    height: int,
    width: int,
    compute: Callable[[int, Window], Sequence[Tensor]],
) -> list[Tensor]:
    """What `compute` gives for a whole frame of `height` x `width` cells, computed window by window.

    compute: the index of a window and that window grown by `halo` -> tensors `... H W`, each of the window at some
        whole scale.
    """
    if len(windows) == 1:
        return list(compute(0, windows[0]))
    if torch.is_grad_enabled():
        return _joined(windows, halo, height, width, compute)
    whole: list[Tensor] = []
    for index, window in enumerate(windows):
        wide = window.grown(halo, height, width)
        parts = compute(index, wide)
        for number, part in enumerate(parts):
            scale = part.shape[-1] // wide.width
            if number == len(whole):
                whole.append(part.new_empty(*part.shape[:-2], height * scale, width * scale))
            window.scaled(scale).crop(whole[number]).copy_(window.inside(wide).scaled(scale).crop(part))
        del parts, part  # not alive beside the next window's
    return whole


def _joined(
    windows: Sequence[Window],
    halo: int,
    height: int,
    width: int,
    compute: Callable[[int, Window], Sequence[Tensor]],
) -> list[Tensor]:
    """`tiled` with gradients, which writing in place would have to copy: rows of tiles put together, then the rows."""
    rows: dict[int, list[list[Tensor]]] = {}
    for index, window in enumerate(windows):
        wide = window.grown(halo, height, width)
        cores = [
            window.inside(wide).scaled(part.shape[-1] // wide.width).crop(part).clone() for part in compute(index, wide)
        ]
        rows.setdefault(window.top, []).append(cores)
    bands = [[torch.cat(tiles, dim=-1) for tiles in zip(*row, strict=True)] for row in rows.values()]
    return [torch.cat(parts, dim=-2) for parts in zip(*bands, strict=True)]


@dataclass(frozen=True)
class OuterStages:
    """The convolutional stages of a stack as the plan sees them: sizes, no tensors.

    Attributes:
        widths: their channels, fine to coarse, and those of the stage inside them.
        convolutions: in each of them.
        compression: pixels and frames that a latent stands for.
        cell: pixels a cell of the inner stages is wide and high.
        halo: cells around a place that they look at.
        kept_frames: frames that a convolution keeps between chunks; 0 where the clip cannot be cut in time.
        upward: whether they lead from coarse to fine: in training, a step up makes its input large before it convolves.
    """

    widths: tuple[int, ...]
    convolutions: tuple[int, ...]
    compression: Compression
    cell: int
    halo: int
    kept_frames: int
    upward: bool = False

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.convolutions)

    def frames(self, stage: int, latents: int, begun: bool) -> int:
        """Frames of a stage that stand for some latents; where they begin the clip, the first stands for one."""
        rate = self.compression.rate(stage)
        return rate * latents if begun else rate * (latents - 1) + 1

    def elements(self, latents: int, begun: bool, cells: int) -> list[int]:
        """Of one video's features at each outer stage, neighbour frames included."""
        return [
            width * _with_neighbours(self.frames(s, latents, begun), begun) * cells * (self.cell >> s) ** 2
            for s, width in enumerate(self.widths[:-1])
        ]


@dataclass(frozen=True)
class Workload:
    """What runs through the outer stages.

    Attributes:
        batch: videos at once.
        latents: of one video, in time; None for a stream, whose end is not known.
        height, width: of a frame, in cells.
        element_size: bytes of a number.
        result: numbers of what is made whole, of all chunks and tiles; 0 where each chunk's is handed out.
    """

    batch: int
    latents: int | None
    height: int
    width: int
    element_size: int
    result: int = 0


@dataclass(frozen=True)
class TilePlan:
    """How the outer stages run.

    Attributes:
        height, width: of the frame, in cells.
        grid: rows and columns of tiles.
        latents: how many latents' frames at a time.
        nbytes: foreseen peak memory.
        elements: of the largest tensor.
    """

    height: int
    width: int
    grid: tuple[int, int]
    latents: int
    nbytes: int
    elements: int

    @property
    def windows(self) -> tuple[Window, ...]:
        """The tiles, without their halos: they cover the frame once."""
        tall, wide = -(-self.height // self.grid[0]), -(-self.width // self.grid[1])
        return tuple(
            Window(top, left, min(tall, self.height - top), min(wide, self.width - left))
            for top in range(0, self.height, tall)
            for left in range(0, self.width, wide)
        )


def plan_tiles(stages: OuterStages, work: Workload, memory: int | None, what: str, longest: int) -> TilePlan:
    """The fewest tiles, and the longest chunks in time where the stages allow chunks, that fit.

    Args:
        stages: what runs.
        work: on what.
        memory: bytes that may be used; None is no limit but that of `MAX_ELEMENTS`.
        what: "decode" or "encode", for the error.
        longest: the chunk to try first, in latents.

    Raises:
        UserError: the smallest tiles and shortest chunks do not fit.
    """
    lengths = [longest]
    while stages.kept_frames and lengths[-1] > 1:
        lengths.append(-(-lengths[-1] // 2))
    whole = ((length, (1, 1)) for length in lengths)
    least: int | None = None
    for length, grid in chain(whole, ((lengths[-1], grid) for grid in _grids(stages, work))):
        found = foresee(stages, work, length, grid)
        if found.elements <= MAX_ELEMENTS:
            if memory is None or found.nbytes <= memory:
                return found
            least = found.nbytes if least is None else min(found.nbytes, least)
    raise _refusal(stages, work, memory, what, least)


@cache
def plan_recomputed(stages: OuterStages, work: Workload, memory: int | None, what: str) -> TilePlan:
    """As `plan_tiles`, of a clip in training: of what fits, what computes the fewest cells, then in the fewest parts.

    Tiles compute their halos; chunks compute nothing twice, but keep frames.
    """
    lengths = [work.latents or 1]
    while stages.kept_frames and lengths[-1] > 1:
        lengths.append(-(-lengths[-1] // 2))
    grids = sorted(_grids(stages, work), key=lambda grid: (_computed(stages, work, grid), grid[0] * grid[1]))
    least: int | None = None
    for grid in grids:
        for length in lengths:
            found = foresee_recomputed(stages, work, length, grid)
            if found.elements <= MAX_ELEMENTS:
                if memory is None or found.nbytes <= memory:
                    return found
                least = found.nbytes if least is None else min(found.nbytes, least)
    raise _refusal(stages, work, memory, what, least)


def _refusal(stages: OuterStages, work: Workload, memory: int | None, what: str, least: int | None) -> UserError:
    """What did not fit, and how much would do, if anything."""
    size = f"{work.width * stages.cell}x{work.height * stages.cell} pixels"
    if work.latents is not None:
        size += f" and {work.latents} latents"
    if least is None:
        return UserError(
            f"to {what} {work.batch} video(s) of {size} takes tensors of more than {MAX_ELEMENTS} elements; "
            f"{what} fewer at once, or shorter or smaller ones"
        )
    return UserError(
        f"memory is {memory} bytes, but to {what} {work.batch} video(s) of {size} takes at least {least}, "
        "in the smallest tiles; give that much, or a smaller video"
    )


def _grids(stages: OuterStages, work: Workload) -> Iterator[tuple[int, int]]:
    """Rows and columns of tiles, few first, and of as few those with less halo."""

    def counts(cells: int) -> list[int]:
        return sorted({-(-cells // side) for side in range(1, cells + 1)})

    grids = [(rows, columns) for rows in counts(work.height) for columns in counts(work.width)]
    yield from sorted(grids, key=lambda grid: (grid[0] * grid[1], _computed(stages, work, grid)))


def _computed(stages: OuterStages, work: Workload, grid: tuple[int, int]) -> int:
    """Cells of all tiles with their halos."""
    return (work.height + 2 * stages.halo * (grid[0] - 1)) * (work.width + 2 * stages.halo * (grid[1] - 1))


def foresee(stages: OuterStages, work: Workload, length: int, grid: tuple[int, int]) -> TilePlan:
    """What it takes to run `length` latents at a time on a `grid` of rows and columns of tiles."""
    begun = work.latents is None or length < work.latents
    frame = work.batch * work.height * work.width
    tile = _side(work.height, grid[0], stages.halo) * _side(work.width, grid[1], stages.halo)
    outer = [work.batch * n for n in stages.elements(length, begun, tile)]
    # A stream keeps the state of every tile and nothing whole; a clip goes tile by tile, all of its time in each.
    tiles = grid[0] * grid[1] if work.latents is None else 1
    inner = stages.widths[-1] * frame * (length if work.latents is None else work.latents)
    wide = 8 * stages.widths[-1] * frame
    inside = wide * _with_neighbours(min(max(INSIDE // wide, 1), length), begun)
    kept = 0
    if begun:
        for s, (width, convolutions) in enumerate(zip(stages.widths, stages.convolutions, strict=False)):
            places = work.batch * tiles * tile * (stages.cell >> s) ** 2
            kept += convolutions * stages.kept_frames * width * places
    tensors = TENSORS if work.element_size > 2 else TENSORS_IN_HALF
    at_once = tensors * max(max(outer, default=0), inner + inside)
    return TilePlan(
        height=work.height,
        width=work.width,
        grid=grid,
        latents=length,
        nbytes=work.element_size * (at_once * MARGIN // 100 + inner + kept + work.result),
        elements=max([*outer, inner, inside, work.result]),
    )


def foresee_recomputed(stages: OuterStages, work: Workload, length: int, grid: tuple[int, int]) -> TilePlan:
    """As `foresee`, of a clip in training, its parts computed anew in the backward pass."""
    latents = work.latents or length
    begun = length < latents
    tile = _side(work.height, grid[0], stages.halo) * _side(work.width, grid[1], stages.halo)
    outer = [work.batch * n for n in stages.elements(length, begun, tile)]
    enters = kept = 0
    largest = list(outer)
    for s, (width, convolutions) in enumerate(zip(stages.widths, stages.convolutions, strict=False)):
        enters += (convolutions // 2 + 1) * outer[s]
        more = max(stages.widths[s + 1] - width, 0) if stages.upward else 0
        largest[s] += outer[s] * more // width
        if begun:
            places = work.batch * grid[0] * grid[1] * tile * (stages.cell >> s) ** 2
            kept += -(-latents // length) * stages.kept_frames * (convolutions * width + more) * places
    inner = stages.widths[-1] * work.batch * work.height * work.width * latents
    at_once = enters + TENSORS_BACK * max(largest, default=0)
    if stages.upward and stages.kept_frames == 1:
        # Group-causal convolutions have each group with a neighbour on either side.
        rates = (stages.compression.rate(s) for s in range(stages.count))
        largest = [n * (rate + 2) // rate for n, rate in zip(largest, rates, strict=True)]
    return TilePlan(
        height=work.height,
        width=work.width,
        grid=grid,
        latents=length,
        nbytes=work.element_size * (at_once * MARGIN // 100 + kept + 2 * inner + 3 * work.result),
        elements=max([*largest, inner, work.result]),
    )


def _with_neighbours(frames: int, begun: bool) -> int:
    """With those that a kernel of three taps adds at most; an image alone is convolved without."""
    return frames + 2 if frames > 1 or begun else 1


def _side(cells: int, count: int, halo: int) -> int:
    """The longest of `count` parts of a line of cells, with its halo where it has neighbours."""
    return min(-(-cells // count) + min(count - 1, 2) * halo, cells)
