"""Tensors in pieces: what each process holds of a tensor, written by each for itself and read by whom it concerns.

A tensor's entries are counted in row-major order. NAME.safetensors holds whole tensors. NAME.00000.safetensors,
NAME.00001.safetensors ... hold runs of entries, flat; each file's header says where its runs begin in tensors of which
shape. Whoever reads asks for the entries it needs, so the number of writers and of readers need not be the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from fsae.errors import CheckpointError
from fsae.storage.checkpoint import check_fit, folder_shapes, save_state, tensor_shapes
from fsae.storage.files import read_json

_HEADER = "pieces"


class Piece(NamedTuple):
    """What a process holds of a tensor of `shape`: the entries from `start` on.

    Attributes:
        values: The entries, in any shape; what is loaded is written into them.
        start: Number of the first one.
        shape: The whole tensor's.
        mine: Whether this process writes them, of all that hold the same.
    """

    values: Tensor
    start: int
    shape: tuple[int, ...]
    mine: bool = True


class _Run(NamedTuple):
    """Entries `start` to `stop` of a tensor, which are all entries of `key` in a file."""

    path: Path
    key: str
    start: int
    stop: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in files: its shape, and where its entries are."""

    shape: tuple[int, ...]
    runs: tuple[_Run, ...]

    def read(self, start: int = 0, count: int | None = None) -> Tensor:
        """The entries from `start` on, flat; all of them, or `count`.

        Raises:
            CheckpointError: some are in no file.
        """
        stop = math.prod(self.shape) if count is None else start + count
        found = [_entries(run, start, stop) for run in self.runs if run.start < stop and start < run.stop]
        if sum(map(torch.numel, found)) != stop - start:
            at = self.runs[0]
            raise CheckpointError(f"the files beside {at.path} lack a part of {at.key!r}; remove {at.path.parent}")
        return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)

    def whole(self) -> Tensor:
        """The tensor."""
        return self.read().view(self.shape)


def _entries(run: _Run, start: int, stop: int) -> Tensor:
    """What `run` holds of a tensor's entries `start` to `stop`, flat; only rows that hold some are read."""
    first, last = max(start, run.start) - run.start, min(stop, run.stop) - run.start
    with safe_open(run.path, framework="pt") as file:
        entries = file.get_slice(run.key)
        shape = entries.get_shape()
        if not shape:
            return file.get_tensor(run.key).reshape(1)
        row = math.prod(shape[1:])
        rows = entries[first // row : -(-last // row)].reshape(-1)
        wanted: Tensor = rows[first % row :][: last - first]
        return wanted


def stored_tensors(folder: Path, name: str) -> dict[str, StoredTensor]:
    """The tensors of NAME.safetensors in a folder, or of its pieces.

    Raises:
        CheckpointError: there is neither, or a file is cut short.
    """
    parts = sorted(folder.glob(f"{name}.[0-9]*.safetensors"))
    if not parts:
        path = folder / f"{name}.safetensors"
        return {key: _in_one(path, key, shape) for key, shape in tensor_shapes(path).items()}
    found: dict[str, StoredTensor] = {}
    for path in parts:
        sizes = tensor_shapes(path)
        for key, (start, shape) in _header(path).items():
            run = _Run(path, key, start, start + sizes[key][0])
            before = found[key].runs if key in found else ()
            found[key] = StoredTensor(tuple(shape), (*before, run))
    return found


def stored_model(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a saved model; errors as `stored_tensors`."""
    index, shapes = folder_shapes(folder, None)
    files = {} if index.suffix == ".safetensors" else read_json(index)["weight_map"]
    return {key: _in_one(folder / files.get(key, index.name), key, shape) for key, shape in shapes.items()}


def _in_one(path: Path, key: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(shape, (_Run(path, key, 0, math.prod(shape)),))


def _header(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="np") as file:
        try:
            values: dict[str, Any] = json.loads(file.metadata()[_HEADER])
            return values
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path} does not say of what it holds pieces; remove {path.parent}") from None


def save_pieces(pieces: Mapping[str, Piece], folder: Path, name: str, rank: int) -> None:
    """Write what process number `rank` is to write of NAME."""
    mine = {key: piece for key, piece in pieces.items() if piece.mine}
    places = json.dumps({key: (piece.start, piece.shape) for key, piece in mine.items()})
    flat = {key: piece.values.detach().reshape(-1).cpu() for key, piece in mine.items()}
    save_state(flat, folder / f"{name}.{rank:05d}.safetensors", {_HEADER: places})


@torch.no_grad()
def load_pieces(pieces: Mapping[str, Piece], stored: Mapping[str, StoredTensor], what: str, source: Path | str) -> None:
    """Fill pieces with the entries that are theirs, one tensor after the other.

    Args:
        pieces: Of all tensors of a thing.
        stored: Its tensors, which must be the same.
        what: What it is called.
        source: Where they are, for an error's sentence.

    Raises:
        CheckpointError: names or shapes differ, or entries are missing.
    """
    shapes = {key: piece.shape for key, piece in pieces.items()}
    check_fit(shapes, {key: tensor.shape for key, tensor in stored.items()}, what, source)
    for key, piece in pieces.items():
        piece.values.copy_(stored[key].read(piece.start, piece.values.numel()).view(piece.values.shape))


def whole_tensors(folder: Path, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of NAME, one after the other."""
    for key, tensor in stored_tensors(folder, name).items():
        yield key, tensor.whole()
