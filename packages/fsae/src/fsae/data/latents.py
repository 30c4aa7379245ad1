"""Latents on disk: .safetensors with "latents" (c t h w) and, as metadata, the clip's frames per second."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fsae.errors import UserError
from fsae.files import atomic_path


def save_latents(path: str | os.PathLike[str], latents: Tensor, fps: float) -> None:
    """Write normalised latents ``c t h w`` and the frames per second they were made from."""
    with atomic_path(path) as temporary:
        save_file({"latents": latents.contiguous()}, temporary, metadata={"format": "pt", "fps": repr(float(fps))})


def load_latents(path: str | os.PathLike[str]) -> tuple[Tensor, float]:
    """Read what ``save_latents`` wrote.

    Raises:
        UserError: the file is missing, broken, or holds no latents.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}; give latents that 'fsae encode' wrote")
    try:
        with safe_open(path, framework="pt") as file:
            latents: Tensor = file.get_tensor("latents")
            fps = float((file.metadata() or {})["fps"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} holds no latents ({error}); give a file that 'fsae encode' wrote") from error
    if latents.ndim != 4:
        raise UserError(f"{path} holds latents of shape {tuple(latents.shape)}; c t h w is wanted")
    return latents, fps
