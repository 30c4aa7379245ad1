"""What the nano recipe tells the autoencoder is where things were."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "nano"))

from motion import Motion, camera_path
from told import CODE_CHANNELS, CODE_UNIT, OFFSET_UNIT, MotionTask, centres, displacement, motion_code, told_latents

from fsae import FSAE


@pytest.mark.parametrize(
    "motion", [Motion("pan left", 0.2), Motion("zoom in", 1.3), Motion("roll", 15.0), Motion("still")]
)
def test_displacement_finds_the_content_in_frame_0(motion: Motion) -> None:
    """A smooth picture moved by the camera equals frame 0 looked at where the displacement says."""
    path = camera_path(motion, 9, (64, 64))

    def picture(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(0.09 * x + 0.04 * y) + torch.cos(0.07 * y)

    y, x = centres(64, 64).view(-1, 1), centres(64, 64).view(1, -1)
    for frame in (0, 5, 8):
        a, b, c, d, e, f = path[frame].flatten()
        moved = picture(d * x + e * y + f, a * x + b * y + c)
        shift = displacement(path[None], torch.tensor([float(frame)]), centres(64, 64), centres(64, 64))[0, 0]
        torch.testing.assert_close(picture(y + shift[..., 0], x + shift[..., 1]), moved, rtol=0, atol=1e-4)


def test_the_code_of_a_pan_is_its_travel_so_far() -> None:
    path = camera_path(Motion("pan right", 0.25), 9, (64, 128))[None]
    code = motion_code(path, 3, 64, 128)
    assert code.shape == (1, CODE_CHANNELS, 3, 1, 2)
    rows, columns = code.view(2, 2, 2, 2, 3, 1, 2).unbind(3)  # instant y x axis t h w
    assert rows.abs().max() < 1e-6
    # Latent 2 stands for frames 5 to 8; the whole travel, a quarter of 128 pixels, is reached at frame 8.
    for instant, pixels in ((0, 32 * 5 / 8), (1, 32.0)):
        torch.testing.assert_close(columns[instant, :, :, 2] * CODE_UNIT, torch.full((2, 2, 1, 2), pixels))


def test_told_latents_are_those_of_frames_with_the_code_after_the_first() -> None:
    torch.manual_seed(0)
    model = FSAE.from_preset("nano").eval()
    video = torch.rand(1, 3, 5, 64, 64) * 2 - 1
    path = camera_path(Motion("pan up", 0.2), 5, (64, 64))[None]
    with torch.no_grad():
        latents, features = told_latents(model, video, path)
        first, last = model.encoder(video[:, :, :1]), model.encoder(video[:, :, 4:])
    torch.testing.assert_close(latents[:, :, :1], first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents[:, CODE_CHANNELS:, 1:], last[:, CODE_CHANNELS:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents[:, :CODE_CHANNELS, 1:], motion_code(path, 2, 64, 64)[:, :, 1:])
    assert [tuple(f.shape[2:]) for f in features] == [(64 >> s, 64 >> s) for s in range(7)]


def test_true_offsets_have_no_error_and_others_do() -> None:
    path = camera_path(Motion("zoom out", 1.3), 9, (64, 64))[None]
    instants = torch.tensor([0.0, 0.0, 1.0, 4.0, 5.0, 8.0])
    truth = displacement(path, instants, centres(4, 64), centres(4, 64)) / OFFSET_UNIT
    told = truth.view(1, 3, 2, 4, 4, 2).permute(0, 1, 3, 4, 2, 5).flatten(-2)
    assert float(MotionTask._offset_error(told, path, 64, 64)) < 1e-6
    assert float(MotionTask._offset_error(told[..., [2, 3, 0, 1]], path, 64, 64)) > 1e-3
