"""The name by which sampling was first published; it lives in `fsdit.flow`."""

from __future__ import annotations

from fsdit.flow.capture import CapturedDenoise
from fsdit.flow.sampling import denoise

__all__ = ["CapturedDenoise", "denoise"]
