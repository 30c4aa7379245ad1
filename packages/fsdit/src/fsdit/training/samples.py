"""Validation samples as files that anyone can open: videos, pictures, and their captions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fsae.data.video import to_frames, write_video
from fsae.errors import UserError
from fsae.storage.files import atomic_path, write_json


def write_samples(folder: Path, videos: Tensor, captions: Sequence[str], fps: float) -> None:
    """Write clips `B 3 T H W` in [-1, 1] as NUMBER.mp4, single frames as NUMBER.png, and captions.json of them.

    A disk that has no room for them ends no training.
    """
    suffix = "mp4" if videos.shape[2] > 1 else "png"
    names = [f"{number:02}.{suffix}" for number in range(len(videos))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, video in zip(names, videos, strict=True):
            frames = to_frames(video).numpy()
            if suffix == "mp4":
                write_video(folder / name, frames, fps)
                continue
            with atomic_path(folder / name) as temporary:
                Image.fromarray(frames[0]).save(temporary)
        write_json(folder / "captions.json", dict(zip(names, captions, strict=True)))
    except (OSError, UserError) as error:
        tqdm.write(f"samples could not be written ({error}); training goes on", sys.stderr)
