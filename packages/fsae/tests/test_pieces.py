"""Tensors written in pieces are read in any other division, and what is missing is named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fsae.errors import CheckpointError
from fsae.storage.checkpoint import save_state
from fsae.storage.pieces import Piece, load_pieces, save_pieces, stored_tensors, whole_tensors

TENSORS = {
    "matrix": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)),
    "cube": torch.arange(24.0).view(2, 3, 4),
    "scalar": torch.tensor(3.0),
    "count": torch.tensor([5, 6]),
    "nothing": torch.zeros(0, 4),
}


def write(folder: Path, ranks: int) -> None:
    """Each rank has a run of every tensor, whatever its rows; what has no axis is with all of them."""
    for rank in range(ranks):
        pieces = {}
        for key, tensor in TENSORS.items():
            size = -(-tensor.numel() // ranks)
            if tensor.ndim:
                values, start = tensor.flatten()[rank * size : (rank + 1) * size], min(rank * size, tensor.numel())
                pieces[key] = Piece(values, start, tuple(tensor.shape))
            else:
                pieces[key] = Piece(tensor, 0, (), mine=rank == 0)
        save_pieces(pieces, folder, "net", rank)


@pytest.mark.parametrize("ranks", [0, 1, 3])
def test_any_run_of_entries_is_read(tmp_path: Path, ranks: int) -> None:
    write(tmp_path, ranks)
    if ranks == 0:
        save_state(TENSORS, tmp_path / "net.safetensors")
    stored = stored_tensors(tmp_path, "net")
    assert stored.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        total = math.prod(tensor.shape)
        for start in range(total):
            for count in range(total - start + 1):
                assert torch.equal(stored[key].read(start, count), tensor.flatten()[start : start + count])
    for key, tensor in whole_tensors(tmp_path, "net"):
        assert torch.equal(tensor, TENSORS[key])


def test_a_piece_takes_its_entries_in_its_own_layout(tmp_path: Path) -> None:
    write(tmp_path, 3)
    stored = {"matrix": stored_tensors(tmp_path, "net")["matrix"]}
    part, turned = torch.zeros(3, 5), torch.zeros(5, 7).t()
    load_pieces({"matrix": Piece(part, 10, (7, 5))}, stored, "Net", tmp_path)
    load_pieces({"matrix": Piece(turned, 0, (7, 5))}, stored, "Net", tmp_path)
    assert torch.equal(part, TENSORS["matrix"][2:5]) and torch.equal(turned, TENSORS["matrix"])
    with pytest.raises(CheckpointError, match=r"holds 'matrix' as \[7, 5\], where the model has \[5, 7\]"):
        load_pieces({"matrix": Piece(part, 10, (5, 7))}, stored, "Net", tmp_path)


def test_what_is_missing_or_no_piece_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no weights file"):
        stored_tensors(tmp_path, "net")
    write(tmp_path, 3)
    (tmp_path / "net.00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lack a part of 'matrix'"):
        dict(whole_tensors(tmp_path, "net"))
    save_state({"matrix": TENSORS["matrix"]}, tmp_path / "net.00001.safetensors")
    with pytest.raises(CheckpointError, match="does not say of what it holds pieces"):
        stored_tensors(tmp_path, "net")
