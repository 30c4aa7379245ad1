"""Sizes of videos and of latents, against counting; and that they are to be had without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fsae import FSAE
from fsae.errors import UserError
from fsae.presets import PRESETS
from fsae.shapes import Compression


def test_the_papers_sizes() -> None:
    for preset in PRESETS.values():
        assert Compression.of(preset) == Compression(64, 4)
    assert Compression(64, 4).latent_size(121, 1024, 640) == (31, 16, 10)  # paper §2.2: 64 x 64 x 4


@pytest.mark.parametrize(("space", "time"), [(64, 4), (8, 1), (16, 8)])
def test_frames_and_latents_by_counting(space: int, time: int) -> None:
    """A latent for the first frame, and another whenever `time` more frames are there."""
    compression, latents = Compression(space, time), 1
    for frames in range(1, 4 * time):
        latents += frames > 1 and (frames - 1) % time == 0
        assert compression.latents(frames) == latents
        assert compression.frames(latents) <= frames < compression.frames(latents + 1)
    assert compression.video_size(*compression.latent_size(1 + 2 * time, space, 3 * space)) == (
        1 + 2 * time,
        space,
        3 * space,
    )


@pytest.mark.parametrize("frames", [-3, 0, 2, 4, 8])
def test_frames_that_fit_no_latents(frames: int) -> None:
    with pytest.raises(UserError, match=rf"{frames} frames cannot be encoded; accepted is 1 \+ 4k \(1, 5, 9, ...\)"):
        Compression(64, 4).check(frames, 64, 64)


@pytest.mark.parametrize(("height", "width"), [(0, 64), (64, -64), (32, 64), (64, 65)])
def test_pixels_that_fit_no_latents(height: int, width: int) -> None:
    with pytest.raises(UserError, match=rf"{width}x{height} pixels cannot be encoded; accepted are multiples of 64"):
        Compression(64, 4).check(1, height, width)


@torch.no_grad()
def test_cells_and_rates_are_those_of_the_stages() -> None:
    """Against the features of a real encoder."""
    depths = dict.fromkeys(("encoder_depths", "decoder_depths"), (1,) * 4)
    model = FSAE.from_preset("tiny", widths=(8,) * 4, **depths, frame_matching=False).eval()
    features, latents = model.encoder.features(torch.zeros(1, 3, 9, 32, 64))
    assert model.latent_shape(9, 32, 64) == latents.shape[1:]
    compression = model.compression
    for stage, feature in enumerate(features):
        assert feature.shape[2] == 1 + compression.rate(stage) * 2
        assert feature.shape[3:] == (32 // compression.cell(stage), 64 // compression.cell(stage))
    assert compression.cell(7) == compression.space


def test_no_torch() -> None:
    code = "import sys, fsae.shapes, fsae.presets; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
