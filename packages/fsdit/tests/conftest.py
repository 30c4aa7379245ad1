"""What several tests train with: parts small enough for a second, and videos of real pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage import data

from fsae import FSAE
from fsae.data.config import ClipsConfig, Sampling
from fsae.data.datasets import VideoFolder
from fsae.data.image import cover
from fsae.data.video import write_video
from fsae.stages.task import measure_latent_statistics
from fsdit import FSDiT
from fsdit.conditioning import nano_tokenizer
from fsdit.conditioning.nano import new_image_encoder, new_text_encoder
from fsdit.preparation.cache import make_cache
from fsdit.preparation.config import CacheConfig

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "immunohistochemistry", "retina")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The indices of sources go where pytest's files do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache_home")))
        yield


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clips.jsonl and its 24 videos, 5 frames of 64 x 64 pixels at 24 a second: photographs in motion.

    All videos of a photograph begin with the same frame; only the caption tells where it goes.
    """
    folder = tmp_path_factory.mktemp("films")
    lines = []
    for photo in PHOTOS:
        pixels = cover(getattr(data, photo)(), (144, 144))
        for direction, (down, right) in DIRECTIONS.items():
            corners = [(40 + 10 * t * down, 40 + 10 * t * right) for t in range(5)]
            name = f"{photo}-{direction}.mp4"
            write_video(folder / name, [np.ascontiguousarray(pixels[y : y + 64, x : x + 64]) for y, x in corners], 24)
            lines.append(json.dumps({"path": name, "caption": f"the camera pans {direction}"}))
    (folder / "clips.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def parts(films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of saved parts that fit each other: autoencoder, encoders, transformer; all weights random."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    encoder: dict[str, Any] = {"widths": (8, 8, *(16,) * 5), "latent_channels": 4, "shortcut": "dc-ae"}
    autoencoder = FSAE.from_preset("tiny", **encoder, frame_matching=False).eval()
    mean, std = measure_latent_statistics(
        autoencoder, VideoFolder(films / "clips.jsonl", Sampling(5, size=(64, 64))), 12
    )
    autoencoder.register_to_config(latents_mean=mean, latents_std=std)
    autoencoder.save_pretrained(folder / "autoencoder")
    new_text_encoder("tiny").save_pretrained(folder / "encoders" / "text_encoder")
    nano_tokenizer().save_pretrained(folder / "encoders" / "tokenizer")
    new_image_encoder("tiny").save_pretrained(folder / "encoders" / "image_encoder")
    model = FSDiT.from_preset("tiny", num_layers=2, text_len=32, latent_channels=4)
    model.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def cache(films: Path, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The films, encoded by the parts."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    made_by = {"autoencoder": str(parts / "autoencoder"), "encoders": str(parts / "encoders"), "text_len": 32}
    source = {"data": str(films / "clips.jsonl"), "clips": ClipsConfig(5, 64, 64)}
    make_cache(CacheConfig(output=str(folder), latents="fp32", device="cpu", **source, **made_by))
    return folder
