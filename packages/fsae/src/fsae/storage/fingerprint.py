"""Short names for what two files must share: a model's weights, a tensor, a file's content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_VALUES = 1024  # of each tensor, evenly spread: training leaves none of them as it was
_ENDS = 2**20  # bytes at a file's beginning and end


def weights_fingerprint(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """Of a configuration, and of the names, shapes and some values of weights, in any precision that holds them."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=list).encode())
    for name, tensor in sorted(weights.items()):
        values = tensor.detach().flatten()
        chosen = values[:: max(1, len(values) // _VALUES)].float().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(chosen.numpy().tobytes())
    return digest.hexdigest()


def tensor_fingerprint(tensor: Tensor) -> str:
    """Of a tensor's shape and all its values."""
    digest = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """Of a file's size, its time of change, and its first and last MiB: quick for a film as well."""
    status = os.stat(path)
    digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
    with Path(path).open("rb") as file:
        digest.update(file.read(_ENDS))
        file.seek(max(0, status.st_size - _ENDS))
        digest.update(file.read(_ENDS))
    return digest.hexdigest()
