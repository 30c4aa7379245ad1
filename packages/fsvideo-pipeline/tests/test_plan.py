"""Sizes and frame counts: every request becomes a canvas that the models can work on, or a sentence."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fsae.errors import UserError
from fsae.shapes import Compression
from fsvideo_pipeline.canvas import crop_video, make_canvas, reflected
from fsvideo_pipeline.plan import PhotoFit, Size, VideoPlan, default_size, parse_size, plan_video, snap_frames

NANO = 256 * 256
PAPER = 720 * 1280
COMPRESSION = Compression(64, 4)


def plan_of(
    photo: tuple[int, int], area: int = NANO, frames: int = 33, size: tuple[int, int] | None = None
) -> VideoPlan:
    """At the paper's compression."""
    return plan_video(Size(*photo), area, frames, COMPRESSION, None if size is None else Size(*size))


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
    geometry = plan_of(photo).geometry
    assert geometry.size == size
    assert geometry.canvas == canvas


def test_the_papers_job_has_the_papers_canvas() -> None:
    plan = plan_of((1280, 720), PAPER, 121)
    geometry = plan.geometry
    assert (geometry.size, geometry.canvas, geometry.frames) == ((1280, 720), (1280, 768), 121)
    assert (geometry.left, geometry.top) == (0, 24)
    assert geometry.latents == (31, 12, 20)
    assert plan.fit == PhotoFit(Size(1280, 720), (0, 0, 1280, 720), 1.0)
    assert plan.notes == ()


def test_another_compression_has_other_canvases_and_frames() -> None:
    plan = plan_video(Size(100, 100), NANO, 18, Compression(16, 8), Size(100, 70))
    assert plan.geometry.canvas == (128, 96)
    assert plan.geometry.frames == 17
    assert plan.geometry.latents == (3, 6, 8)
    assert any("1 + 8k" in note for note in plan.notes)
    assert any("128x96" in note and "multiples of 32" in note for note in plan.notes)


@pytest.mark.parametrize("area", [NANO, PAPER])
def test_every_aspect_ratio_keeps_the_whole_picture_near_the_area(area: int) -> None:
    for aspect in np.geomspace(0.25, 4, 61):
        photo = (round(1000 * aspect**0.5), round(1000 / aspect**0.5))
        width, height = default_size(Size(*photo), area, 128)
        assert width % 2 == height % 2 == 0
        assert 0.4 * area < width * height < 2 * area
        # Rounding a side to even moves the ratio by at most one pixel in the shorter one.
        assert abs(width / height / (photo[0] / photo[1]) - 1) < 1.5 / min(width, height)
        plan = plan_of(photo, area)
        geometry = plan.geometry
        assert geometry.canvas.width % 128 == geometry.canvas.height % 128 == 0
        assert math.prod(geometry.size) > 0.55 * math.prod(geometry.canvas)
        assert not any("cropped around" in note for note in plan.notes)


def test_an_extreme_photo_is_cropped_to_four_to_one_and_that_is_said() -> None:
    plan = plan_of((20_000, 10))
    assert plan.fit.crop == (9980, 0, 10_020, 10)
    assert any("20000x10" in note and "4:1" in note for note in plan.notes)
    assert any("enlarged" in note for note in plan.notes)


def test_an_explicit_size_is_made_on_a_canvas_and_said() -> None:
    plan = plan_of((400, 300), size=(100, 100))
    geometry = plan.geometry
    assert (geometry.size, geometry.canvas) == ((100, 100), (128, 128))
    assert (geometry.left, geometry.top) == (14, 14)
    assert plan.fit.crop == (50, 0, 350, 300)
    assert plan.fit.scale == pytest.approx(1 / 3)
    assert plan.fit.kept == 0.75
    assert any("canvas of 128x128" in note for note in plan.notes)
    assert any("cropped around" in note and "75.0%" in note for note in plan.notes)


def test_an_odd_size_is_rounded_down_and_said() -> None:
    plan = plan_of((257, 129), size=(257, 129))
    assert plan.geometry.size == (256, 128)
    assert any("257x129" in note and "256x128" in note for note in plan.notes)


def test_a_request_that_fits_is_not_commented_on() -> None:
    assert plan_of((512, 512), size=(256, 256)).notes == ()


@pytest.mark.parametrize("size", [(0, 100), (100, 15), (1, 1), (4098, 100), (10**9, 10**9)])
def test_sizes_out_of_range_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=f"size {size[0]}x{size[1]} given"):
        plan_of((100, 100), size=size)


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
    plan = plan_of((256, 256), frames=18)
    assert plan.geometry.frames == 17
    assert any("18 frames" in note and "17" in note for note in plan.notes)


@pytest.mark.parametrize("frames", [0, -3])
def test_no_frames_are_refused(frames: int) -> None:
    with pytest.raises(UserError, match=f"{frames} frames given"):
        snap_frames(frames, 4)


def test_cover_is_the_largest_centred_box() -> None:
    assert PhotoFit.cover(Size(300, 200), Size(128, 128)).crop == (50, 0, 250, 200)
    fit = PhotoFit.cover(Size(100, 400), Size(200, 100))
    assert (fit.crop, fit.scale, fit.kept) == ((0, 175, 100, 225), 2, 1 / 8)


@pytest.mark.parametrize(("length", "before", "after"), [(4, 5, 3), (5, 2, 2), (2, 7, 8), (1, 3, 4), (9, 0, 0)])
def test_reflection_equals_numpys(length: int, before: int, after: int) -> None:
    expected = np.pad(np.arange(length), (before, after), mode="reflect" if length > 1 else "edge")
    np.testing.assert_array_equal(reflected(length, before, before + length + after), expected)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (20_000, 10), (10, 20_000), (333, 77)])
def test_any_photo_gets_a_canvas_with_the_video_in_it(size: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    photo = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    for asked in (None, (100, 34)):
        plan = plan_of(size, 128 * 128, 5, asked)
        canvas = make_canvas(photo, plan)
        assert canvas.shape == (*plan.geometry.canvas[::-1], 3)
        assert crop_video(canvas[None], plan.geometry).shape == (1, *plan.geometry.size[::-1], 3)


def test_a_photo_of_the_videos_size_is_kept_to_the_pixel(photo: np.ndarray) -> None:
    plan = plan_of((160, 120), frames=5, size=(160, 120))
    canvas = make_canvas(photo, plan)
    np.testing.assert_array_equal(crop_video(canvas[None], plan.geometry)[0], photo)
    padding = ((4, 4), (48, 48), (0, 0))
    np.testing.assert_array_equal(canvas, np.pad(photo, padding, mode="reflect"))
