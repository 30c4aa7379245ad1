"""Torch's names for annotations in modules that must load without torch.

The type checker sees the classes, Python sees Any. They cannot stand under TYPE_CHECKING in the module of a
configuration class: the command line's parser runs such blocks, and torch would be imported for a help text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Generator, Tensor
else:
    Generator = Tensor = Any

__all__ = ["Generator", "Tensor"]
