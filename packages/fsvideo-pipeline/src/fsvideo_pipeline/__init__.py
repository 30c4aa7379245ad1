"""FSVideo from end to end: image and prompt in, video out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fsae.exports import lazy_exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fsvideo_pipeline.pipeline import FSVideoPipeline

__all__ = ["FSVideoPipeline", "__version__"]

__getattr__, __dir__ = lazy_exports(__name__, {"FSVideoPipeline": "fsvideo_pipeline.pipeline"})
