"""The latent upsampler and the high-resolution refiner of FSVideo (paper §2.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that holds it: loaded on first use, so that importing the package costs nothing.
_EXPORTS = {"LatentUpsampler": "fsupsampler.upsampler"}

if TYPE_CHECKING:
    from fsupsampler.upsampler import LatentUpsampler

__all__ = ["LatentUpsampler", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
