"""Short names for what two files must share: an encoder's weights, a whole model's, a file's content.

Latents fit every decoder that was trained on their encoder, which stays frozen while decoders are fine-tuned
(paper §2.2.3); so what they carry is the fingerprint of the encoder and of the latents' statistics alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsae.model import FSAE

_ENCODER_CONFIG = (
    "widths",
    "encoder_depths",
    "latent_channels",
    "residual_stages",
    "temporal_stages",
    "attention_head_dim",
    "norm_eps",
    "norm_affine",
    "latents_mean",
    "latents_std",
)
_VALUES = 1024  # of each tensor, evenly spread: training leaves none of them as it was
_ENDS = 2**20  # bytes at a file's beginning and end


def encoder_fingerprint(model: FSAE) -> str:
    """What decides the latents: the encoder's configuration and weights, and the statistics they are normalised by."""
    config = {name: model.config[name] for name in _ENCODER_CONFIG}
    return weights_fingerprint(config, model.encoder.state_dict())


def model_fingerprint(model: FSAE) -> str:
    """What decides the decoded video: the whole configuration and all weights."""
    public = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return weights_fingerprint(public, model.state_dict())


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
