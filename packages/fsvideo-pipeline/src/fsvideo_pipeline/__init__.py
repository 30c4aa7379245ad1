"""FSVideo from end to end: image and prompt in, video out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fsae.exports import lazy_exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fsvideo_pipeline.pipeline import FSVideoPipeline
    from fsvideo_pipeline.request import Job, VideoRequest

__all__ = ["FSVideoPipeline", "Job", "VideoRequest", "__version__"]

__getattr__, __dir__ = lazy_exports(__name__, pipeline="FSVideoPipeline", request="Job VideoRequest")
