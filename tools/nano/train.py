"""Trains every part of the nano model on the nano world, stage by stage.

    python tools/nano/train.py images        # the autoencoder, on single images
    python tools/nano/train.py videos        # inflated, on clips of 17 frames

Each stage reads what the one before it left under build/nano and may be stopped and run again. `--minutes` bounds a stage's time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from clips import NanoClips

from fsae import FSAE
from fsae.inflation import inflate
from fsae.initialization import start_small
from fsae.training.autoencoder import AutoencoderTask, measure_latent_statistics
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsae.training.loop import train

BUILD = Path(__file__).resolve().parents[2] / "build" / "nano"


def validation_clips(frames: int, size: int, count: int) -> torch.Tensor:
    """Held-out photographs, `count 3 T size size`."""
    held_out = NanoClips("held-out", frames, (size, size), texture_probability=0.0, seed=1)
    return torch.stack([held_out[i]["video"] for i in range(count)])


class Alternating(torch.utils.data.Dataset[dict[str, Any]]):
    """Several clip lengths and sizes in turn, for batches of one: item i comes from world i % n."""

    def __init__(self, worlds: list[NanoClips]) -> None:
        self.worlds = worlds

    def __len__(self) -> int:
        return len(self.worlds) * min(len(world) for world in self.worlds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.worlds[index % len(self.worlds)][index // len(self.worlds)]


def save_autoencoder(model: FSAE, folder: Path, statistics: Any) -> None:
    """Save with the latents' statistics over a few hundred clips."""
    mean, std = measure_latent_statistics(model, statistics, batches=200)
    model.register_to_config(latents_mean=mean, latents_std=std)
    model.save_pretrained(folder)
    print(f"saved {folder}")


def images(minutes: float, steps: int) -> None:
    """The autoencoder on single images: one temporal tap is trained, at a third of the cost."""
    torch.manual_seed(0)
    model = FSAE.from_preset("nano").to(memory_format=torch.channels_last_3d)
    start_small(model)
    inflate(model)
    loop = LoopConfig(
        output_dir=str(BUILD / "images"),
        max_steps=steps,
        batch_size=4,
        optimizer=OptimizerConfig(learning_rate=1.5e-4),
        schedule=ScheduleConfig("constant", warmup_steps=50),
        ema_decay=0.995,
        mixed_precision="bf16",
        max_minutes=minutes,
        validate_every=200,
        save_every=200,
    )
    task = AutoencoderTask(model, validation=validation_clips(1, 128, 32))
    result = train(task, NanoClips("train", 1, (128, 128)), loop)
    trained = result.export("autoencoder")
    assert isinstance(trained, FSAE)
    trained.save_pretrained(BUILD / "images" / "autoencoder")


def videos(minutes: float, steps: int) -> None:
    """The image autoencoder, inflated, on moving clips: mostly 17 frames at 128 pixels, some 5 frames at 256."""
    model = FSAE.from_pretrained(BUILD / "images" / "autoencoder").to(memory_format=torch.channels_last_3d)
    inflate(model)
    loop = LoopConfig(
        output_dir=str(BUILD / "videos"),
        max_steps=steps,
        batch_size=1,
        gradient_accumulation_steps=2,
        optimizer=OptimizerConfig(learning_rate=6e-4),
        schedule=ScheduleConfig("constant", warmup_steps=50),
        ema_decay=0.995,
        mixed_precision="bf16",
        max_minutes=minutes,
        validate_every=100,
        save_every=100,
    )
    task = AutoencoderTask(model, validation=validation_clips(17, 128, 8))
    worlds = [NanoClips("train", 17, (128, 128), seed=s) for s in (10, 11, 12)]
    worlds.append(NanoClips("train", 5, (256, 256), seed=13))
    result = train(task, Alternating(worlds), loop)
    trained = result.export("autoencoder")
    assert isinstance(trained, FSAE)
    save_autoencoder(trained, BUILD / "videos" / "autoencoder", worlds[0])


STAGES: dict[str, tuple[Callable[[float, int], None], int]] = {"images": (images, 6000), "videos": (videos, 8000)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--minutes", type=float, default=0.0, help="save and stop after this time; 0 for no limit")
    parser.add_argument("--steps", type=int, help="updates in all, if not the stage's own number")
    arguments = parser.parse_args()
    stage, steps = STAGES[arguments.stage]
    stage(arguments.minutes, arguments.steps or steps)


if __name__ == "__main__":
    main()
