"""The name by which sampling was first published; it lives in `fsdit.flow.sampling`."""

from __future__ import annotations

from fsdit.flow.sampling import CapturedDenoise, denoise

__all__ = ["CapturedDenoise", "denoise"]
