"""Where a run's figures and pictures go: TensorBoard events and PNG files in the run's folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fsae.errors import UserError
from fsae.storage.files import atomic_path


class Logs:
    """Scalars and images of one run; made in the main process only.

    Events go to `tensorboard/` in the run's folder, validation images to `validation/`. Events that a killed run wrote
    beyond `start`, the first step of this session, are hidden.
    """

    def __init__(self, output_dir: Path, start: int, tensorboard: bool) -> None:
        self.images = output_dir / "validation"
        self.writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=start + 1 if start else None)

    def scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Write training scalars."""
        with self._going_on_without():
            for name, value in scalars.items():
                self._events("add_scalar", f"train/{name}", value, step)

    def validation(self, results: Mapping[str, Tensor], step: int) -> None:
        """Write a validation's scalars (0-d) and images (3 H W in [0, 1])."""
        with self._going_on_without():
            for name, value in results.items():
                if value.ndim == 0:
                    self._events("add_scalar", f"validation/{name}", float(value), step)
                else:
                    self._image(name, (value.detach().float().clamp(0, 1) * 255).round().byte().cpu(), step)

    def close(self) -> None:
        """Flush what is still to be written."""
        with self._going_on_without():
            if self.writer is not None:
                self.writer.close()

    def _events(self, kind: str, *arguments: Any) -> None:
        if self.writer is not None:
            getattr(self.writer, kind)(*arguments)

    def _image(self, name: str, pixels: Tensor, step: int) -> None:
        self._events("add_image", f"validation/{name}", pixels, step)
        self.images.mkdir(exist_ok=True)
        with atomic_path(self.images / f"{step:08d}-{name}.png") as path:
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)

    @contextmanager
    def _going_on_without(self) -> Iterator[None]:
        """A disk that has no room for a picture may still have enough for what counts, or be cleared in time."""
        try:
            yield
        except (OSError, UserError) as error:
            self.writer = None
            tqdm.write(f"logs could not be written ({error}); training goes on, without events from here", sys.stderr)


def frame_grid(rows: Sequence[Tensor]) -> Tensor:
    """Clips `N 3 T H W` in [-1, 1], a row each -> first, middle and last frames, `3 H' W'` in [0, 1]."""
    frames = rows[0].shape[2]
    shown = sorted({0, frames // 2, frames - 1})
    strips = [torch.cat([clip[:, t] for clip in row for t in shown], dim=-1) for row in rows]
    return (torch.cat(strips, dim=-2).float().cpu() + 1) / 2
