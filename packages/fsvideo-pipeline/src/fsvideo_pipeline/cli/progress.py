"""How far a video is, on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

    from fsvideo_pipeline.pipeline import Progress

STAGE_NAMES = {
    "encode": "encode photo and prompt",
    "base": "base model",
    "upsample": "upsample",
    "refine": "refine",
    "decode": "decode",
}


class StageBars:
    """One progress bar a stage, on stderr."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None

    def __enter__(self) -> StageBars:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, progress: Progress) -> None:
        """Show a stage's progress."""
        from tqdm import tqdm

        if progress.step == 0 or self.bar is None:
            self.close()
            self.bar = tqdm(total=progress.total, desc=STAGE_NAMES[progress.stage], unit="step")
        self.bar.update(progress.step - self.bar.n)

    def close(self) -> None:
        """End the bar that is shown."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
