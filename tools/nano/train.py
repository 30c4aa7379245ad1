"""Trains every part of the nano model on the nano world, stage by stage.

    python tools/nano/train.py images        # the autoencoder, on single images
    python tools/nano/train.py videos        # on moving clips
    python tools/nano/train.py decoder       # its encoder frozen, the decoder alone
    python tools/nano/train.py cache         # clips as latents, for the stages below (needs videos)
    python tools/nano/train.py base          # the transformer and its two encoders
    python tools/nano/train.py upsampler
    python tools/nano/train.py refiner       # starts from the base transformer
    python tools/nano/train.py export        # the pipeline's folder, half precision

Each stage reads what earlier ones left under build/nano, and goes on where it was stopped. `--minutes` bounds a
stage's time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))

from captions import caption
from clips import NanoClips, Plan
from motion import camera_path
from told import MotionTask, TrackedClips, told_latents

from fsae import FSAE
from fsae.checkpoint import save_state
from fsae.inflation import inflate
from fsae.initialization import start_small
from fsae.training.autoencoder import AutoencoderTask
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsae.training.loop import train
from fsdit.conditioning import load_encoders, resize_for_clip
from fsdit.config import TransformerConfig
from fsdit.data import LatentClip
from fsdit.flow import FlowSchedule
from fsdit.model import FSDiT
from fsdit.training import train_transformer
from fsupsampler.config import RefinerConfig, UpsamplerConfig, UpsamplerLoss
from fsupsampler.data import LatentPair, halve
from fsupsampler.refiner import DynamicMask
from fsupsampler.training import train_refiner, train_upsampler
from fsupsampler.upsampler import LatentUpsampler

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "nano"
MODEL = ROOT / "packages" / "fsvideo-pipeline" / "src" / "fsvideo_pipeline" / "models" / "nano"

FRAMES, HIGH, LOW = 33, 256, 128
"""The video that the nano model makes by default, and the base model's size."""

BASE_CLIPS, PAIRED_CLIPS = 1000, 160
"""Clips kept as latents: at the base model's size alone, and at both sizes."""

BASE_FLOW, REFINER_FLOW = FlowSchedule(shift=3.0), FlowSchedule(shift=5.0)
"""Less shift than for large clips: these have 36 and 144 tokens."""

IMAGE_SIZE = 64
"""What the image encoder sees of the first frame."""


# --- the autoencoder -------------------------------------------------------------------------------------------------


def validation_images(count: int) -> Tensor:
    """Held-out photographs, `count 3 1 128 128`."""
    held_out = NanoClips("held-out", 1, (LOW, LOW), texture_probability=0.0, seed=1)
    return torch.stack([held_out[i]["video"] for i in range(count)])


class Alternating(torch.utils.data.Dataset[dict[str, Any]]):
    """Several clip lengths and sizes in turn, for batches of one: item i comes from world i % n."""

    def __init__(self, worlds: list[TrackedClips]) -> None:
        self.worlds = worlds

    def __len__(self) -> int:
        return len(self.worlds) * min(len(world) for world in self.worlds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.worlds[index % len(self.worlds)][index // len(self.worlds)]


def moving_worlds(seed: int) -> Alternating:
    """Mostly 17 frames at 128 pixels, some 5 frames at 256."""
    sizes = [(17, LOW)] * 3 + [(5, HIGH)]
    worlds = [NanoClips("train", frames, (size, size), seed=seed + s) for s, (frames, size) in enumerate(sizes)]
    return Alternating([TrackedClips(world) for world in worlds])


def autoencoder_loop(stage: str, minutes: float, steps: int, batch_size: int, rate: float) -> LoopConfig:
    """The autoencoder's stages differ in little."""
    return LoopConfig(
        output_dir=str(BUILD / stage),
        max_steps=steps,
        batch_size=batch_size,
        optimizer=OptimizerConfig(learning_rate=rate),
        schedule=ScheduleConfig("constant", warmup_steps=50),
        ema_decay=0.995,
        mixed_precision="bf16",
        max_minutes=minutes,
        validate_every=200,
        save_every=200,
    )


def images(minutes: float, steps: int) -> None:
    """The autoencoder on single images: one temporal tap is trained, at a third of the cost."""
    torch.manual_seed(0)
    model = FSAE.from_preset("nano").to(memory_format=torch.channels_last_3d)
    start_small(model)
    inflate(model)
    loop = autoencoder_loop("images", minutes, steps, batch_size=4, rate=1.5e-4)
    task = AutoencoderTask(model, validation=validation_images(32))
    result = train(task, NanoClips("train", 1, (LOW, LOW)), loop)
    result.export("autoencoder").save_pretrained(BUILD / "images" / "autoencoder")  # type: ignore[operator]


def videos(minutes: float, steps: int) -> None:
    """Moving clips: the decoder learns to follow what the latents say, the encoder what to say of each frame."""
    model = FSAE.from_pretrained(BUILD / "images" / "autoencoder").to(memory_format=torch.channels_last_3d)
    inflate(model)
    loop = autoencoder_loop("videos", minutes, steps, batch_size=1, rate=1.5e-4)
    trained = train(MotionTask(model, 0.5, 0.0, validation_moving()), moving_worlds(10), loop).export("autoencoder")
    assert isinstance(trained, FSAE)
    # Only the sum of the encoder's temporal taps was trained; a clip's latents are then those of its frames as images.
    inflate(trained.encoder)
    mean, std = told_statistics(trained, 100)
    trained.register_to_config(latents_mean=mean, latents_std=std)
    trained.save_pretrained(BUILD / "videos" / "autoencoder")


def decoder(minutes: float, steps: int) -> None:
    """The decoder alone: latents stay what the later stages have learned."""
    model = FSAE.from_pretrained(BUILD / "videos" / "autoencoder").to(memory_format=torch.channels_last_3d)
    model.encoder.requires_grad_(False)
    loop = autoencoder_loop("decoder", minutes, steps, batch_size=1, rate=1.5e-4)
    trained = train(MotionTask(model, 0.3, 0.5, validation_moving()), moving_worlds(20), loop).export("autoencoder")
    trained.save_pretrained(BUILD / "decoder" / "autoencoder")  # type: ignore[operator]


def validation_moving() -> list[dict[str, Any]]:
    """Clips of held-out photographs."""
    held_out = NanoClips("held-out", 17, (LOW, LOW), texture_probability=0.0, seed=1)
    return [TrackedClips(held_out)[i] for i in range(8)]


@torch.no_grad()
def told_statistics(model: FSAE, count: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of told latents, over clips of both sizes."""
    parts = []
    for size in (LOW, HIGH):
        clips = TrackedClips(NanoClips("train", FRAMES, (size, size), seed=40))
        for index in range(count):
            clip = clips[index]
            with torch.autocast("cpu", torch.bfloat16):
                latents, _ = told_latents(model, clip["video"].unsqueeze(0), clip["path"].unsqueeze(0))
            parts.append(latents[0].double().flatten(1))
    values = torch.cat(parts, dim=1)
    return values.mean(1).tolist(), values.std(1).tolist()


# --- clips as latents ------------------------------------------------------------------------------------------------


class Recaptioned:
    """Encoded clips, each told in new words in every epoch.

    Args:
        tensors: `low` and, for pairs, `high` latents `M C t h w`, and `image`, first frames `M 3 S S`.
        plans: what happens in each clip.
    """

    def __init__(self, tensors: dict[str, Tensor], plans: list[dict[str, Any]]) -> None:
        self.tensors, self.plans = tensors, plans

    def __len__(self) -> int:
        return len(self.plans)

    def words(self, index: int, epoch: int) -> str:
        """A caption of the clip, new in each epoch."""
        plan = self.plans[index]
        rng = np.random.default_rng((index, epoch))
        return caption(rng, plan["kind"], plan["direction"], sprite=plan["sprite"])

    def sample(self, index: int, epoch: int) -> LatentClip | LatentPair:
        """One clip's latents, under the names that its training expects."""
        values = {name: tensor[index].float() for name, tensor in self.tensors.items()}
        if "high" not in values:
            values["latents"] = values.pop("low")
        return {**values, "caption": self.words(index, epoch)}  # type: ignore[typeddict-item, return-value]

    def __getitem__(self, index: int) -> LatentClip | LatentPair:
        return self.sample(index, 0)


def described(plan: Plan) -> dict[str, Any]:
    """What a caption is made of."""
    sprite = plan.sprite.clause if plan.sprite else None
    return {"kind": plan.motion.kind, "direction": plan.motion.direction, "sprite": sprite}


@torch.inference_mode()
def encode_clips(model: FSAE, clips: NanoClips, count: int, *, paired: bool, name: str) -> None:
    """Write the latents of `count` clips, and what happens in them, to build/nano."""
    kept: dict[str, list[Tensor]] = {"low": [], "image": []} | ({"high": []} if paired else {})
    plans = []
    for index in tqdm(range(count), desc=f"encoding {name}", unit="clip"):
        plan = clips.plan(index)
        plans.append(described(plan))
        video = clips.render(plan).unsqueeze(0)
        path = camera_path(plan.motion, clips.frames, clips.size).unsqueeze(0)
        with torch.autocast("cpu", torch.bfloat16):
            if paired:
                kept["high"].append(model.normalize(told_latents(model, video, path)[0].float()).half())
                video, path = halve(video), path * torch.tensor([1.0, 1.0, 0.5])
            kept["low"].append(model.normalize(told_latents(model, video, path)[0].float()).half())
        kept["image"].append(resize_for_clip(video[:, :, 0], IMAGE_SIZE).half())
    save_state({key: torch.cat(values) for key, values in kept.items()}, BUILD / f"{name}.safetensors")
    (BUILD / f"{name}.json").write_text(json.dumps(plans))


def cached(name: str) -> Recaptioned:
    """What `encode_clips` wrote."""
    return Recaptioned(load_file(BUILD / f"{name}.safetensors"), json.loads((BUILD / f"{name}.json").read_text()))


def cache(minutes: float, steps: int) -> None:
    """Encode the clips of the transformer's and the refiner's training; `steps` is how many for the transformer."""
    model = FSAE.from_pretrained(BUILD / "videos" / "autoencoder").to(memory_format=torch.channels_last_3d).eval()
    options = {"texture_probability": 0.1, "sprite_probability": 0.08}
    clips = NanoClips("train", FRAMES, (LOW, LOW), seed=30, **options)
    encode_clips(model, clips, steps, paired=False, name="clips")
    clips = NanoClips("train", FRAMES, (HIGH, HIGH), seed=31, **options)
    encode_clips(model, clips, round(steps * PAIRED_CLIPS / BASE_CLIPS), paired=True, name="pairs")


# --- the models of latents -------------------------------------------------------------------------------------------


def latent_loop(stage: str, minutes: float, steps: int, batch_size: int, rate: float) -> LoopConfig:
    """The latents' stages differ in little."""
    return LoopConfig(
        output_dir=str(BUILD / stage),
        max_steps=steps,
        batch_size=batch_size,
        optimizer=OptimizerConfig(learning_rate=rate, weight_decay=0.01),
        schedule=ScheduleConfig("constant", warmup_steps=50),
        ema_decay=0.995,
        max_minutes=minutes,
        save_every=200,
    )


def base(minutes: float, steps: int) -> None:
    """The transformer and its encoders, all from random weights."""
    config = TransformerConfig(
        data="the nano world",
        autoencoder=str(BUILD / "videos" / "autoencoder"),
        loop=latent_loop("base", minutes, steps, batch_size=32, rate=6e-4),
        frames=FRAMES,
        height=LOW,
        width=LOW,
        flow=BASE_FLOW,
    )
    train_transformer(config, cached("clips"))


def upsampler(minutes: float, steps: int) -> None:
    """The latent upsampler, on latents alone."""
    config = UpsamplerConfig(
        data="the nano world",
        autoencoder=str(BUILD / "videos" / "autoencoder"),
        loop=latent_loop("upsampler", minutes, steps, batch_size=8, rate=3e-4),
        frames=FRAMES,
        loss=UpsamplerLoss(latent=1.0, pixel=0.0, perceptual=0.0),
    )
    train_upsampler(config, cached("pairs"))


def refiner(minutes: float, steps: int) -> None:
    """The refiner, from the base transformer, on drafts of the base's own one-step estimates."""
    config = RefinerConfig(
        data="the nano world",
        autoencoder=str(BUILD / "videos" / "autoencoder"),
        encoders=str(BUILD / "base"),
        model=str(BUILD / "base" / "transformer"),
        base=str(BUILD / "base" / "transformer"),
        base_flow=BASE_FLOW,
        upsampler=str(BUILD / "upsampler" / "upsampler"),
        loop=latent_loop("refiner", minutes, steps, batch_size=8, rate=3e-4),
        frames=FRAMES,
        flow=REFINER_FLOW,
    )
    train_refiner(config, cached("pairs"))


def export(minutes: float, steps: int) -> None:
    """Write the pipeline in half precision; the decoder's last stage is taken if it was run."""
    from fsvideo_pipeline.pipeline import FSVideoPipeline
    from fsvideo_pipeline.settings import Settings

    stage = "decoder" if (BUILD / "decoder" / "autoencoder").is_dir() else "videos"
    transformer = FSDiT.from_pretrained(BUILD / "base" / "transformer")
    text_encoder, image_encoder = load_encoders(BUILD / "base", transformer.config.text_len)
    pipeline = FSVideoPipeline(
        autoencoder=FSAE.from_pretrained(BUILD / stage / "autoencoder").half(),
        text_encoder=text_encoder.model.half(),
        tokenizer=text_encoder.tokenizer,
        image_encoder=image_encoder.model.half(),
        transformer=transformer.half(),
        upsampler=LatentUpsampler.from_pretrained(BUILD / "upsampler" / "upsampler").half(),
        refiner=FSDiT.from_pretrained(BUILD / "refiner" / "refiner").half(),
        mask=DynamicMask.from_pretrained(BUILD / "refiner" / "dynamic_mask"),
        settings=Settings(
            area=HIGH * HIGH,
            frames=FRAMES,
            fps=16.0,
            steps=20,
            guidance=3.0,
            shift=BASE_FLOW.shift,
            refiner_shift=REFINER_FLOW.shift,
        ),
    )
    pipeline.save_pretrained(MODEL)
    size = sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file())
    print(f"wrote {MODEL.relative_to(ROOT)}, {size / 1e6:.1f} MB")


STAGES: dict[str, tuple[Callable[[float, int], None], int]] = {
    "images": (images, 6000),
    "videos": (videos, 8000),
    "decoder": (decoder, 8000),
    "cache": (cache, BASE_CLIPS),
    "base": (base, 4000),
    "upsampler": (upsampler, 2000),
    "refiner": (refiner, 2000),
    "export": (export, 0),
}


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--minutes", type=float, default=0.0, help="save and stop after this time; 0 for no limit")
    parser.add_argument("--steps", type=int, help="updates in all, if not the stage's own number (cache: clips)")
    arguments = parser.parse_args()
    stage, steps = STAGES[arguments.stage]
    stage(arguments.minutes, arguments.steps or steps)


if __name__ == "__main__":
    main()
