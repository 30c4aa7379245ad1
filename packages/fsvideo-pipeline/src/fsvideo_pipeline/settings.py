"""The settings that a model folder was trained for, and its compression, read without torch.

The settings lie under "settings" in the folder's model_index.json, and the autoencoder's configuration tells its
compression, so that a plan of the video, and every mistake in the request, is known before any weight is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from fsae.errors import CheckpointError, UserError
from fsae.shapes import Compression
from fsae.storage.files import read_json

MODEL_INDEX = "model_index.json"

MAX_STEPS, MAX_GUIDANCE, MAX_FPS = 1000, 30, 240


@dataclass(frozen=True)
class Settings:
    """How a model is sampled unless the user says otherwise; the defaults are the paper's (§3.2).

    Attributes:
        area: Pixels of a video's frame; its aspect ratio is the photo's.
        frames: Frames of a video, 1 + 4k.
        fps: Frames per second that the motion was learned at.
        steps: Steps of the base model, each of two evaluations when guided.
        guidance: Classifier-free guidance scale of the base model; 1 switches it off.
        shift: Of the base model's noise levels.
        refiner_steps: Steps of the refiner, which is never guided.
        refiner_shift: Of the refiner's noise levels.
    """

    area: int = 720 * 1280
    frames: int = 121
    fps: float = 24.0
    steps: int = 30
    guidance: float = 5.0
    shift: float = 5.0
    refiner_steps: int = 8
    refiner_shift: float = 8.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> Settings:
        """Settings from JSON; CheckpointError, which names the file `source`, if one is unknown or no positive
        number."""
        known = {field.name for field in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise CheckpointError(f"{source} has the setting {name!r}; known are {', '.join(sorted(known))}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise CheckpointError(f"{source} sets {name} to {value!r}; it must be a number above 0")
        return cls(**values)

    def override(self, **given: Any) -> Settings:
        """The settings with what the user gave, None for as it is; UserError if a value is out of range."""
        chosen: Settings = replace(self, **{name: value for name, value in given.items() if value is not None})
        for name, value in (("steps", chosen.steps), ("refiner steps", chosen.refiner_steps)):
            if value not in range(1, MAX_STEPS + 1):
                raise UserError(f"{value} {name} given; accepted is a whole number from 1 to {MAX_STEPS}")
        if not (1 <= chosen.guidance <= MAX_GUIDANCE):
            raise UserError(
                f"guidance {chosen.guidance} given; accepted is a number from 1, which switches it off, to "
                f"{MAX_GUIDANCE}"
            )
        if not (0 < chosen.fps <= MAX_FPS):
            raise UserError(f"{chosen.fps} frames per second given; accepted is a number above 0, up to {MAX_FPS}")
        return chosen


def read_index(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The model_index.json of a pipeline's folder; CheckpointError if there is none of an FSVideoPipeline."""
    path = Path(folder) / MODEL_INDEX
    if not Path(folder).is_dir():
        raise CheckpointError(f"there is no model folder {folder}; check its name")
    index = read_json(path)
    if index.get("_class_name") != "FSVideoPipeline":
        raise CheckpointError(f"{path} does not describe an FSVideoPipeline; give another model folder")
    return index


def read_settings(folder: str | os.PathLike[str]) -> Settings:
    """The settings in a model folder's index; errors as `read_index` and `Settings.from_dict`."""
    values = read_index(folder).get("settings", {})
    source = str(Path(folder) / MODEL_INDEX)
    if not isinstance(values, dict):
        raise CheckpointError(f'{source} has "settings" that are no JSON object; copy it again')
    return Settings.from_dict(values, source)


def read_compression(folder: str | os.PathLike[str]) -> Compression:
    """That of the autoencoder in a model folder; CheckpointError if its configuration is missing or none of an FSAE."""
    path = Path(folder) / "autoencoder" / "config.json"
    config = read_json(path)
    try:
        return Compression.of(config)
    except (KeyError, TypeError):
        raise CheckpointError(f"{path} does not describe an FSAE; give another model folder") from None


def packaged_model() -> Path:
    """The folder of the nano model that comes with this package; UserError if it was installed without."""
    folder = Path(str(files("fsvideo_pipeline"))) / "models" / "nano"
    if not (folder / MODEL_INDEX).is_file():
        raise UserError(
            "this installation of fsvideo-pipeline holds no model; give one with --model FOLDER, or install "
            "the package's wheel again"
        )
    return folder
