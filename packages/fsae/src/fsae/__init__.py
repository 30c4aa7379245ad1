"""FSAE: the video autoencoder of FSVideo (paper §2.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fsae.exports import lazy_exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fsae.errors import UserError
    from fsae.model import FSAE

__all__ = ["FSAE", "UserError", "__version__"]

__getattr__, __dir__ = lazy_exports(__name__, model="FSAE", errors="UserError")
