"""Rectified flow: its path, solvers and sampling, one definition for training, generation and distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fsae.exports import lazy_exports

if TYPE_CHECKING:
    from fsdit.flow.capture import CapturedDenoise
    from fsdit.flow.path import FlowSchedule
    from fsdit.flow.sampling import denoise

__all__ = ["CapturedDenoise", "FlowSchedule", "denoise"]

__getattr__, __dir__ = lazy_exports(__name__, capture="CapturedDenoise", path="FlowSchedule", sampling="denoise")
