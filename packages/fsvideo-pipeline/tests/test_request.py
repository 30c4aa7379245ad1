"""A request becomes a job once, by the model that is to make it; a folder tells enough for that without its weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fsae.errors import CheckpointError, UserError
from fsae.model import FSAE
from fsae.shapes import Compression
from fsvideo_pipeline.pipeline import FSVideoPipeline
from fsvideo_pipeline.request import VideoRequest, resolve
from fsvideo_pipeline.settings import Settings, packaged_model, read_compression, read_settings

PROMPT = "the camera pans left"
PAPER = Compression(64, 4)


@pytest.fixture(scope="module")
def finer(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose latents are 16 pixels wide and 2 frames long."""
    folder = Path(shutil.copytree(saved, tmp_path_factory.mktemp("models") / "finer"))
    depths = dict.fromkeys(("encoder_depths", "decoder_depths"), (1,) * 5)
    autoencoder = FSAE.from_preset("tiny", widths=(8,) * 5, temporal_stages=1, **depths, frame_matching=False)
    autoencoder.save_pretrained(folder / "autoencoder")
    return folder


def test_what_is_not_asked_the_settings_say(photo: np.ndarray) -> None:
    settings = Settings(area=128 * 128, frames=9, fps=12.0, steps=7, guidance=2.0, shift=3.0)
    job = resolve(VideoRequest(photo, PROMPT, seed=4), settings, PAPER)
    assert job.settings == settings
    assert job.facts() == {
        "prompt": PROMPT,
        "seed": 4,
        "size": "128x96",
        "canvas": "128x128",
        "frames": 9,
        "fps": 12.0,
        "steps": 7,
        "guidance": 2.0,
        "refiner_steps": 8,
    }
    json.dumps(job.facts(), allow_nan=False)
    with pytest.raises(FrozenInstanceError):
        job.seed = 5


@pytest.mark.parametrize(
    ("asked", "value"), [("fps", 6.0), ("steps", 3), ("guidance", 1.0), ("refiner_steps", 2), ("frames", 13)]
)
def test_what_is_asked_takes_a_settings_place_and_no_others(asked: str, value: float, photo: np.ndarray) -> None:
    settings = resolve(VideoRequest(photo, PROMPT, **{asked: value}), Settings(), PAPER).settings
    assert asdict(settings) == {**asdict(Settings()), asked: value}


def test_every_form_of_a_photo_becomes_pixels(photo: np.ndarray) -> None:
    for image in (photo, Image.fromarray(photo), torch.from_numpy(photo)):
        np.testing.assert_array_equal(resolve(VideoRequest(image, PROMPT), Settings(), PAPER).photo, photo)


def test_a_seed_is_drawn_where_none_is_given(photo: np.ndarray) -> None:
    seeds = [resolve(VideoRequest(photo, PROMPT), Settings(), PAPER).seed for _ in range(4)]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "caf\udce9"}, "is no UTF-8"),
        ({"seed": -1}, "seed -1 given"),
        ({"seed": 2**63}, "seed 9223372036854775808 given"),
        ({"size": (20_000, 100)}, "size 20000x100 given"),
        ({"frames": 0}, "0 frames given"),
        ({"fps": 241}, "241 frames per second given"),
        ({"image": np.zeros((0, 4, 3), np.uint8)}, "an image of uint8 .0, 4, 3. given"),
    ],
    ids=str,
)
def test_what_cannot_be_made_is_no_job(wrong: dict[str, Any], words: str, photo: np.ndarray) -> None:
    with pytest.raises(UserError, match=words):
        resolve(VideoRequest(**{"image": photo, "prompt": PROMPT, **wrong}), Settings(), PAPER)


@pytest.mark.parametrize("compression", [(64, 4), (16, 2)])
def test_a_folder_tells_what_its_pipeline_does(
    compression: tuple[int, int], saved: Path, finer: Path, photo: np.ndarray
) -> None:
    """The command settles a job before the model is loaded; the model would settle it the same."""
    folder = saved if compression == (64, 4) else finer
    request = VideoRequest(photo, PROMPT, size=(100, 60), frames=4, seed=3)
    assert read_compression(folder) == Compression(*compression)
    early = resolve(request, read_settings(folder), read_compression(folder))
    late = FSVideoPipeline.from_pretrained(folder).job(request)
    assert (early.plan, early.settings, early.seed) == (late.plan, late.settings, late.seed)


def test_a_model_of_another_compression_makes_its_own_sizes(finer: Path, photo: np.ndarray) -> None:
    pipeline = FSVideoPipeline.from_pretrained(finer)
    job = pipeline.job(VideoRequest(photo, PROMPT, size=(60, 40), frames=3, seed=3))
    assert job.plan.geometry.canvas == (64, 64)
    video = pipeline.run(job)
    assert video.frames is not None
    assert video.frames.shape == (3, 40, 60, 3)
    assert video.sample.latents.shape == (1, 8, *job.plan.geometry.latents) == (1, 8, 2, 4, 4)


def test_a_job_of_another_model_is_refused_before_any_work(
    pipeline: FSVideoPipeline, finer: Path, photo: np.ndarray
) -> None:
    request = VideoRequest(photo, PROMPT, size=(128, 128), frames=5)
    job = resolve(request, read_settings(finer), read_compression(finer))
    with pytest.raises(UserError, match="settled for another model"):
        pipeline.run(job, lambda progress: pytest.fail("work was begun"))


def test_an_autoencoder_without_its_configuration_is_a_sentence(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    path = folder / "autoencoder" / "config.json"
    path.write_text('{"widths": 7}')
    with pytest.raises(CheckpointError, match="does not describe an FSAE"):
        read_compression(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="there is no .*config.json"):
        read_compression(folder)


def test_a_job_needs_no_torch() -> None:
    """With the packaged model, by the command's own function."""
    code = (
        "import sys, numpy; from fsvideo_pipeline.cli.generate import resolve, VideoRequest, read_settings;"
        "from fsvideo_pipeline.settings import read_compression;"
        "photo = numpy.zeros((300, 400, 3), numpy.uint8);"
        "job = resolve(VideoRequest(photo, 'x'), read_settings(sys.argv[1]), read_compression(sys.argv[1]));"
        "print(job.plan.geometry.size, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(packaged_model())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "342x256 False"
