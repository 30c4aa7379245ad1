"""The name by which the import of Wan was first published; it lives in `fsdit.wan.convert`."""

from __future__ import annotations

from fsdit.wan.convert import WanImport, from_wan

__all__ = ["WanImport", "from_wan"]
