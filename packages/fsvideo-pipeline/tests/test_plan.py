"""Sizes and frame counts: every request becomes a canvas that the models can work on, or a sentence."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fsae.errors import UserError
from fsvideo_pipeline.canvas import crop_video, make_canvas, reflected
from fsvideo_pipeline.plan import cover, default_size, parse_size, plan_video, snap_frames

NANO = 256 * 256
PAPER = 720 * 1280


@pytest.mark.parametrize(
    ("photo", "size", "canvas"),
    [
        ((1000, 1000), (256, 256), (256, 256)),
        ((4000, 3000), (342, 256), (384, 256)),
        ((3000, 4000), (256, 342), (256, 384)),
        ((3000, 2000), (384, 256), (384, 256)),
        ((1920, 1080), (384, 216), (384, 256)),
        ((4, 1), (512, 128), (512, 128)),
        ((20_000, 10), (512, 128), (512, 128)),
        ((1, 1), (256, 256), (256, 256)),
    ],
)
def test_the_default_size_follows_the_photo(
    photo: tuple[int, int], size: tuple[int, int], canvas: tuple[int, int]
) -> None:
    plan = plan_video(photo, NANO, 33)
    assert (plan.width, plan.height) == size
    assert (plan.canvas_width, plan.canvas_height) == canvas


def test_the_papers_job_has_the_papers_canvas() -> None:
    plan = plan_video((1280, 720), PAPER, 121)
    assert (plan.width, plan.height, plan.canvas_width, plan.canvas_height) == (1280, 720, 1280, 768)
    assert (plan.left, plan.top) == (0, 24)
    assert plan.crop == (0, 0, 1280, 720)
    assert plan.notes == ()


@pytest.mark.parametrize("area", [NANO, PAPER])
def test_every_aspect_ratio_keeps_the_whole_picture_near_the_area(area: int) -> None:
    for aspect in np.geomspace(0.25, 4, 61):
        photo = (round(1000 * aspect**0.5), round(1000 / aspect**0.5))
        width, height = default_size(photo, area)
        assert width % 2 == height % 2 == 0
        assert 0.4 * area < width * height < 2 * area
        # Rounding a side to even moves the ratio by at most one pixel in the shorter one.
        assert abs(width / height / (photo[0] / photo[1]) - 1) < 1.5 / min(width, height)
        plan = plan_video(photo, area, 33)
        assert plan.canvas_width % 128 == plan.canvas_height % 128 == 0
        assert plan.width * plan.height > 0.55 * plan.canvas_width * plan.canvas_height
        assert not any("cropped around" in note for note in plan.notes)


def test_an_extreme_photo_is_cropped_to_four_to_one_and_that_is_said() -> None:
    plan = plan_video((20_000, 10), NANO, 33)
    assert plan.crop == (9980, 0, 10_020, 10)
    assert any("20000x10" in note and "4:1" in note for note in plan.notes)
    assert any("enlarged" in note for note in plan.notes)


def test_an_explicit_size_is_made_on_a_canvas_and_said() -> None:
    plan = plan_video((400, 300), NANO, 33, size=(100, 100))
    assert (plan.width, plan.height, plan.canvas_width, plan.canvas_height) == (100, 100, 128, 128)
    assert (plan.left, plan.top) == (14, 14)
    assert plan.crop == (50, 0, 350, 300)
    assert any("canvas of 128x128" in note for note in plan.notes)
    assert any("cropped around" in note and "75.0%" in note for note in plan.notes)


def test_an_odd_size_is_rounded_down_and_said() -> None:
    plan = plan_video((257, 129), NANO, 33, size=(257, 129))
    assert (plan.width, plan.height) == (256, 128)
    assert any("257x129" in note and "256x128" in note for note in plan.notes)


def test_a_request_that_fits_is_not_commented_on() -> None:
    assert plan_video((512, 512), NANO, 33, size=(256, 256)).notes == ()


@pytest.mark.parametrize("size", [(0, 100), (100, 15), (1, 1), (4098, 100), (10**9, 10**9)])
def test_sizes_out_of_range_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=f"size {size[0]}x{size[1]} given"):
        plan_video((100, 100), NANO, 33, size=size)


@pytest.mark.parametrize(("text", "size"), [("256x128", (256, 128)), (" 64 X 64 ", (64, 64)), ("9×7", (9, 7))])
def test_sizes_are_read(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "256", "256x", "x256", "-1x5", "1.5x2", "256x256x3", "axb"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="WIDTHxHEIGHT"):
        parse_size(text)


@pytest.mark.parametrize("group", [4, 1, 8])
def test_frames_snap_to_the_nearest_and_of_two_to_the_lower(group: int) -> None:
    allowed = [1 + group * k for k in range(201)]
    for frames in range(1, 200):
        assert snap_frames(frames, group) == min(allowed, key=lambda n: (abs(n - frames), n))


def test_eighteen_frames_become_seventeen_and_that_is_said() -> None:
    plan = plan_video((256, 256), NANO, 18)
    assert plan.frames == 17
    assert any("18 frames" in note and "17" in note for note in plan.notes)


@pytest.mark.parametrize("frames", [0, -3])
def test_no_frames_are_refused(frames: int) -> None:
    with pytest.raises(UserError, match=f"{frames} frames given"):
        snap_frames(frames)


def test_cover_is_the_largest_centred_box() -> None:
    left, top, right, bottom = cover((300, 200), (128, 128))
    assert (left, top, right, bottom) == (50, 0, 250, 200)
    assert cover((100, 400), (200, 100)) == (0, 175, 100, 225)


@pytest.mark.parametrize(("length", "before", "after"), [(4, 5, 3), (5, 2, 2), (2, 7, 8), (1, 3, 4), (9, 0, 0)])
def test_reflection_equals_numpys(length: int, before: int, after: int) -> None:
    expected = np.pad(np.arange(length), (before, after), mode="reflect" if length > 1 else "edge")
    np.testing.assert_array_equal(reflected(length, before, before + length + after), expected)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (20_000, 10), (10, 20_000), (333, 77)])
def test_any_photo_gets_a_canvas_with_the_video_in_it(size: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    photo = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    for asked in (None, (100, 34)):
        plan = plan_video(size, 128 * 128, 5, size=asked)
        canvas = make_canvas(photo, plan)
        assert canvas.shape == (plan.canvas_height, plan.canvas_width, 3)
        assert crop_video(canvas[None], plan).shape == (1, plan.height, plan.width, 3)


def test_a_photo_of_the_videos_size_is_kept_to_the_pixel(photo: np.ndarray) -> None:
    plan = plan_video((160, 120), NANO, 5, size=(160, 120))
    canvas = make_canvas(photo, plan)
    np.testing.assert_array_equal(crop_video(canvas[None], plan)[0], photo)
    padding = ((4, 4), (48, 48), (0, 0))
    np.testing.assert_array_equal(canvas, np.pad(photo, padding, mode="reflect"))


def test_the_plan_needs_no_torch() -> None:
    code = (
        "import sys, fsvideo_pipeline.plan, fsvideo_pipeline.canvas, fsvideo_pipeline.settings;"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
