"""FSDiT: the diffusion transformer of FSVideo with Layer Memory (paper §2.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fsae.exports import lazy_exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fsdit.model import FSDiT

__all__ = ["FSDiT", "__version__"]

__getattr__, __dir__ = lazy_exports(__name__, model="FSDiT")
