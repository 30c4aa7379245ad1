"""Where a run's figures and pictures go: TensorBoard events and PNG files in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from fsae.files import atomic_path


class Logs:
    """Scalars and images of one run; made in the main process only.

    Args:
        output_dir: The run's folder. Events go to ``tensorboard/``, validation images to ``validation/``.
        start: First step of this session; events a killed run wrote beyond it are hidden.
        tensorboard: Whether to write events.
    """

    def __init__(self, output_dir: Path, start: int, tensorboard: bool) -> None:
        self.images = output_dir / "validation"
        self.writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=start + 1 if start else None)

    def scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Write training scalars."""
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(f"train/{name}", value, step)

    def validation(self, results: Mapping[str, Tensor], step: int) -> None:
        """Write a validation's scalars (0-d) and images (3 H W in [0, 1])."""
        for name, value in results.items():
            if value.ndim == 0:
                if self.writer is not None:
                    self.writer.add_scalar(f"validation/{name}", float(value), step)
                continue
            pixels = (value.detach().float().clamp(0, 1) * 255).round().byte().cpu()
            if self.writer is not None:
                self.writer.add_image(f"validation/{name}", pixels, step)
            self.images.mkdir(exist_ok=True)
            with atomic_path(self.images / f"{step:08d}-{name}.png") as path:
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)

    def close(self) -> None:
        """Flush what is still to be written."""
        if self.writer is not None:
            self.writer.close()
