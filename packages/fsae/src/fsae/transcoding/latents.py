"""Latents on disk: .safetensors with "latents" (c t h w), and what decoding them needs.

Beside them may lie "first_frame" (H W 3, uint8), the clip's frame 0, from which decoders with injection draw detail.
The metadata holds the clip's frames per second and the fingerprint of the encoder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fsae.errors import UserError
from fsae.storage.files import atomic_path


@dataclass(frozen=True)
class SavedLatents:
    """A clip's latents and what came with them.

    Attributes:
        latents: Normalised, `c t h w`.
        fps: Frames per second of the clip.
        first_frame: Frame 0, uint8 `H W 3`, or None.
        encoder: Fingerprint of the encoder that made them, or None.
    """

    latents: Tensor
    fps: float
    first_frame: Tensor | None = None
    encoder: str | None = None


def save_latents(
    path: str | os.PathLike[str],
    latents: Tensor,
    fps: float,
    first_frame: Tensor | None = None,
    encoder: str | None = None,
) -> None:
    """Write a clip's latents; arguments as the attributes of `SavedLatents`. UserError if the file cannot be
    written."""
    tensors = {"latents": latents.contiguous()}
    if first_frame is not None:
        tensors["first_frame"] = first_frame.contiguous()
    metadata = {"format": "pt", "fps": repr(float(fps))}
    if encoder is not None:
        metadata["encoder"] = encoder
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot write {path} ({error}); make room on the disk, or give another place") from error


def load_latents(path: str | os.PathLike[str]) -> SavedLatents:
    """Read what `save_latents` wrote; UserError if the file is missing, broken, or holds no latents."""
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}; give latents that 'fsae encode' wrote")
    try:
        with safe_open(path, framework="pt") as file:
            latents: Tensor = file.get_tensor("latents")
            first: Tensor | None = file.get_tensor("first_frame") if "first_frame" in file.keys() else None  # noqa: SIM118
            metadata = file.metadata() or {}
            fps = float(metadata["fps"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} holds no latents ({error}); give a file that 'fsae encode' wrote") from error
    if latents.ndim != 4 or not latents.numel():
        raise UserError(f"{path} holds latents of shape {tuple(latents.shape)}; c t h w is wanted, none of them 0")
    if not latents.is_floating_point() or not bool(torch.isfinite(latents).all()):
        raise UserError(
            f"{path} holds latents of {latents.dtype} that are not all finite numbers; encode the clip anew"
        )
    if first is not None and (first.dtype != torch.uint8 or first.ndim != 3 or first.shape[2] != 3):
        raise UserError(f"{path} holds a first frame of shape {tuple(first.shape)}; H W 3 of bytes is wanted")
    return SavedLatents(latents, fps, first, metadata.get("encoder"))
