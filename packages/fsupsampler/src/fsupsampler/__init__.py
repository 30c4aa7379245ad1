"""The latent upsampler and the high-resolution refiner of FSVideo (paper §2.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fsae.exports import lazy_exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fsupsampler.upsampler import LatentUpsampler

__all__ = ["LatentUpsampler", "__version__"]

__getattr__, __dir__ = lazy_exports(__name__, upsampler="LatentUpsampler")
