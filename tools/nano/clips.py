"""The nano world's clips: a photograph or a texture seen by a moving camera, with a caption that says how.

    clips = NanoClips(split="train", frames=17, size=(128, 128))
    clips[7]                    # {"video": 3 T H W in [-1, 1], "caption": str, "motion": str}
    clips.sample_batch(range(8))["video"]    # 8 3 T H W on the clips' device

An item is a function of (seed, index) alone: the same on every machine, in every worker, in every order.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from captions import caption
from motion import Combined, Motion, camera_path, draw_motion, draw_travel, extent
from photographs import BANK, SPLITS
from textures import kept_texture
from torch.nn import functional as F

TEXTURES = 96  # of each split
OVERSAMPLING = 1.33  # of the picture that the camera looks at: bilinear views then keep their sharpness
SPRITE_COLOURS = {
    "red": (0.85, 0.12, 0.12), "green": (0.15, 0.65, 0.2), "blue": (0.15, 0.3, 0.85),
    "yellow": (0.95, 0.85, 0.15), "orange": (0.95, 0.5, 0.1), "purple": (0.55, 0.2, 0.7),
    "white": (0.95, 0.95, 0.95), "black": (0.06, 0.06, 0.06), "pink": (0.95, 0.55, 0.7),
}  # fmt: skip
SPRITE_SHAPES = ("ball", "square")
SPRITE_WAYS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


def load_photographs(split: str, bank: Path = BANK) -> list[torch.Tensor]:
    """The bank's photographs of a split, each uint8 (3, H, W)."""
    from PIL import Image

    if split not in SPLITS:
        raise ValueError(f"split {split!r}; one of {', '.join(SPLITS)}")
    if not bank.exists():
        raise FileNotFoundError(f"{bank} is not built; run: python tools/nano/photographs.py")
    photographs = []
    with zipfile.ZipFile(bank) as archive:
        for entry in json.loads(archive.read("manifest.json")):
            if entry["split"] == split:
                image = Image.open(io.BytesIO(archive.read(f"{entry['name']}.jpg"))).convert("RGB")
                photographs.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())
    return photographs


@dataclass(frozen=True)
class Sprite:
    """A coloured thing that moves on its own. Lengths are fractions of the frame; `start` is centred."""

    colour: str
    shape: str
    way: str
    start: tuple[float, float]
    radius: float
    travel: float

    @property
    def clause(self) -> str:
        """What an English caption says of it, and what `caption` takes for any language."""
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape} moves {self.way}"


@dataclass(frozen=True)
class Plan:
    """Everything random about one clip, before any picture is touched."""

    motion: Motion | Combined
    caption: str
    photograph: int  # -1: a texture
    texture: int
    zoom: float  # share of the largest view that fits
    place: tuple[float, float]  # of the view inside what it may move in, 0..1 each
    flip: bool
    colour: tuple[float, float, float, float, float]  # brightness, contrast, saturation, warmth, tint
    sprite: Sprite | None


class NanoClips(torch.utils.data.Dataset[dict[str, Any]]):
    """Clips of the nano world.

    Args:
        split: "train" or "held-out": which photographs of the bank (and which caption wordings, unless
            `held_out_captions` says).
        frames: T. A single frame is an image of a still camera.
        size: (H, W).
        length: how many items there are; each index below it makes its own clip.
        seed: another seed is another world of clips.
        texture_probability, sprite_probability, still_fraction, combined_fraction: shares of clips.
        photographs: uint8 (3, H, W) pictures to use in place of the bank.
        device: where the pictures live and the clips are made.
    """

    def __init__(
        self,
        split: str = "train",
        frames: int = 17,
        size: tuple[int, int] = (128, 128),
        *,
        length: int = 1_000_000,
        seed: int = 0,
        texture_probability: float = 0.2,
        sprite_probability: float = 0.15,
        still_fraction: float = 0.125,
        combined_fraction: float = 0.15,
        held_out_captions: bool | None = None,
        photographs: Sequence[torch.Tensor] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if frames < 1 or min(size) < 8:
            raise ValueError(f"{frames} frames of {size[0]}x{size[1]}; at least one frame of 8x8")
        self.frames, self.size, self.length, self.seed = frames, size, length, seed
        self.texture_probability = texture_probability
        self.sprite_probability = sprite_probability
        self.still_fraction, self.combined_fraction = still_fraction, combined_fraction
        self.first_texture = SPLITS.index(split) * TEXTURES
        self.held_out_captions = split == "held-out" if held_out_captions is None else held_out_captions
        self.device = torch.device(device)
        pictures = load_photographs(split) if photographs is None else list(photographs)
        self.photographs = [p.to(self.device) for p in pictures]
        if not self.photographs and texture_probability < 1:
            raise ValueError("no photographs, and not every clip is a texture")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        position = int(index)
        if not 0 <= position < self.length:
            raise IndexError(position)
        plan = self.plan(position)
        return {"video": self.render(plan), "caption": plan.caption, "motion": plan.motion.kind}

    def sample_batch(self, indices: Iterable[int]) -> dict[str, Any]:
        """The items of `indices` with their videos stacked: B 3 T H W on the clips' device."""
        items = [self[i] for i in indices]
        batch = {key: [item[key] for item in items] for key in ("caption", "motion")}
        return {"video": torch.stack([item["video"] for item in items]), **batch}

    def plan(self, index: int, kind: str | None = None) -> Plan:
        """The random choices of item `index`; `kind`, of one motion or two, is taken in place of the drawn one."""
        rng = np.random.default_rng((self.seed, index))
        moving = self.frames > 1
        motion = draw_motion(rng, self.still_fraction, self.combined_fraction) if moving else Motion("still")
        if kind is not None:
            motion = draw_travel(rng, kind)
        is_texture = rng.random() < self.texture_probability
        sprite = self._draw_sprite(rng) if moving and rng.random() < self.sprite_probability else None
        return Plan(
            motion=motion,
            caption=caption(rng, motion, held_out=self.held_out_captions, sprite=sprite.clause if sprite else None),
            photograph=-1 if is_texture else int(rng.integers(len(self.photographs))),
            texture=self.first_texture + int(rng.integers(TEXTURES)),
            zoom=float(rng.uniform(0.35, 1.0)),
            place=(float(rng.random()), float(rng.random())),
            flip=bool(rng.random() < 0.5),
            colour=tuple(float(c) for c in rng.uniform(-1, 1, 5)),  # type: ignore[arg-type]
            sprite=sprite,
        )

    def _draw_sprite(self, rng: np.random.Generator) -> Sprite:
        way = list(SPRITE_WAYS)[int(rng.integers(len(SPRITE_WAYS)))]
        travel = float(rng.uniform(0.2, 0.45))
        dx, dy = SPRITE_WAYS[way]
        x, y = (float(v) for v in rng.uniform(-0.2, 0.2, 2))
        return Sprite(
            colour=list(SPRITE_COLOURS)[int(rng.integers(len(SPRITE_COLOURS)))],
            shape=SPRITE_SHAPES[int(rng.integers(len(SPRITE_SHAPES)))],
            way=way,
            start=(x - dx * travel / 2, y - dy * travel / 2),
            radius=float(rng.uniform(0.06, 0.14)),
            travel=travel,
        )

    def render(self, plan: Plan, every: int = 1) -> torch.Tensor:
        """3 T H W in [-1, 1]: the clip that a plan describes; of `every` frames one."""
        height, width = self.size
        path = camera_path(plan.motion, self.frames, self.size)
        seen = extent(path, self.size)
        picture, scale = self._picture(plan, seen)
        y = torch.arange(height, device=self.device, dtype=torch.float32)[:, None] + 0.5 - height / 2
        x = torch.arange(width, device=self.device, dtype=torch.float32) + 0.5 - width / 2
        # Centred frame pixels -> the picture's pixels -> grid_sample's [-1, 1] between outer pixel edges.
        frames = range(0, self.frames, every)
        per_pixel = torch.tensor([2 * scale[0] / picture.shape[2], 2 * scale[1] / picture.shape[1]])
        to_grid = (path - torch.tensor([[0.0, 0.0, seen[0]], [0.0, 0.0, seen[2]]])) * per_pixel[:, None]
        to_grid[:, :, 2] -= 1
        video = torch.empty(3, len(frames), height, width, device=self.device)
        grid = torch.empty(1, height, width, 2, device=self.device)
        # Frame by frame, so that the grid stays in the processor's cache.
        for place, frame in enumerate(frames):
            horizontal, vertical = to_grid[frame].tolist()
            for axis, (along_x, along_y, offset) in enumerate((horizontal, vertical)):
                torch.add(along_x * x, along_y * y + offset, out=grid[0, :, :, axis])
            video[:, place] = F.grid_sample(picture[None], grid, padding_mode="border", align_corners=False)[0]
            if plan.sprite is not None:
                share = frame / max(1, self.frames - 1)
                video[:, place] = self._with_sprite(video[:, place], plan.sprite, share, path[frame], (x, y))
        return video.clamp_(-1, 1)

    def _picture(self, plan: Plan, seen: tuple[float, float, float, float]) -> tuple[torch.Tensor, tuple[float, float]]:
        """What the camera sees on its path, (3, h, w) in [-1, 1], and its pixels per frame pixel (x, y)."""
        seen_width, seen_height = seen[1] - seen[0], seen[3] - seen[2]
        is_texture = plan.photograph < 0
        photograph = kept_texture(plan.texture, self.device) if is_texture else self.photographs[plan.photograph]
        region, ratio = self._region(photograph, plan, (seen_height, seen_width))
        oversampling = min(OVERSAMPLING, max(1.0, ratio))
        wanted = (round(seen_height * oversampling), round(seen_width * oversampling))
        if self.device.type != "cpu":
            region = region.float()  # bytes, several times faster, can be resized on the CPU alone
        region = F.interpolate(region[None], size=wanted, mode="bilinear", antialias=True, align_corners=False)[0]
        if plan.flip:
            region = region.flip(-1)
        picture = self._recolour(region.float(), plan.colour)
        return picture, (picture.shape[2] / seen_width, picture.shape[1] / seen_height)

    def _region(self, photograph: torch.Tensor, plan: Plan, seen: tuple[float, float]) -> tuple[torch.Tensor, float]:
        """The part of a photograph that a clip looks at, and its photograph pixels per frame pixel.

        The view's scale is drawn as if the camera stood still, so that it tells little about the motion, and
        is bounded by what the moving camera needs.
        """
        rows, columns = photograph.shape[1:]
        still = min(columns / self.size[1], rows / self.size[0])
        fitting = min(columns / seen[1], rows / seen[0])
        ratio = min(fitting, max(plan.zoom * still, min(0.75, fitting)))
        height, width = min(rows, round(ratio * seen[0])), min(columns, round(ratio * seen[1]))
        top, left = round(plan.place[0] * (rows - height)), round(plan.place[1] * (columns - width))
        return photograph[:, top : top + height, left : left + width], ratio

    @staticmethod
    def _recolour(picture: torch.Tensor, colour: tuple[float, float, float, float, float]) -> torch.Tensor:
        """(3, h, w) in [-1, 1] of 0..255: mild changes of brightness, contrast, saturation and white balance, each
        argument in -1..1."""
        brightness, contrast, saturation, warmth, tint = colour
        grey = picture.mean(0, keepdim=True)
        picture = torch.lerp(grey, picture, 1 + 0.25 * saturation)
        gain = torch.tensor([1 + 0.06 * warmth, 1 + 0.04 * tint, 1 - 0.06 * warmth], device=picture.device)
        slope = 1 + 0.15 * contrast
        picture.mul_((gain * (2 * slope / 255))[:, None, None]).add_(0.16 * brightness - slope)
        return picture.clamp_(-1, 1)

    def _with_sprite(
        self,
        picture: torch.Tensor,
        sprite: Sprite,
        share: float,
        matrix: torch.Tensor,
        pixels: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """A frame, 3 H W in [-1, 1], with its sprite painted over: it lives in the first frame's plane and moves in it.

        `share` of its way is done; `matrix` maps the frame's centred `pixels` (x, y) to the first frame's.
        """
        height, width = self.size
        dx, dy = SPRITE_WAYS[sprite.way]
        (a, b, c), (d, e, f) = matrix.tolist()
        x = a * pixels[0] + b * pixels[1] + (c - (sprite.start[0] + dx * sprite.travel * share) * width)
        y = d * pixels[0] + e * pixels[1] + (f - (sprite.start[1] + dy * sprite.travel * share) * height)
        radius = sprite.radius * min(height, width)
        distance = torch.hypot(x, y) if sprite.shape == "ball" else torch.maximum(x.abs(), y.abs())
        cover = (radius + 0.5 - distance).clamp(0, 1)
        light = (1 - 0.25 * (x + y) / radius).clamp(0.6, 1.4)
        colour = torch.tensor(SPRITE_COLOURS[sprite.colour], device=self.device)[:, None, None]
        return torch.lerp(picture, (colour * light).clamp(0, 1) * 2 - 1, cover)
