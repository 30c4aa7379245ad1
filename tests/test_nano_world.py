"""The nano world: its clips, its captions, its list of photographs, and the measure of camera motion."""

from __future__ import annotations

import io
import json
import math
import struct
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "nano"))

import captions
import measure_motion
import photographs
from clips import NanoClips, load_photographs
from motion import MOTIONS, MOVING, PANS, Motion, camera_path, draw_motion, draw_travel
from textures import dead_leaves, noise, texture

SIZE = (64, 64)


def pictures(count: int = 4, size: tuple[int, int] = (160, 200)) -> list[torch.Tensor]:
    """Stand-ins for photographs: dead leaves, uint8 (3, H, W)."""
    made = (dead_leaves(size, torch.Generator().manual_seed(i)) for i in range(count))
    return [(255 * picture).round().to(torch.uint8) for picture in made]


def world(**options: object) -> NanoClips:
    defaults: dict[str, object] = {"frames": 9, "size": SIZE, "photographs": pictures()}
    return NanoClips(**{**defaults, **options})  # type: ignore[arg-type]


# --- clips ----------------------------------------------------------------------------------------


def test_an_item_is_a_function_of_seed_and_index() -> None:
    first, second, other = world(seed=3), world(seed=3), world(seed=4)
    for index in (5, 0, 17):
        a = first[index]
        b = second[index]
        assert torch.equal(a["video"], b["video"])
        assert (a["caption"], a["motion"]) == (b["caption"], b["motion"])
        assert not torch.equal(a["video"], other[index]["video"])
    assert not torch.equal(first[0]["video"], first[1]["video"])


def test_shapes_ranges_and_kinds() -> None:
    clips = world(size=(48, 80))
    for index in range(12):
        item = clips[index]
        assert item["video"].shape == (3, 9, 48, 80)
        assert item["video"].dtype == torch.float32
        assert -1 <= float(item["video"].min()) <= float(item["video"].max()) <= 1
        assert item["motion"] in MOTIONS


def test_one_frame_is_a_still_image() -> None:
    item = world(frames=1)[2]
    assert item["video"].shape == (3, 1, *SIZE)
    assert item["motion"] == "still"


def test_a_batch_is_its_items() -> None:
    clips = world()
    batch = clips.sample_batch([4, 1])
    assert torch.equal(batch["video"], torch.stack([clips[4]["video"], clips[1]["video"]]))
    assert batch["caption"] == [clips[4]["caption"], clips[1]["caption"]]
    assert batch["motion"] == [clips[4]["motion"], clips[1]["motion"]]


def test_a_loader_with_workers_gives_the_same_items() -> None:
    clips = world(length=6)
    loader = torch.utils.data.DataLoader(clips, batch_size=2, num_workers=1)
    videos = torch.cat([batch["video"] for batch in loader])
    assert torch.equal(videos, clips.sample_batch(range(6))["video"])
    with pytest.raises(IndexError):
        clips[6]


def test_shares_of_textures_sprites_and_stills() -> None:
    clips = world(texture_probability=0.2, sprite_probability=0.15)
    plans = [clips.plan(i) for i in range(1500)]
    assert abs(np.mean([p.photograph < 0 for p in plans]) - 0.2) < 0.04
    assert abs(np.mean([p.sprite is not None for p in plans]) - 0.15) < 0.04
    kinds = Counter(p.motion.kind for p in plans)
    assert all(abs(kinds[kind] / 1500 - 1 / 8) < 0.04 for kind in MOTIONS)
    clips = world(texture_probability=0, sprite_probability=0, still_fraction=0)
    never = [clips.plan(i) for i in range(300)]
    assert all(p.photograph >= 0 and p.sprite is None and p.motion.kind != "still" for p in never)


def test_a_world_without_pictures_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no photographs"):
        NanoClips(photographs=[])
    assert len(NanoClips(photographs=[], texture_probability=1, length=3)) == 3
    with pytest.raises(FileNotFoundError, match=r"photographs\.py"):
        load_photographs("train", tmp_path / "none.zip")
    with pytest.raises(ValueError, match="held-out"):
        load_photographs("test", tmp_path / "none.zip")


# --- where the camera looks -----------------------------------------------------------------------


def affine_of(video: torch.Tensor) -> torch.Tensor:
    """(T, 2, 3): where the pixels of each frame of a clip of the ramp picture look, in its pixels."""
    _, frames, height, width = video.shape
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) + 0.5 - height / 2,
        torch.arange(width, dtype=torch.float64) + 0.5 - width / 2,
        indexing="ij",
    )
    design = torch.stack([x, y, torch.ones_like(x)], -1).view(-1, 3)
    at = ((video[:2].double() + 1) / 2 * 255).view(2, frames, -1)  # the ramp's value is its pixel's index
    return torch.linalg.lstsq(design.expand(frames, -1, -1), at.permute(1, 2, 0)).solution.transpose(1, 2)


@pytest.mark.parametrize("kind", MOTIONS)
@pytest.mark.parametrize("direction", [1, -1])
def test_each_frame_looks_where_the_path_says(kind: str, direction: int) -> None:
    """A picture whose colours are coordinates tells where each pixel came from; frame 0 has not moved."""
    ramp = torch.arange(256, dtype=torch.uint8)
    x, y = ramp.expand(256, 256), ramp[:, None].expand(256, 256)
    picture = torch.stack([x, y, torch.zeros_like(x)])
    clips = world(photographs=[picture], texture_probability=0, sprite_probability=0)
    plan = clips.plan(1, kind)
    plan = replace(plan, flip=False, colour=(0.0,) * 5, motion=replace(plan.motion, direction=direction))
    looked = affine_of(clips.render(plan))
    ratio = looked[0, 0, 0]
    assert 0.3 < ratio < 4
    assert torch.allclose(looked[0, :, :2], ratio * torch.eye(2, dtype=torch.float64), atol=0.02)
    path = camera_path(plan.motion, 9, SIZE).double()
    assert torch.allclose(looked[:, :, :2] / ratio, path[:, :, :2], atol=0.02)
    assert torch.allclose((looked[:, :, 2] - looked[0, :, 2]) / ratio, path[:, :, 2], atol=0.4)


def test_directions_of_the_path() -> None:
    """Turning left looks left; zooming in looks at less; a clockwise roll brings the right side down."""
    last = {kind: camera_path(Motion(kind, 0.2), 5, (100, 200))[-1] for kind in PANS}
    assert last["pan left"][:, 2].tolist() == pytest.approx([-40, 0])
    assert last["pan right"][:, 2].tolist() == pytest.approx([40, 0])
    assert last["pan up"][:, 2].tolist() == pytest.approx([0, -20])
    assert last["pan down"][:, 2].tolist() == pytest.approx([0, 20])
    assert float(camera_path(Motion("zoom in", 1.25), 5, SIZE)[-1, 0, 0]) == pytest.approx(0.8)
    assert float(camera_path(Motion("zoom out", 1.25), 5, SIZE)[-1, 0, 0]) == pytest.approx(1.25)
    clockwise = camera_path(Motion("roll", 90.0, 1), 5, SIZE)[-1]
    assert (clockwise @ torch.tensor([1.0, 0.0, 1.0])).tolist() == pytest.approx([0, 1], abs=1e-6)


@pytest.mark.parametrize("frames", [1, 5, 17, 33])
def test_a_path_starts_unmoved_and_ends_at_its_travel_whatever_its_length(frames: int) -> None:
    rng = np.random.default_rng(0)
    identity = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    for _ in range(20):
        motion = draw_motion(rng, 0.0)
        path = camera_path(motion, frames, SIZE)
        assert torch.equal(path[0], identity)
        if frames > 1:
            assert torch.allclose(path[-1], camera_path(motion, 2, SIZE)[-1], atol=1e-5)
            steps = (path[1:] - path[:-1]).flatten(1).norm(dim=1)
            assert float(steps.min()) > 0
            assert float(steps.max() / steps.min()) < 4.5  # smooth: no jumps, no stops


# --- textures -------------------------------------------------------------------------------------


def test_textures_are_pictures_with_a_natural_spectrum() -> None:
    for make in (noise, dead_leaves, texture):
        one, again = (make((96, 64), torch.Generator().manual_seed(7)) for _ in range(2))
        assert torch.equal(one, again)
        assert one.shape == (3, 96, 64)
        assert 0 <= float(one.min()) <= float(one.max()) <= 1
        assert float(one.std()) > 0.02
        coarse = F.avg_pool2d(one, 8)
        order = torch.randperm(one.numel(), generator=torch.Generator().manual_seed(0))
        white = one.flatten()[order].view_as(one)
        assert float(coarse.std()) > 2 * float(F.avg_pool2d(white, 8).std())  # white noise would vanish


# --- captions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", MOTIONS)
def test_captions_say_the_motion(kind: str, held_out: bool) -> None:
    rng = np.random.default_rng(0)
    said = [
        captions.caption(rng, kind, direction, held_out=held_out, sprite=sprite)
        for direction in (1, -1)
        for sprite in (None, "a purple square moves right")
        for _ in range(100)
    ]
    assert all(0 < len(text) <= captions.LONGEST and "{" not in text for text in said)
    assert len(set(said)) > 100
    side = kind.split()[-1]
    if kind in PANS and not held_out:
        words = {side, "rises", "lifts", "sinks", "lowers"}
        assert all(any(word in text.lower() for word in words) for text in said)
    if kind == "still":
        moving = [text.lower() for text in said if "square" in text.lower()]
        assert moving and all("nothing moves" not in text for text in moving)


def test_a_wording_belongs_to_one_motion_and_to_one_split() -> None:
    owners: dict[str, str] = {}
    for kind in MOTIONS:
        assert len(captions.templates(kind)) >= 15
        assert not set(captions.templates(kind)) & set(captions.templates(kind, held_out=True))
        for held_out in (False, True):
            for template in captions.templates(kind, held_out):
                for direction in (1, -1):
                    text = captions.fill(template, kind, direction)
                    assert owners.setdefault(text, kind) == kind


def test_a_roll_names_the_way_the_camera_turns() -> None:
    assert captions.fill("the camera rolls {turn}", "roll", 1) == "the camera rolls clockwise"
    assert captions.fill("the picture turns {turned}", "roll", 1) == "the picture turns counterclockwise"


def test_a_clip_is_captioned_with_its_own_motion_and_sprite() -> None:
    clips = world(sprite_probability=1.0)
    for index in range(30):
        plan = clips.plan(index)
        assert plan.sprite is not None
        assert plan.sprite.clause in plan.caption.lower()
        if plan.motion.kind == "zoom out":
            assert not any(w in plan.caption.lower() for w in ("zoom in", "closer", "approach"))


# --- the list of photographs and the bank ---------------------------------------------------------


def test_held_out_photographs_are_none_of_the_training_ones() -> None:
    listed = photographs.read_manifest()
    held_out = {(p.package, p.file) for p in listed if p.split == "held-out"}
    train = {(p.package, p.file) for p in listed if p.split == "train"}
    assert len(held_out) >= 24
    assert len(train) >= 100
    assert not held_out & train
    assert len({p.name for p in listed}) == len({(p.package, p.file) for p in listed}) == len(listed)
    assert {p.split for p in listed} <= set(photographs.SPLITS)
    shown = "usr/share/backgrounds/seeding_by_Clements_Engelhardt.jpg"  # docs/photo.jpg
    assert ("lomiri-wallpapers-16.04", shown) in held_out


def test_every_photograph_may_be_used_and_names_its_author() -> None:
    free = ("CC0", "CC-BY-", "public-domain", "GPL-", "LGPLv3")
    for photograph in photographs.read_manifest():
        assert photograph.licence.startswith(free), photograph
        assert not any(word in photograph.licence for word in ("NC", "ND")), photograph
        assert photograph.author and not Path(photograph.file).is_absolute()


def test_stated_licence_reads_a_debian_copyright_file() -> None:
    text = (
        "Format: 1.0\n\nFiles: *\nCopyright: 2014 A\nLicense: GPL-2+\n\n"
        "Files: 16.04/hill_by_B.jpg\n nature/Sea.jpg\nCopyright: B\nLicense: CC-BY-4.0\n\n"
        "Files: src/images/*\nCopyright: C\nLicense: CC0-1.0\n the text of it\n\nLicense: GPL-2+\n words\n"
    )
    stated = photographs.stated_licence
    assert stated(text, "usr/share/backgrounds/hill_by_B.jpg") == "CC-BY-4.0"
    assert stated(text, "usr/share/backgrounds/mate/nature/Sea.jpg") == "CC-BY-4.0"
    assert stated(text, "app/src/images/deep/a.webp") == "CC0-1.0"
    assert stated(text, "usr/share/other.jpg") == "GPL-2+"
    assert stated("Format: 1.0\n", "a.jpg") is None


def test_qt_resources_lists_plain_and_compressed_files() -> None:
    import zlib

    def name(text: str) -> bytes:
        return struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")

    names = name("pic") + name("a.jpg") + name("b.jpg")
    at = [0, len(name("pic")), len(name("pic")) + len(name("a.jpg"))]
    packed = struct.pack(">I", 5) + zlib.compress(b"hello")
    contents = struct.pack(">I", 2) + b"hi" + struct.pack(">I", len(packed)) + packed
    tree = struct.pack(">IHII", 0, 2, 1, 1)  # the root, a directory of one
    tree += struct.pack(">IHII", at[0], 2, 2, 2)
    tree += struct.pack(">IHHHI", at[1], 0, 0, 0, 0) + struct.pack(">IHHHI", at[2], 1, 0, 0, 6)
    header = 20
    data = b"qres" + struct.pack(">4I", 1, header, header + len(tree), header + len(tree) + len(contents))
    found = dict(photographs.qt_resources(data + tree + contents + names))
    assert found == {"pic/a.jpg": b"hi", "pic/b.jpg": b"hello"}
    with pytest.raises(ValueError, match="Qt"):
        list(photographs.qt_resources(b"other"))


def test_a_bank_is_read_by_split(tmp_path: Path) -> None:
    bank = tmp_path / "photographs.zip"
    with zipfile.ZipFile(bank, "w") as archive:
        for name, colour in (("one", "red"), ("two", "blue")):
            archive.writestr(f"{name}.jpg", photographs.small_jpeg(Image.new("RGB", (900, 600), colour)))
        splits = [{"name": "one", "split": "train"}, {"name": "two", "split": "held-out"}]
        archive.writestr("manifest.json", json.dumps(splits))
    (train,) = load_photographs("train", bank)
    (held_out,) = load_photographs("held-out", bank)
    assert train.shape == (3, photographs.SHORT_SIDE, 576)
    assert train.float().mean((1, 2)).argmax() == 0
    assert held_out.float().mean((1, 2)).argmax() == 2


def test_small_pictures_are_not_grown_and_panoramas_are_bounded() -> None:
    assert Image.open(io.BytesIO(photographs.small_jpeg(Image.new("RGB", (120, 90))))).size == (120, 90)
    wide = Image.open(io.BytesIO(photographs.small_jpeg(Image.new("RGB", (4000, 800))))).size
    assert wide[0] <= photographs.LONG_SIDE


# --- measuring ------------------------------------------------------------------------------------


def blurred(video: torch.Tensor, sigma: float) -> torch.Tensor:
    reach = math.ceil(3 * sigma)
    taps = torch.exp(-((torch.arange(-reach, reach + 1) / sigma) ** 2) / 2)
    taps = taps / taps.sum()
    frames = video.transpose(0, 1).reshape(-1, 1, *video.shape[2:])
    frames = F.conv2d(F.pad(frames, (reach, reach, 0, 0), mode="replicate"), taps.view(1, 1, 1, -1))
    frames = F.conv2d(F.pad(frames, (0, 0, reach, reach), mode="replicate"), taps.view(1, 1, -1, 1))
    return frames.view(-1, 3, *video.shape[2:]).transpose(0, 1)


def test_the_measure_names_the_motion_and_shuffled_prompts_do_not() -> None:
    clips = world(texture_probability=0.5, sprite_probability=0, still_fraction=0.125)
    pairs = []
    for index in range(40):
        item = clips[index]
        pairs.append((item["motion"], measure_motion.measure_motion(item["video"]).kind))
    assert measure_motion.agreement(pairs) >= 0.95
    assert measure_motion.shuffled_agreement(pairs) < 0.3


def test_the_measure_bears_blur_and_noise() -> None:
    clips = world(texture_probability=0, sprite_probability=0)
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for kind in MOTIONS:
        video = blurred(clips.render(clips.plan(3, kind)), 2.0)
        video = video + 0.08 * torch.randn(video.shape, generator=generator)
        pairs.append((kind, measure_motion.measure_motion(video).kind))
    assert measure_motion.agreement(pairs) == 1.0, pairs


@pytest.mark.parametrize("kind", MOVING)
def test_the_measure_recovers_the_travel(kind: str) -> None:
    clips = world(texture_probability=0, sprite_probability=0)
    plan = clips.plan(11, kind)
    found = measure_motion.measure_motion(clips.render(plan))
    travel = plan.motion.travel
    expected = {"pan_x": 0.0, "pan_y": 0.0, "zoom": 1.0, "roll": 0.0}
    if kind in PANS:
        expected["pan_x"], expected["pan_y"] = (travel * side for side in PANS[kind])
    elif kind == "roll":
        expected["roll"] = travel * plan.motion.direction
    else:
        expected["zoom"] = travel if kind == "zoom in" else 1 / travel
    assert found.pan_x == pytest.approx(expected["pan_x"], abs=0.01)
    assert found.pan_y == pytest.approx(expected["pan_y"], abs=0.01)
    assert found.zoom == pytest.approx(expected["zoom"], abs=0.02)
    assert found.roll == pytest.approx(expected["roll"], abs=0.6)


def test_a_sprite_is_not_taken_for_the_camera() -> None:
    clips = world(texture_probability=0, sprite_probability=1)
    plans = [replace(clips.plan(i), motion=Motion("still")) for i in range(6)]
    videos = [clips.render(plan) for plan in plans]
    assert all(float((video[:, 0] - video[:, -1]).abs().max()) > 0.1 for video in videos)
    assert [measure_motion.measure_motion(video).kind for video in videos] == ["still"] * 6


def test_the_measure_takes_frames_as_they_are_stored() -> None:
    clips = world(texture_probability=0, sprite_probability=0)
    video = clips.render(clips.plan(0, "zoom in"))
    stored = ((video.permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8)
    expected = measure_motion.measure_motion(video)
    for form in (stored, stored.numpy(), stored.float() / 255):
        found = measure_motion.measure_motion(form)
        assert found.kind == "zoom in"
        assert found.zoom == pytest.approx(expected.zoom, abs=0.01)
    assert measure_motion.measure_motion(stored[:1]).kind == "still"
    assert measure_motion.measure_motion(torch.zeros(5, 32, 32, 3)).kind == "still"
    with pytest.raises(ValueError, match="T H W 3"):
        measure_motion.measure_motion(torch.zeros(5, 32, 32))


def test_agreement_counts_equal_names() -> None:
    assert measure_motion.agreement([("still", "still"), ("roll", "zoom in")]) == 0.5
    with pytest.raises(ValueError, match="no pairs"):
        measure_motion.agreement([])


def test_travel_is_drawn_in_its_range() -> None:
    rng = np.random.default_rng(1)
    for kind, (low, high) in {"pan up": (0.1, 0.25), "zoom in": (1.15, 1.4), "roll": (8, 20)}.items():
        travels = [draw_travel(rng, kind).travel for _ in range(200)]
        assert low <= min(travels) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < max(travels) <= high
    with pytest.raises(ValueError, match="pan left"):
        Motion("sideways")
