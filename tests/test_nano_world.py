"""The nano world: its clips, its captions, its list of photographs, and the measure of camera motion."""

from __future__ import annotations

import io
import json
import math
import re
import struct
import sys
import unicodedata
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
from captions import LANGUAGE_SHARES, LONGEST, SYNONYMS, caption, said_of, sentences, sprite_clause
from clips import SPRITE_COLOURS, SPRITE_SHAPES, SPRITE_WAYS, NanoClips, Sprite, load_photographs
from motion import (
    COMBINATIONS,
    MOTIONS,
    MOVING,
    PANS,
    SPEEDS,
    TRAVELS,
    Combined,
    Motion,
    camera_path,
    draw_motion,
    draw_travel,
    motion_from_dict,
    usual_motion,
)
from textures import TEXTURE_SIDE, dead_leaves, kept_texture, noise, texture
from wordings import LANGUAGES

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
        assert item["motion"] in (*MOTIONS, *COMBINATIONS)


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


def test_shares_of_textures_sprites_stills_and_combinations() -> None:
    clips = world(texture_probability=0.2, sprite_probability=0.15)
    plans = [clips.plan(i) for i in range(1500)]
    assert abs(np.mean([p.photograph < 0 for p in plans]) - 0.2) < 0.04
    assert abs(np.mean([p.sprite is not None for p in plans]) - 0.15) < 0.04
    kinds = Counter(p.motion.kind for p in plans)
    assert abs(kinds["still"] / 1500 - 1 / 8) < 0.04
    assert abs(sum(kinds[kind] for kind in COMBINATIONS) / 1500 - 0.15) < 0.04
    assert all(abs(kinds[kind] / 1500 - (1 - 1 / 8 - 0.15) / 7) < 0.04 for kind in MOVING)
    speeds = Counter(p.motion.speed for p in plans if p.motion.kind != "still")
    assert all(
        abs(speeds[s] / speeds.total() - share) < 0.04 for s, share in zip(SPEEDS, (0.25, 0.5, 0.25), strict=True)
    )
    clips = world(texture_probability=0, sprite_probability=0, still_fraction=0, combined_fraction=0)
    never = [clips.plan(i) for i in range(300)]
    assert all(p.photograph >= 0 and p.sprite is None and p.motion.kind in MOVING for p in never)


def test_textures_are_kept_and_apart_from_the_held_out_ones() -> None:
    def drawn(split: str) -> set[int]:
        clips = world(split=split, texture_probability=1)
        return {clips.plan(i).texture for i in range(500)}

    assert len(drawn("train")) > 60
    assert not drawn("train") & drawn("held-out")
    one = kept_texture(5)
    assert one is kept_texture(5)
    assert one.dtype == torch.uint8 and one.shape == (3, TEXTURE_SIDE, TEXTURE_SIDE)


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


def looks_where_the_path_says(kind: str, direction: int, size: tuple[int, int], frames: int = 9) -> None:
    """A picture whose colours are coordinates tells where each pixel came from; frame 0 has not moved."""
    ramp = torch.arange(256, dtype=torch.uint8)
    x, y = ramp.expand(256, 256), ramp[:, None].expand(256, 256)
    picture = torch.stack([x, y, torch.zeros_like(x)])
    clips = world(photographs=[picture], texture_probability=0, sprite_probability=0, size=size, frames=frames)
    plan = clips.plan(1, kind)
    motion = turned(plan.motion, direction)
    looked = affine_of(clips.render(replace(plan, flip=False, colour=(0.0,) * 5, motion=motion)))
    ratio = looked[0, 0, 0]
    assert 0.2 < ratio < 4
    assert torch.allclose(looked[0, :, :2], ratio * torch.eye(2, dtype=torch.float64), atol=0.02)
    path = camera_path(motion, frames, size).double()
    assert torch.allclose(looked[:, :, :2] / ratio, path[:, :, :2], atol=0.02)
    assert torch.allclose((looked[:, :, 2] - looked[0, :, 2]) / ratio, path[:, :, 2], atol=0.006 * max(size))


def turned(motion: Motion | Combined, direction: int) -> Motion | Combined:
    """The motion, its roll in the given direction."""
    if isinstance(motion, Motion):
        return replace(motion, direction=direction)
    first, second = (replace(part, direction=direction) for part in motion.parts)
    return Combined((first, second))


@pytest.mark.parametrize("kind", (*MOTIONS, *COMBINATIONS))
@pytest.mark.parametrize("direction", [1, -1])
def test_each_frame_looks_where_the_path_says(kind: str, direction: int) -> None:
    looks_where_the_path_says(kind, direction, SIZE)


@pytest.mark.parametrize("size", [(128, 192), (192, 128), (384, 640), (320, 576)])
@pytest.mark.parametrize("kind", ["pan left", "pan down", "zoom out", "roll", "pan right + roll"])
def test_clips_of_other_sizes_look_where_the_path_says(kind: str, size: tuple[int, int]) -> None:
    looks_where_the_path_says(kind, 1, size, frames=3)


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_two_motions_at_once_are_their_composition(kind: str) -> None:
    """Each frame's map is the product of the maps of the parts alone, a pan's on the left."""
    motion = draw_travel(np.random.default_rng(3), kind)
    assert isinstance(motion, Combined)
    assert (motion.kind, len(motion.parts)) == (kind, 2)
    assert motion.speed == motion.parts[0].speed == motion.parts[1].speed
    below = torch.tensor([[[0.0, 0.0, 1.0]]]).expand(7, 1, 3)
    first, second = (torch.cat([camera_path(part, 7, (48, 80)), below], dim=1) for part in motion.parts)
    torch.testing.assert_close(camera_path(motion, 7, (48, 80)), (first @ second)[:, :2])


def test_what_cannot_be_combined_is_refused() -> None:
    left, right, up = (Motion(kind, 0.2) for kind in ("pan left", "pan right", "pan up"))
    assert Combined((left, up)).kind == "pan left + pan up"
    for parts in ((left, right), (up, left), (left, Motion("still"))):
        with pytest.raises(ValueError, match=r"one of pan left \+ pan up"):
            Combined(parts)
    assert len(COMBINATIONS) == 18
    assert Combined((left, Motion("zoom in", 1.6))).speed == "usual"


@pytest.mark.parametrize("kind", (*MOTIONS, *COMBINATIONS))
def test_a_motion_survives_json(kind: str) -> None:
    motion = draw_travel(np.random.default_rng(1), kind)
    assert motion_from_dict(json.loads(json.dumps(motion.as_dict()))) == motion


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


def plain(text: str) -> str:
    """Without case, accents and the order of a word's letters: what the slips of a typist leave as it is."""
    text = "".join(c for c in unicodedata.normalize("NFD", text.casefold()) if not unicodedata.combining(c))
    return re.sub(r"[a-z]+", lambda word: "".join(sorted(word[0])), text)


SOME = (*MOTIONS, "pan left + pan up", "pan right + zoom in", "pan down + roll", "zoom out + roll")


def every(kinds: tuple[str, ...]) -> list[Motion | Combined]:
    """One motion of each of the kinds, at each speed and in each direction of a roll."""
    rng = np.random.default_rng(0)
    drawn = [turned(draw_travel(rng, kind, s), d) for kind in kinds for s in SPEEDS for d in (1, -1)]
    return [m for m in drawn if m.direction > 0 or "roll" in m.kind]


SIDE_WORDS = {
    "pan left": ("left", "leftward"),
    "pan right": ("right", "rightward"),
    "pan up": ("up", "upward", "rises", "rising", "raise", "lifts", "ascends"),
    "pan down": ("down", "downward", "sinks", "sinking", "lower", "lowers", "descends"),
}


def all_said(motion: Motion | Combined, language: str, held_out: bool = False) -> set[str]:
    """Every sentence of a motion."""
    said = said_of(motion)
    orders = [said] if len(said) == 1 else [said, (said[0], said[2], said[1])]
    return {
        sentence
        for order in orders
        for wordings in captions.templates(order, language, held_out)
        for wording in wordings
        for sentence in sentences(wording, order, language)
    }


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("kind", MOTIONS)
def test_captions_say_the_motion(kind: str, held_out: bool) -> None:
    rng = np.random.default_rng(0)
    said = [
        caption(rng, usual_motion(kind, direction), held_out=held_out, sprite=sprite, language="en")
        for direction in (1, -1)
        for sprite in (None, "a purple square moves right")
        for _ in range(100)
    ]
    assert all(0 < len(text) <= LONGEST and "{" not in text for text in said)
    assert len(set(said)) > 100
    if kind in PANS and not held_out:
        assert all(any(plain(word) in plain(text) for word in SIDE_WORDS[kind]) for text in said)
    if kind == "still":
        moving = [text.lower() for text in said if "square" in text.lower()]
        assert moving and all("nothing moves" not in text for text in moving)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_sentence_belongs_to_one_motion_one_speed_and_one_split(language: str) -> None:
    """All sentences that can be made, whoever they might be taken for."""
    owners: dict[str, tuple[str, int, bool, str]] = {}
    for motion in every(SOME):
        for held_out in (False, True):
            made = all_said(motion, language, held_out)
            speed = "usual" if motion.kind == "still" else motion.speed
            owner = (motion.kind, motion.direction, held_out, speed)
            taken = [(text, owners[text]) for text in made if owners.setdefault(text, owner) != owner]
            assert not taken, (owner, taken[:5])
            enough = {False: 12 if motion.speed == "usual" else 6, True: 2 if motion.speed == "usual" else 1}
            assert len(made) >= enough[held_out], (owner, len(made))
    assert all("{" not in text and "  " not in text and text == text.strip() for text in owners)


SLOW = r"\b(slow|gent|slight|soft|gradual|a little|a bit|small\b)"
FAST = r"\b(quick|fast|rapid|swift|strong|a lot|far\b|a long way|big|whip|swish)"


def test_speeds_are_said_in_english() -> None:
    for motion in every(SOME):
        for text in all_said(motion, "en") | all_said(motion, "en", held_out=True):
            found = bool(re.search(SLOW, text)), bool(re.search(FAST, text))
            assert found == (motion.speed == "small", motion.speed == "large"), (motion, text)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("held_out", [False, True])
def test_captions_fit_the_text_encoder(language: str, held_out: bool) -> None:
    rng = np.random.default_rng(2)
    assert LONGEST < 120
    for motion in every((*MOTIONS, *COMBINATIONS)):
        for sprite in (None, "an orange square moves right", "a purple ball moves left"):
            for _ in range(3):
                text = caption(rng, motion, held_out=held_out, sprite=sprite, language=language)
                assert len(text.encode()) <= LONGEST
                if sprite:
                    assert plain(sprite_clause(sprite, language)) in plain(text)


def test_a_quarter_of_the_captions_is_not_english() -> None:
    rng = np.random.default_rng(0)
    texts = [caption(rng, draw_motion(rng)) for _ in range(4000)]
    kana = np.mean([bool(re.search("[\u3041-\u30ff]", text)) for text in texts])
    chinese = np.mean([bool(re.search("[\u4e00-\u9fff]", t)) and not re.search("[\u3041-\u30ff]", t) for t in texts])
    german = np.mean(
        [bool(re.search("nach|zoome|Kamera|kamera|KAMERA|Uhrzeiger|heran|heraus|Bild|Blick", t)) for t in texts]
    )
    for share in (kana, chinese, german):
        assert 0.03 < share < 0.07
    assert sum(LANGUAGE_SHARES.values()) == pytest.approx(1)
    assert LANGUAGE_SHARES["en"] == 0.75
    english = [caption(rng, draw_motion(rng), language="en") for _ in range(500)]
    assert all(text.isascii() for text in english)


def test_a_caption_of_a_kind_alone_is_at_its_usual_speed() -> None:
    for kind in (*MOTIONS, *COMBINATIONS):
        for direction in (1, -1):
            motion = usual_motion(kind, direction)
            assert (motion.kind, motion.speed) == (kind, "usual")
            by_kind = caption(np.random.default_rng(4), motion)
            assert by_kind == caption(np.random.default_rng(4), turned(motion, direction))
            if direction == 1:
                assert by_kind == caption(np.random.default_rng(4), kind)


def test_a_roll_names_the_way_the_camera_turns() -> None:
    said = said_of(Motion("roll", 10.0, 1))
    assert captions.fill("the camera rolls {turn}", said) == "the camera rolls clockwise"
    assert captions.fill("the picture turns {turned}", said) == "the picture turns counterclockwise"
    both = said_of(Combined((Motion("zoom in", 1.2), Motion("roll", 10.0, -1))))
    assert captions.fill("{acting2} and {acting1}", both) == "rolling counterclockwise and zooming in"


@pytest.mark.parametrize("language", LANGUAGES)
def test_sprites_are_told_apart_in_every_language(language: str) -> None:
    sprites = [
        Sprite(colour, shape, way, (0.0, 0.0), 0.1, 0.3)
        for colour in SPRITE_COLOURS
        for shape in SPRITE_SHAPES
        for way in SPRITE_WAYS
    ]
    clauses = [sprite_clause(sprite.clause, language) for sprite in sprites]
    assert len(set(clauses)) == len(sprites)
    if language == "en":
        assert clauses == [sprite.clause for sprite in sprites]


def test_slips_keep_the_words() -> None:
    """What a careless typist changes is small, and rare."""
    rng = np.random.default_rng(0)
    slipped = {captions._slipped(rng, "the camera rolls clockwise", LANGUAGES["en"]) for _ in range(200)}
    assert {"camera rolls clockwise", "the caemra rolls clockwise"} <= slipped
    kept = {plain("the camera rolls clockwise"), plain("camera rolls clockwise")}
    assert {plain(text) for text in slipped} == kept
    made = all_said(Motion("zoom in", 1.2), "en")
    typed = [caption(rng, "zoom in", language="en") for _ in range(1000)]
    bare = [re.sub(r"\.$", "", text).lower() for text in typed]
    exact = np.mean([any(text.endswith(sentence) for sentence in made) for text in bare])
    assert 0.9 < exact < 0.99


def test_a_clip_is_captioned_with_its_own_motion_and_sprite() -> None:
    clips = world(sprite_probability=1.0)
    languages = set()
    for index in range(100):
        plan = clips.plan(index)
        assert plan.sprite is not None
        clauses = {code: plain(sprite_clause(plan.sprite.clause, code)) for code in LANGUAGES}
        (language,) = (code for code, clause in clauses.items() if clause in plain(plan.caption))
        languages.add(language)
        camera = plain(plan.caption).replace(clauses[language], "")
        if language == "en" and plan.motion.kind in PANS:
            assert any(plain(word) in camera for word in SIDE_WORDS[plan.motion.kind])
        if plan.motion.kind == "zoom out":
            assert not any(w in plan.caption.lower() for w in ("zoom in", "closer", "approach"))
    assert languages == set(LANGUAGES)


def test_what_the_captions_teach_is_told() -> None:
    known = json.loads(json.dumps(captions.knows()))
    assert known["motions"] == list(MOTIONS) and known["combinations"] == list(COMBINATIONS)
    assert known["languages"]["German"] == 0.05 and len(known["languages"]) == len(LANGUAGES)
    assert known["travel"]["pan"]["small"] == [0.05, 0.10]
    assert any("walk" in line or "people" in line for line in known["not taught"])
    for names, kind in SYNONYMS.items():
        text = " | ".join(all_said(usual_motion(kind), "en"))
        assert all(re.search(rf"\b{word}", text) for word in re.findall(r"[a-z]+", names) if word != "or"), names


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
    clips = world(texture_probability=0.5, sprite_probability=0, still_fraction=0.125, combined_fraction=0)
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


@pytest.mark.parametrize("kind", MOVING)
@pytest.mark.parametrize("bound", [0, -1])
def test_the_measure_sees_the_smallest_and_the_largest_travel(kind: str, bound: int) -> None:
    clips = world(texture_probability=0, sprite_probability=0)
    plan = replace(clips.plan(3, kind), motion=Motion(kind, TRAVELS[kind.split()[0]][bound]))
    assert measure_motion.measure_motion(clips.render(plan)).kind == kind


@pytest.mark.parametrize("kind", ["pan left + zoom in", "zoom out + roll", "pan right + pan down", "pan up + roll"])
def test_the_measure_sees_both_of_two_motions(kind: str) -> None:
    clips = world(texture_probability=0, sprite_probability=0)
    plan = replace(clips.plan(3, kind), motion=usual_motion(kind, -1))
    found = measure_motion.measure_motion(clips.render(plan))
    assert found.kind in kind.split(" + ")
    (a, b, right), (_, _, down) = camera_path(plan.motion, 2, SIZE)[-1].tolist()
    assert found.pan_x == pytest.approx(right / SIZE[1], abs=0.015)
    assert found.pan_y == pytest.approx(down / SIZE[0], abs=0.015)
    assert found.zoom == pytest.approx(1 / math.hypot(a, b), abs=0.02)
    assert found.roll == pytest.approx(math.degrees(math.atan2(-b, a)), abs=0.6)


def test_travel_is_drawn_in_its_range() -> None:
    rng = np.random.default_rng(1)
    for kind, family in {"pan up": "pan", "zoom in": "zoom", "roll": "roll"}.items():
        for low, high, speed in zip(TRAVELS[family], TRAVELS[family][1:], SPEEDS, strict=False):
            motions = [draw_travel(rng, kind, speed) for _ in range(200)]
            travels = [motion.parts[0].travel for motion in motions]
            assert low <= min(travels) < low + 0.1 * (high - low)
            assert high - 0.1 * (high - low) < max(travels) <= high
            assert {motion.speed for motion in motions} == {speed}
    with pytest.raises(ValueError, match="pan left"):
        Motion("sideways")
    with pytest.raises(ValueError, match="pan left"):
        draw_travel(rng, "sideways")
