"""The figures that the nano model is held to, against formulas and pictures whose figure is known."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "nano"))

import evaluate
import goals
from evaluate import (
    cropped,
    language_of,
    main,
    make_cases,
    measure_autoencoder,
    measure_generation,
    measure_sizes,
    update_card,
)
from figures import (
    along_asked,
    colour_shift,
    differences_by_position,
    moved,
    part_way,
    psnr_db,
    sharpness_ratio,
    stripes,
    true_clip,
    unevenness,
    vertical_nyquist,
)
from goals import GOALS, Goal, Measured
from measure_motion import estimate_path, refine
from motion import MOTIONS, MOVING, Motion, camera_path
from sheets import STRIP, Shown, case_sheet, overview
from textures import dead_leaves
from wordings import LANGUAGES

from fsae import FSAE
from fsae.data.video import to_frames
from fsae.errors import UserError
from fsvideo_pipeline.pipeline import FSVideoPipeline
from fsvideo_pipeline.settings import packaged_model

TRAVEL = {"pan": 0.2, "zoom": 1.3, "roll": 12.0}


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def scene(y: Tensor, x: Tensor) -> Tensor:
    """A picture in three colours, known at every point: waves of many directions, of eight pixels and longer."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.zeros(*torch.broadcast_shapes(y.shape, x.shape), 3)
    for _ in range(40):
        angle, phase = (2 * math.pi * torch.rand(2, generator=generator)).tolist()
        length = math.exp(torch.rand(1, generator=generator).item() * math.log(8)) * 8
        wave = torch.sin(2 * math.pi / length * (math.cos(angle) * x + math.sin(angle) * y) + phase)
        colours += wave[..., None] * torch.rand(3, generator=generator) * math.sqrt(length)
    return (128 + 6 * colours).clamp(0, 255).round()


def video_of(motion: Motion, frames: int = 9, size: tuple[int, int] = (128, 160)) -> NDArray[np.uint8]:
    """The scene under a moving camera, worked out point by point: `T H W 3`."""
    y = torch.arange(size[0]).view(-1, 1) + 0.5 - size[0] / 2
    x = torch.arange(size[1]).view(1, -1) + 0.5 - size[1] / 2
    shots = [
        scene(m[1, 0] * x + m[1, 1] * y + m[1, 2], m[0, 0] * x + m[0, 1] * y + m[0, 2])
        for m in camera_path(motion, frames, size)
    ]
    return torch.stack(shots).to(torch.uint8).numpy()


def alignment_of(motion: Motion, size: tuple[int, int] = (128, 160)) -> Tensor:
    """(a, b, tx, ty) of the motion's last frame, from the camera's path."""
    matrix = camera_path(motion, 9, size)[-1]
    return torch.stack([matrix[0, 0], matrix[1, 0], matrix[0, 2] / size[1], matrix[1, 2] / size[1]])


def leaves(count: int, size: tuple[int, int] = (160, 200)) -> list[Tensor]:
    """Stand-ins for photographs, uint8 `3 H W`."""
    made = (dead_leaves(size, torch.Generator().manual_seed(i)) for i in range(count))
    return [(255 * picture).round().to(torch.uint8) for picture in made]


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MOVING)
def test_a_photograph_truly_moved_is_recognized_and_one_not_moved_is_not(kind: str) -> None:
    motion = Motion(kind, TRAVEL[kind.split()[0]])
    video = video_of(motion)
    known, covered = moved(video[0], alignment_of(motion))
    assert psnr_db(video[-1], known, covered) > 40
    found = refine(estimate_path(video)[-1], video[[0, -1]])
    measured, seen = moved(video[0], found)
    assert psnr_db(video[-1], measured, seen) > 40
    assert psnr_db(video[-1], video[0], covered) < 25
    # The share that a pan uncovers is its travel; what is uncovered is not compared.
    if kind.startswith("pan"):
        assert seen.mean() == pytest.approx(0.8, abs=0.02)
    assert psnr_db(video[-1], np.where(seen[..., None], measured, 0), seen) == psnr_db(video[-1], measured, seen)


def test_nothing_covered_is_the_worst() -> None:
    picture = noise(32, 32, 3)
    image, covered = moved(picture, torch.tensor([1.0, 0.0, 2.0, 0.0]))
    assert not covered.any()
    assert psnr_db(picture, image, covered) == 0
    assert sharpness_ratio(picture, image, covered) == 0


def test_psnr_is_its_formula() -> None:
    picture = np.full((16, 16, 3), 100, np.uint8)
    assert psnr_db(picture + np.uint8(10), picture) == pytest.approx(20 * math.log10(255 / 10), abs=1e-4)


def test_asked_motion_is_kept_and_another_is_not() -> None:
    zoomed_and_panned = torch.tensor([0.8, 0.0, 0.1, -0.05])
    for kind, expected in {
        "pan right": (1.0, 0.0, 0.1, 0.0),
        "pan left": (1.0, 0.0, 0.0, 0.0),
        "pan up": (1.0, 0.0, 0.0, -0.05),
        "zoom in": (0.8, 0.0, 0.0, 0.0),
        "zoom out": (1.0, 0.0, 0.0, 0.0),
        "still": (1.0, 0.0, 0.0, 0.0),
    }.items():
        torch.testing.assert_close(along_asked(zoomed_and_panned, kind), torch.tensor(expected))
    rolled = 1.2 * torch.tensor([math.cos(0.2), math.sin(0.2), 0, 0])
    torch.testing.assert_close(along_asked(rolled, "roll"), rolled / 1.2)


@pytest.mark.parametrize("kind", MOVING)
def test_half_the_way_is_the_middle_of_a_steady_path(kind: str) -> None:
    motion, size = Motion(kind, TRAVEL[kind.split()[0]]), (128, 160)
    matrix = camera_path(motion, 9, size)[4]
    middle = torch.stack([matrix[0, 0], matrix[1, 0], matrix[0, 2] / 160, matrix[1, 2] / 160])
    torch.testing.assert_close(part_way(alignment_of(motion, size), 0.5), middle)


def test_blur_costs_sharpness() -> None:
    picture = noise(64, 64, 3)
    assert sharpness_ratio(picture, picture) == 1
    blurred = [gaussian_filter(picture, (sigma, sigma, 0)) for sigma in (0.6, 1.2)]
    first, second = (sharpness_ratio(image, picture) for image in blurred)
    assert second < first < 0.7
    # Half the contrast is a quarter of the variance.
    assert sharpness_ratio(picture // 2 + np.uint8(64), picture) == pytest.approx(0.25, abs=0.01)
    # What is not covered is not looked at.
    half = picture.copy()
    half[:, 32:] = blurred[1][:, 32:]
    covered = np.zeros((64, 64), bool)
    covered[:, :32] = True
    assert sharpness_ratio(half, picture, covered) == 1
    assert sharpness_ratio(half, picture) < 0.7


def test_alternating_rows_are_found_and_columns_are_not() -> None:
    picture = np.full((64, 64, 3), 100, np.uint8)
    picture[::2] = 140
    assert vertical_nyquist(picture) == pytest.approx(32 / 3)
    assert vertical_nyquist(picture.swapaxes(0, 1)) == pytest.approx(0, abs=1e-9)
    assert vertical_nyquist(noise(256, 256, 3)) == pytest.approx(1, abs=0.05)


def test_energy_of_alternating_rows_is_the_spectrums_bin() -> None:
    picture = noise(16, 24, 3)
    grey = picture @ np.array([0.299, 0.587, 0.114]) / 255
    grey = grey - grey.mean()
    window = np.sin(np.pi * np.arange(16) / 16) ** 2
    spectrum = np.fft.fft(window[:, None] * grey, axis=0)
    expected = (np.abs(spectrum[8]) ** 2).mean() / ((window**2).sum() * grey.var())
    assert vertical_nyquist(picture) == pytest.approx(expected, rel=1e-5)


def test_stripes_are_found_in_a_blurred_picture() -> None:
    picture = noise(96, 96, 3)
    blurred = gaussian_filter(picture, (1.5, 1.5, 0))
    striped = blurred.astype(int)
    striped[::2] += 3
    assert 0.8 < stripes(picture) < 1.25
    assert stripes(blurred) < 1.5
    assert stripes(striped.astype(np.uint8)) > 5 * stripes(blurred)
    assert vertical_nyquist(striped.astype(np.uint8)) < vertical_nyquist(picture)  # why `stripes` is there


def test_differences_of_a_burst_and_of_a_steady_clip() -> None:
    levels = np.array([0, 2, 4, 6, 8, 10, 12, 14, 16])
    steady, burst = levels, np.array([0, 6, 7, 8, 9, 15, 16, 17, 18])
    clips = [np.broadcast_to(values.reshape(-1, 1, 1, 1), (9, 8, 8, 3)).astype(np.uint8) for values in (steady, burst)]
    np.testing.assert_allclose(differences_by_position(clips[0]), [2, 2, 2, 2])
    np.testing.assert_allclose(differences_by_position(clips[1]), [6, 1, 1, 1])
    assert [unevenness(differences_by_position(clip)[None]) for clip in clips] == [1, 6]
    # Averaged over clips before it is divided.
    assert unevenness(np.stack([differences_by_position(clip) for clip in clips])) == pytest.approx(8 / 3)


def test_a_true_clip_is_even() -> None:
    motion = Motion("pan right", 0.2)
    video = video_of(motion)
    clip = true_clip(video[0], alignment_of(motion), 9)
    assert np.array_equal(clip[0], video[0])
    assert psnr_db(clip[4, :, :120], video[4, :, :120]) > 40
    assert unevenness(differences_by_position(clip)[None]) < 1.1


def test_colour_shift_is_ciede2000_and_blind_to_texture() -> None:
    grey, lighter = (np.full((16, 16, 3), level, np.uint8) for level in (119, 129))

    def lightness(level: int) -> float:
        return 116 * (((level / 255 + 0.055) / 1.055) ** 2.4) ** (1 / 3) - 16

    mean = (lightness(119) + lightness(129)) / 2
    weight = 1 + 0.015 * (mean - 50) ** 2 / math.sqrt(20 + (mean - 50) ** 2)
    assert colour_shift(lighter, grey) == pytest.approx((lightness(129) - lightness(119)) / weight, rel=1e-3)
    checkered = grey.copy()
    checkered[::2] += 20
    checkered[1::2] -= 20
    assert colour_shift(checkered, grey) == pytest.approx(0, abs=1e-6)
    tinted = grey.copy()
    tinted[..., 0] += 20
    assert colour_shift(tinted, grey) > 5


# --- the table and the sheets ----------------------------------------------------------------------------------------


def test_a_goal_is_held_or_missed() -> None:
    least, most, none = Goal("a", "a", "dB", at_least=29), Goal("b", "b", at_most=2), Goal("c", "c", "%")
    assert [least.held(value) for value in (29, 28.9, math.nan)] == [True, False, False]
    assert [most.held(value) for value in (2, 2.1, math.nan)] == [True, False, False]
    assert none.held(5) and none.bound == ""
    assert (least.bound, most.bound, none.text(0.125)) == ("at least 29.00 dB", "at most 2.00", "12.5%")


def test_the_table_says_what_was_missed() -> None:
    found = Measured({"frame_0_psnr_mean": 30.0, "frame_0_psnr_worst": 20.0}, {"machine": "one"})
    lines = found.table().splitlines()
    assert [line.split("|")[4].strip() for line in lines[2:4]] == ["held", "**missed**"]
    assert lines[-1] == "| machine | one | | |" and len(lines) == 5
    assert [goal.key for goal in found.missed] == ["frame_0_psnr_worst"]


def test_a_card_keeps_its_words(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"before\n{evaluate.BEGIN}\nold\n{evaluate.END}\nafter\n")
    update_card(card, "| new |")
    assert card.read_text() == f"before\n{evaluate.BEGIN}\n| new |\n{evaluate.END}\nafter\n"
    card.write_text("no marks")
    with pytest.raises(UserError, match="is no card with the lines"):
        update_card(card, "| new |")


def test_sheets_show_every_pixel() -> None:
    photo, frames = noise(32, 48, 3), noise(33, 32, 48, 3)
    sheet = case_sheet(photo, frames, "the camera pans left")
    assert sheet.shape == (32 + STRIP, 6 * 48, 3)
    for place, picture in enumerate([photo, *frames[::8]]):
        assert np.array_equal(sheet[:32, 48 * place : 48 * (place + 1)], picture)
    assert (sheet[32:] < 128).any()  # the words


def test_the_overview_has_a_row_for_each_motion() -> None:
    small, large = noise(32, 32, 3), noise(64, 48, 3)
    page = overview([Shown(kind, "words", photo, photo) for photo in (small, small, small, large) for kind in MOTIONS])
    # Two of the small and the one large, each beside its last frame.
    assert page.shape == (len(MOTIONS) * (64 + STRIP), 2 * 64 + 96, 3)
    assert np.array_equal(page[:64, 128:176], large)


# --- cases and the command -------------------------------------------------------------------------------------------


def test_cases_take_motions_in_turn_and_photographs_from_everywhere() -> None:
    photographs = [torch.full((3, 64, 80), level, dtype=torch.uint8) for level in range(38)]
    cases = make_cases(photographs, 38, (64, 48), 0)
    assert [case.asked for case in cases[:16]] == [*MOTIONS, *MOTIONS]
    assert {case.photograph for case in cases} == set(range(38))
    assert all(case.size == (64, 48) and case.photo[0, 0, 0] == case.photograph for case in cases)
    assert make_cases(photographs, 8, (64, 48), 0)[7].prompt == cases[7].prompt
    assert {case.prompt for case in make_cases(photographs, 38, (64, 48), 1)} != {case.prompt for case in cases}


def test_every_motion_is_asked_for_in_english_and_in_others() -> None:
    said = [(MOTIONS[index % len(MOTIONS)], language_of(index)) for index in range(80)]
    for kind in MOTIONS:
        languages = [language for asked, language in said if asked == kind]
        assert languages.count("en") == 5
        assert len(set(languages)) == len(LANGUAGES)


def test_a_photograph_is_cropped_to_its_middle() -> None:
    photograph = torch.from_numpy(noise(40, 100, 3)).permute(2, 0, 1)
    assert np.array_equal(cropped(photograph, (40, 40)), photograph[:, :, 30:70].permute(1, 2, 0).numpy())
    assert cropped(photograph, (20, 64)).shape == (64, 20, 3)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--parts", "generation,looks"], "'looks'; accepted are autoencoder, generation, sizes, command"),
        (["--cases", "0"], "--cases is 0; give at least 1"),
        (["--autoencoder", "x", "--parts", "sizes"], "measure the others with --model"),
        (["--card", "--parts", "sizes"], "--card writes every figure"),
        (["--card", "--model", "nowhere"], "nowhere/README.md is no card with the lines"),
        (["--model", "nowhere", "--parts", "command"], "there is no model folder nowhere"),
    ],
)
def test_mistakes_get_a_sentence(given: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def tiny_autoencoder() -> FSAE:
    torch.manual_seed(0)
    return FSAE.from_preset("tiny").eval()


@pytest.mark.slow
def test_an_autoencoder_that_has_learned_nothing_misses_its_goal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_autoencoder().save_pretrained(tmp_path / "autoencoder")
    monkeypatch.setattr(evaluate, "load_photographs", lambda split: leaves(3) if split == "held-out" else [])
    output = tmp_path / "deep" / "figures.json"
    assert main(["--autoencoder", str(tmp_path / "autoencoder"), "--cases", "2", "--json", str(output)]) == 1
    said = capsys.readouterr()
    figures = json.loads(output.read_text())["figures"]
    assert set(figures) == {goal.key for goal in GOALS if goal.key.startswith("autoencoder")}
    assert abs(figures["autoencoder_gain"]) < 1 and "missed: autoencoder: moving clips" in said.err
    assert f"{figures['autoencoder_psnr']:.2f} dB" in said.out


@pytest.mark.slow
def test_a_clip_that_comes_back_whole_has_the_clips_own_figures() -> None:
    figures = measure_autoencoder(lambda video: to_frames(video).numpy(), leaves(3), 2).figures
    assert figures["autoencoder_gain"] == math.inf
    ratios = [figures[f"autoencoder_{name}"] for name in ("sharpness", "rows", "stripes", "unevenness")]
    assert ratios == pytest.approx([1, 1, 1, 1])


@pytest.mark.slow
def test_finished_videos_give_every_figure(tmp_path: Path) -> None:
    """The packaged model, at fewer frames and steps."""
    pipeline = FSVideoPipeline.from_pretrained(packaged_model())
    pipeline.register_to_config(settings=asdict(replace(pipeline.settings, frames=5, steps=2, refiner_steps=1)))
    photographs = leaves(3, (300, 300))
    found = measure_generation(pipeline, photographs, 2, tmp_path)
    found.add(measure_sizes(pipeline, photographs, 1, tmp_path))
    elsewhere = {goal.key for goal in GOALS if goal.key.startswith(("autoencoder", "command"))}
    assert set(found.figures) == {goal.key for goal in GOALS} - elsewhere
    assert all(math.isfinite(value) for value in found.figures.values())
    assert found.figures["seeds_differ"] > 0
    assert len(found.cases) == 2 + len(goals.LARGER_SIZES) and len(found.shown) == len(found.cases)
    sheets = sorted(tmp_path.glob("*.png"))
    assert [Image.open(sheet).size[0] for sheet in sheets] == [6 * 256, 6 * 256, 6 * 512, 6 * 640]
    json.dumps(found.cases)
