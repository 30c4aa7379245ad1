"""What the known camera teaches the nano autoencoder, and that its recipe runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "nano"))

from clips import NanoClips
from motion import Motion, camera_path
from tasks import (
    CameraClips,
    ClipTask,
    SeeingTask,
    Weights,
    free_code,
    latents_of_frames,
    read_code,
    recorded_velocity,
    without_code,
)
from train import Recaptioned, SizedClips
from velocity import CODE_CHANNELS, between, centres, motion_code, velocity

from fsae import FSAE
from fsae.data.order import Cut
from fsae.layers.config import BlockStyle
from fsae.layers.motion import VELOCITY_UNIT, MotionField
from fsae.storage.files import read_json
from fsae.weights.inflation import inflate
from fsdit.preparation.cache import make_cache
from fsdit.preparation.config import CacheConfig
from fsvideo_pipeline import FSVideoPipeline

MOTIONS = [Motion("pan left", 0.2), Motion("zoom in", 1.3, ease=0.4), Motion("roll", 15.0), Motion("still")]


def nano() -> FSAE:
    torch.manual_seed(0)
    model = FSAE.from_preset("nano")
    inflate(model)
    return model


def clips(frames: int, side: int, count: int) -> dict[str, torch.Tensor]:
    world = NanoClips("train", frames, (side, side), texture_probability=1.0, photographs=[], seed=3)
    return CameraClips([world], [count])[0]


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_maps_between_frames_lead_content_to_itself(motion: Motion) -> None:
    """A smooth picture seen by the camera: frame 8 equals frame 4 looked at where the map says."""
    path = camera_path(motion, 9, (64, 64))

    def seen(frame: int, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        a, b, c, d, e, f = path[frame].flatten()
        at_x, at_y = a * x + b * y + c, d * x + e * y + f
        return torch.sin(0.09 * at_x + 0.04 * at_y) + torch.cos(0.07 * at_y)

    y, x = centres(64, 64).view(-1, 1), centres(64, 64).view(1, -1)
    (a, b, c), (d, e, f) = between(path[None], torch.tensor([8]), torch.tensor([4]))[0, 0]
    torch.testing.assert_close(seen(4, d * x + e * y + f, a * x + b * y + c), seen(8, y, x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_true_velocities_add_up_to_where_the_camera_says_things_were(motion: Motion) -> None:
    path = camera_path(motion, 9, (128, 128))[None]
    field = MotionField(1, 1, frames=4, cell=8, style=BlockStyle(norm_affine=False))
    made = field.added_up(velocity(path, (128, 128), (16, 16)))[0, -2:, -1]
    maps = path[0, -1]
    at = centres(16, 128)
    truth = torch.stack([maps[1, 0] * at + maps[1, 1] * at.view(-1, 1) + maps[1, 2] - at.view(-1, 1),
                         maps[0, 0] * at + maps[0, 1] * at.view(-1, 1) + maps[0, 2] - at])  # fmt: skip
    torch.testing.assert_close(made[:, 4:12, 4:12], truth[:, 4:12, 4:12], rtol=0, atol=0.02)


def test_the_code_of_a_pan_is_its_speed() -> None:
    path = camera_path(Motion("pan right", 0.25), 9, (64, 128))[None]
    code = motion_code(path, (64, 128))
    assert code.shape == (1, CODE_CHANNELS, 3, 1, 2)
    rows, columns = code.unflatten(1, (4, 2)).unbind(2)
    assert rows.abs().max() < 1e-6 and columns[:, :, 0].abs().max() == 0
    # A quarter of 128 pixels in 8 frames: 16 pixels a latent.
    torch.testing.assert_close(columns[:, :, 1:] * VELOCITY_UNIT, torch.full((1, 4, 2, 1, 2), 16.0))


def test_places_of_the_code_are_rows_before_columns() -> None:
    """In a zoom the velocity grows from the middle: what is left of it goes left, above it up."""
    code = motion_code(camera_path(Motion("zoom out", 1.3), 5, (64, 64))[None], (64, 64))[0, :, 1, 0, 0]
    top_left, top_right, bottom_left, _ = code.view(4, 2)
    assert top_left[0] == pytest.approx(float(top_right[0])) and top_left[1] == pytest.approx(float(bottom_left[1]))
    assert top_left[0] == pytest.approx(-float(bottom_left[0])) and top_left[1] == pytest.approx(-float(top_right[1]))
    assert abs(float(top_left[0])) > 0.1


def test_frames_as_pictures_are_the_pictures_own_latents() -> None:
    model = nano().eval()
    video = torch.rand(1, 3, 5, 64, 64) * 2 - 1
    with torch.no_grad():
        latents, features = latents_of_frames(model, video)
        last = model.encoder(video[:, :, 4:])
    torch.testing.assert_close(latents[:, :, 1:], last, rtol=1e-4, atol=1e-4)
    assert [tuple(f.shape[2:]) for f in features] == [(64 >> s, 64 >> s) for s in range(7)]
    assert not without_code(latents)[:, :CODE_CHANNELS].any()


def test_freed_channels_hold_nothing_but_what_the_comparison_says() -> None:
    model, video = nano().eval(), torch.rand(1, 3, 5, 64, 64) * 2 - 1
    assert model.encoder.match is not None
    with torch.no_grad():
        before = model.encoder(video)
        free_code(model.encoder)
        after = model.encoder(video)
        assert after[:, :CODE_CHANNELS].abs().max() < 1e-5 and before[:, :CODE_CHANNELS].abs().max() > 0.1
        assert torch.equal(after[:, CODE_CHANNELS:], before[:, CODE_CHANNELS:])
        torch.nn.init.ones_(model.encoder.match.to_latents.weight[:1])
        assert model.encoder(video)[0, 0, 1].abs().max() > 1e-3


def test_items_of_several_worlds_come_in_turn() -> None:
    worlds = [NanoClips("train", n, (64, 64), texture_probability=1.0, photographs=[]) for n in (1, 5)]
    mixed = CameraClips(worlds, [1, 3])
    assert [tuple(mixed[i]["video"].shape[:3]) for i in range(3)] == [(1, 3, 1), (3, 3, 5), (1, 3, 1)]
    assert mixed.order(Cut(0, 1, 1, 1, 0)).micro_batch(7, 0) == [(7,)]


def test_seeing_is_learned_from_every_fourth_frame() -> None:
    """Ten updates on two moving clips halve the error; where they show but their first frame, none is gained."""
    world = NanoClips("train", 9, (128, 128), texture_probability=1.0, photographs=[], seed=3, still_fraction=0.0)
    batch = CameraClips([world], [2], every=4)[0]
    assert batch["video"].shape[2] == 3 and batch["path"].shape[1] == 9
    still = {**batch, "video": batch["video"][:, :, :1].expand(-1, -1, 3, -1, -1)}
    for given, learned in ((batch, True), (still, False)):
        match = nano().encoder.match
        assert match is not None
        task = SeeingTask(match, 8, given)
        optimizer = torch.optim.Adam(match.parameters(), lr=1e-2)
        errors = []
        for _ in range(10):
            terms = task.loss(given, torch.Generator())
            errors.append(terms["pixels"].item())
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
        assert (errors[-1] < 0.5 * errors[0]) == learned


def test_a_decoder_that_reads_the_code_knows_how_things_move() -> None:
    model, batch = nano().eval(), clips(9, 128, 2)
    code = motion_code(batch["path"], (128, 128))
    latents = torch.cat([code, torch.randn(2, 120, *code.shape[2:])], dim=1)
    truth = velocity(batch["path"], (128, 128), (16, 16))
    errors = []
    for _ in range(2):
        with torch.no_grad(), recorded_velocity(model) as velocities:
            model.decoder(latents, None, torch.Generator())
        errors.append((velocities[0] - truth).abs().mean().item())
        read_code(model)
    assert errors[1] < 0.1 * errors[0] and errors[0] > 0.5


def test_the_camera_is_told_only_where_it_is_asked_for() -> None:
    """With told motion the decoder's clip does not depend on what the encoder put into the motion channels."""
    batch, made = clips(5, 64, 1), {}
    for told in (0.0, 1.0):
        for shift in (0.0, 5.0):
            model = nano().eval()
            with torch.no_grad():
                model.encoder.conv_out.bias[:CODE_CHANNELS] += shift
                task = ClipTask(model, Weights(alone=0.0, told=told), batch)
                made[told, shift] = task.loss(batch, torch.Generator().manual_seed(0))["l1"].item()
    assert made[1.0, 0.0] == made[1.0, 5.0] and made[0.0, 0.0] != made[0.0, 5.0]


def test_kept_clips_are_told_in_new_words_in_every_epoch(tmp_path: Path) -> None:
    nano().save_pretrained(tmp_path / "autoencoder")
    worlds = [
        (NanoClips("train", 5, size, texture_probability=1.0, photographs=[], seed=3), count)
        for size, count in (((64, 64), 3), ((64, 128), 1))
    ]
    clips = SizedClips(worlds)
    config = CacheConfig("the nano world", str(tmp_path / "latents"), str(tmp_path / "autoencoder"), device="cpu")
    make_cache(config, clips)
    data = Recaptioned(tmp_path / "latents")
    assert data.shapes[:, 1:].tolist() == [[2, 1, 1]] * 3 + [[2, 1, 2]]
    assert [bucket.share for bucket in data.buckets] == [3, 1]
    with torch.no_grad():
        latents = nano().eval().encode(worlds[0][0][2]["video"][None])[0]
    assert (data[2]["latents"] - latents).abs().mean() < 0.05 * latents.abs().mean()  # what 8 bits lose
    told = {data.sample(0, epoch)["caption"] for epoch in range(8)}
    assert len(told) > 4 and data.sample(0, 3)["caption"] == data.sample(0, 3)["caption"]
    assert all(plan.motion.kind for _, plan in clips.plans) and not any(words.startswith("{") for words in told)


@pytest.mark.slow
def test_the_whole_recipe_runs_from_nothing(tmp_path: Path) -> None:
    """Two updates a stage; what it exports is a pipeline that makes a video."""
    root = Path(__file__).resolve().parents[1]
    command = [
        sys.executable,
        str(root / "tools/nano/train.py"),
        "--smoke",
        "--folder",
        str(tmp_path),
        "--threads",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"motions", "languages"} <= read_json(tmp_path / "pipeline" / "abilities.json").keys()
    pipeline = FSVideoPipeline.from_pretrained(tmp_path / "pipeline")
    picture = np.full((128, 128, 3), 99, np.uint8)
    made = pipeline(picture, "pan left", size=(128, 128), frames=5, steps=2, generator=0)
    assert made.frames is not None and made.frames.shape == (5, 128, 128, 3)
