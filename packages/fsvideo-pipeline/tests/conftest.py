"""A tiny model of the real classes with random weights, in a folder as users have it, and a photo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fsae.model import FSAE
from fsdit.conditioning.nano import nano_tokenizer, new_image_encoder, new_text_encoder
from fsdit.model import FSDiT
from fsupsampler.refiner import DynamicMask
from fsupsampler.upsampler import LatentUpsampler
from fsvideo_pipeline.pipeline import FSVideoPipeline
from fsvideo_pipeline.settings import Settings

SETTINGS = Settings(
    area=128 * 128, frames=5, fps=8.0, steps=2, guidance=3.0, shift=4.0, refiner_steps=3, refiner_shift=6.0
)


def tiny_components() -> dict[str, object]:
    statistics = {"latents_mean": [0.1] * 8, "latents_std": [0.5] * 8}
    return {
        "autoencoder": FSAE.from_preset("tiny", noise=0.05, **statistics),
        "text_encoder": new_text_encoder("tiny"),
        "tokenizer": nano_tokenizer(),
        "image_encoder": new_image_encoder("tiny"),
        "transformer": FSDiT.from_preset("tiny", text_len=24),
        "upsampler": LatentUpsampler.from_preset("tiny", latents_std=[0.5] * 8),
        "refiner": FSDiT.from_preset("tiny", text_len=24),
        "mask": DynamicMask(error_95=2.0),
    }


def build() -> FSVideoPipeline:
    torch.manual_seed(0)
    components = tiny_components()
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
            for parameter in component.parameters():  # no zero start: everything must matter to the output
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.15)
    return FSVideoPipeline(**components, settings=SETTINGS)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; tests that damage one copy it first."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipeline(saved: Path) -> FSVideoPipeline:
    return FSVideoPipeline.from_pretrained(saved)


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """uint8 `120 160 3`, different everywhere."""
    rows, columns = np.mgrid[:120, :160]
    return np.stack([rows * 2, columns, (rows * 3 + columns * 5) % 256], axis=-1).astype(np.uint8)


@pytest.fixture
def photo_file(photo: np.ndarray, tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    return path
