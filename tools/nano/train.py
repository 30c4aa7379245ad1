"""Trains every part of the nano model on the nano world, stage by stage.

    python tools/nano/train.py images        # the autoencoder, on single images
    python tools/nano/train.py seeing        # its encoder learns to see motion
    python tools/nano/train.py following     # its decoder learns to follow motion (can run beside `seeing`)
    python tools/nano/train.py together      # both, end to end
    python tools/nano/train.py cache         # clips as latents, for the stages below
    python tools/nano/train.py base          # the transformer and its two encoders
    python tools/nano/train.py upsampler
    python tools/nano/train.py refiner       # starts from the base transformer
    python tools/nano/train.py export        # the pipeline's folder, half precision

Each stage reads what earlier ones left under build/nano, and goes on where it was stopped. `--minutes` bounds a
stage's time. `all` runs every stage in turn, and `--smoke` all of them with a few updates each, into build/nano-smoke.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from captions import caption, knows
from clips import NanoClips, Plan
from motion import motion_from_dict
from tasks import CameraClips, ClipTask, SeeingTask, Weights, free_code, one_item, read_code

from fsae import FSAE
from fsae.data.buckets import Bucket
from fsae.data.config import ClipsConfig
from fsae.data.media import Entry, Media
from fsae.data.video import to_frames
from fsae.losses.perceptual import PerceptualLoss
from fsae.stages.task import measure_latent_statistics
from fsae.storage.checkpoint import load_state, save_state
from fsae.storage.files import write_json
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsae.training.loop import train
from fsae.weights.inflation import inflate
from fsae.weights.initialization import start_small
from fsdit.conditioning import load_encoders
from fsdit.flow.path import FlowSchedule
from fsdit.model import FSDiT
from fsdit.preparation.cache import make_cache
from fsdit.preparation.config import CacheConfig
from fsdit.training.config import TransformerConfig
from fsdit.training.data import CachedLatents
from fsdit.training.run import train_transformer
from fsupsampler.refiner import DynamicMask
from fsupsampler.training.config import RefinerConfig, UpsamplerConfig, UpsamplerLoss
from fsupsampler.training.refiner import train_refiner
from fsupsampler.training.upsampler import train_upsampler
from fsupsampler.upsampler import LatentUpsampler

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "packages" / "fsvideo-pipeline" / "src" / "fsvideo_pipeline" / "models" / "nano"

FRAMES, HIGH, LOW = 33, 256, 128
"""The video that the nano model makes by default, and the base model's size."""

BASE_FLOW, REFINER_FLOW = FlowSchedule(shift=3.0), FlowSchedule(shift=5.0)
"""Less shift than for large clips: these have 36 and 144 tokens."""

IMAGE_SIZE = 64
"""What the image encoder sees of the first frame."""


@dataclass(frozen=True)
class Run:
    """How long a stage goes on, and where.

    Attributes:
        folder: what the stages leave for each other.
        steps: updates in all; of `cache`, percent of its clips.
        minutes: save and stop after this time; 0 for no limit.
        perceptual: files of LPIPS's trunk and heads; none leaves it out.
        export: the pipeline's folder.
        smoke: whether textures stand for the photographs, and few sizes for all.
        device: where clips are made; the loop takes a GPU where there is one.
        start: a pipeline's folder whose transformer and encoders `base` goes on from; none starts from random weights.
    """

    folder: Path
    steps: int
    minutes: float = 0.0
    perceptual: tuple[str, ...] = ()
    export: Path = MODEL
    smoke: bool = False
    device: str = "cpu"
    start: Path | None = None

    def clips(self, split: str, frames: int, size: tuple[int, int], seed: int, **shares: float) -> NanoClips:
        """A world of clips; `shares` as `NanoClips` takes them."""
        if self.smoke:
            return NanoClips(split, frames, size, seed=seed, texture_probability=1.0, photographs=[])
        return NanoClips(split, frames, size, seed=seed, device=self.device, **shares)  # type: ignore[arg-type]

    def worlds(self, seed: int, kinds: Sequence[tuple[int, int, int, int]], every: int = 1) -> CameraClips:
        """Batches of several lengths and sizes in turn: of each kind its frames, height, width and clips a batch."""
        kinds = kinds[:2] if self.smoke else kinds
        made = [self.clips("train", frames, (h, w), seed + i) for i, (frames, h, w, _) in enumerate(kinds)]
        return CameraClips(made, [count for *_, count in kinds], every)

    def held_out(self, frames: int, side: int, count: int, every: int = 1) -> dict[str, Tensor]:
        """Clips of held-out photographs, and the camera's path in them."""
        shares = {"texture_probability": 0.0, "sprite_probability": 0.0}
        return CameraClips([self.clips("held-out", frames, (side, side), 1, **shares)], [count], every)[0]

    def part(self, stage: str, part: str) -> Path:
        """The folder of a trained part."""
        return self.folder / stage / part

    def autoencoder(self, stage: str) -> FSAE:
        """The autoencoder that a stage left."""
        return FSAE.from_pretrained(self.part(stage, "autoencoder")).to(memory_format=torch.channels_last_3d)


# --- the autoencoder -------------------------------------------------------------------------------------------------


def autoencoder_loop(stage: str, run: Run, optimizer: OptimizerConfig) -> LoopConfig:
    """The autoencoder's stages differ in little."""
    return LoopConfig(
        output_dir=str(run.folder / stage),
        max_steps=run.steps,
        optimizer=optimizer,
        schedule=ScheduleConfig("constant", warmup_steps=50),
        ema_decay=0.995,
        mixed_precision="bf16",
        max_minutes=run.minutes,
        validate_every=200,
        save_every=100,
    )


class Singles(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Clips one by one, small and large in turn, for the latents' statistics."""

    def __init__(self, run: Run, seed: int) -> None:
        self.worlds = [run.clips("train", FRAMES, (side, side), seed + side) for side in (LOW, LOW, HIGH)]

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"video": self.worlds[index % 3][index]["video"]}


IMAGES = [(1, LOW, LOW, 4), (1, 64, 128, 8), (1, LOW, LOW, 4), (1, 192, LOW, 2), (1, HIGH, HIGH, 1)]
"""What the autoencoder sees at first; each kind in turn."""

LONG = [
    (33, LOW, LOW, 2), (17, LOW, 192, 2), (17, LOW, LOW, 3), (33, 192, LOW, 1), (17, LOW, LOW, 3), (33, HIGH, HIGH, 1),
    (17, LOW, LOW, 3), (17, 192, 320, 1),
]  # fmt: skip
"""Where the encoder learns to see motion: long clips. In short ones a velocity is a place as well."""

CLIPS = [
    (17, LOW, LOW, 1), (9, 64, 128, 2), (33, 64, 64, 2), (17, 64, 128, 2), (9, 192, 128, 1), (33, 64, 128, 1),
    (5, HIGH, HIGH, 1), (17, LOW, LOW, 1), (9, 128, 192, 1), (33, LOW, LOW, 1),
]  # fmt: skip
"""Every length, several sizes and shapes; speeds are those of whole frames, so that large ones are fast."""


CROPS = [(9, 64, 64, 1), (9, 64, 128, 1), (17, 64, 64, 1), (5, LOW, LOW, 1), (17, 64, 128, 1), (5, 64, 64, 2)]
"""Where the decoder learns to follow: motion is told, so that small clips teach it as well as large ones."""


def images(run: Run) -> None:
    """The autoencoder on single images: one temporal tap is trained, at a third of the cost."""
    torch.manual_seed(0)
    model = FSAE.from_preset("nano").to(memory_format=torch.channels_last_3d)
    start_small(model)
    inflate(model)
    loop = autoencoder_loop("images", run, OptimizerConfig(kind="muon", learning_rate=3e-4, matrix_learning_rate=4e-4))
    task = ClipTask(model, Weights(alone=0.5), run.held_out(1, LOW, 16))
    trained = train(task, run.worlds(0, IMAGES), loop, one_item).export("autoencoder")
    # Only the sum of the temporal taps was trained; a clip's latents are then those of its frames as images.
    inflate(trained)
    trained.save_pretrained(run.part("images", "autoencoder"))  # type: ignore[operator]


def seeing(run: Run) -> None:
    """The encoder learns to see motion: its comparison of frames by itself, every fourth frame of a clip."""
    encoder = run.autoencoder("images").encoder
    free_code(encoder)
    assert encoder.match is not None
    loop = autoencoder_loop("seeing", run, OptimizerConfig(learning_rate=3e-3, betas=(0.9, 0.98)))
    task = SeeingTask(encoder.match, encoder.outer_stages.cell, run.held_out(17, LOW, 16, every=4))
    encoder.match = train(task, run.worlds(40, LONG, every=4), loop, one_item).export("match")
    save_state(encoder.state_dict(), run.part("seeing", "encoder.safetensors"))


def following(run: Run) -> None:
    """The decoder learns to follow a motion that it is told, the encoder frozen; beside `seeing`."""
    model = run.autoencoder("images")
    read_code(model)
    loop = autoencoder_loop("following", run, OptimizerConfig(learning_rate=3e-4))
    task = ClipTask(model, Weights(told=1.0, code=0.0), run.held_out(17, LOW, 8), encoder="of pictures")
    trained = train(task, run.worlds(80, CROPS), loop, one_item).export("autoencoder")
    trained.save_pretrained(run.part("following", "autoencoder"))  # type: ignore[operator]


def together(run: Run) -> None:
    """Encoder and decoder on what the encoder itself makes of clips; nothing is told any more."""
    model = run.autoencoder("following")
    load_state(model.encoder, run.part("seeing", "encoder.safetensors"))
    loop = autoencoder_loop("together", run, OptimizerConfig(learning_rate=1.5e-4))
    perceptual = PerceptualLoss.from_files(*run.perceptual) if run.perceptual else None
    task = ClipTask(model, Weights(perceptual=0.1 if perceptual else 0.0), run.held_out(17, LOW, 8), perceptual)
    trained = train(task, run.worlds(120, CLIPS), loop, one_item).export("autoencoder")
    assert isinstance(trained, FSAE)
    mean, std = measure_latent_statistics(trained, Singles(run, 150), 3 if run.smoke else 60)
    trained.register_to_config(latents_mean=mean, latents_std=std)
    trained.save_pretrained(run.part("together", "autoencoder"))


def decoder(run: Run) -> None:
    """The decoder alone: latents stay what the transformers have learned."""
    model = run.autoencoder("together")
    loop = autoencoder_loop("decoder", run, OptimizerConfig(learning_rate=1.5e-4))
    perceptual = PerceptualLoss.from_files(*run.perceptual) if run.perceptual else None
    weights = Weights(perceptual=0.2 if perceptual else 0.0, code=0.0, alone=0.1)
    task = ClipTask(model, weights, run.held_out(17, LOW, 8), perceptual, encoder="frozen")
    trained = train(task, run.worlds(180, CLIPS), loop, one_item).export("autoencoder")
    trained.save_pretrained(run.part("decoder", "autoencoder"))  # type: ignore[operator]


# --- clips as latents ------------------------------------------------------------------------------------------------

BASE_SIZES = [
    (LOW, LOW, 420), (LOW, 192, 110), (192, LOW, 110), (192, 320, 60), (320, 192, 40), (256, 256, 80), (128, 256, 50),
    (256, 128, 50),
]  # fmt: skip
"""Height, width and number of the clips that the transformer learns from."""

PAIR_SIZES = [(HIGH, HIGH, 90), (HIGH, 384, 30), (384, HIGH, 30), (384, 640, 14), (512, 512, 12)]
"""Those of the clips that upsampler and refiner learn from, at the larger of both sizes."""


class SizedClips:
    """Clips of several sizes for `make_cache`, each size as often as it has clips; for a caption, what happens in each.

    Args:
        worlds: of each size, its clips and how many of them to take.
    """

    def __init__(self, worlds: Sequence[tuple[NanoClips, int]]) -> None:
        self.plans = [(clips, clips.plan(index)) for clips, count in worlds for index in range(count)]
        self.entries = [Entry(Media(Path(str(n))), told(plan)) for n, (_, plan) in enumerate(self.plans)]
        self.buckets: list[Bucket] = []
        for clips, count in worlds:
            first = sum(map(len, self.buckets))
            share = count / len(self.plans)
            self.buckets.append(Bucket(clips.frames, clips.size, None, share, first, [(1.0, list(range(count)))]))

    def entry(self, index: int) -> Entry:
        """What a clip is called, and what happens in it."""
        return self.entries[index]

    def read(self, index: int, epoch: int) -> tuple[NDArray[np.uint8], tuple[float, float]]:
        """A clip, uint8 `T H W 3`, the same in every epoch; it has no place in a file."""
        clips, plan = self.plans[index]
        return to_frames(clips.render(plan)).numpy(), (0.0, 0.0)


def told(plan: Plan) -> str:
    """What a caption is made of, as JSON."""
    return json.dumps({"motion": plan.motion.as_dict(), "sprite": plan.sprite.clause if plan.sprite else None})


class Recaptioned(CachedLatents):
    """What `cache` wrote, each clip told in new words in every epoch."""

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """One clip's latents, under the names that its training expects."""
        plan, rng = json.loads(self.samples[index].caption), np.random.default_rng((index, epoch))
        words = caption(rng, motion_from_dict(plan["motion"]), sprite=plan["sprite"])
        return {**super().sample(index, epoch), "caption": words}


def cache(run: Run) -> None:
    """Encode the clips of the transformer's and the refiner's training; `run.steps` is percent of them."""
    options = {"texture_probability": 0.1, "sprite_probability": 0.08}
    for kind, sizes, seed in (("clips", BASE_SIZES, 300), ("pairs", PAIR_SIZES, 400)):
        worlds = [
            (run.clips("train", FRAMES, (height, width), seed + i, **options), max(2, round(count * run.steps / 100)))
            for i, (height, width, count) in enumerate(sizes[:1] if run.smoke else sizes)
        ]
        config = CacheConfig(
            data="the nano world",
            output=str(run.folder / "latents" / kind),
            autoencoder=str(run.part("together", "autoencoder")),
            pairs=kind == "pairs",
            image_size=IMAGE_SIZE,
            shard_size=16,
            device=run.device,
        )
        make_cache(config, SizedClips(worlds))


# --- the models of latents -------------------------------------------------------------------------------------------


def latent_loop(stage: str, run: Run, batch_size: int, rate: float) -> LoopConfig:
    """The latents' stages differ in little."""
    return LoopConfig(
        output_dir=str(run.folder / stage),
        max_steps=run.steps,
        batch_size=batch_size,
        optimizer=OptimizerConfig(learning_rate=rate, weight_decay=0.01),
        schedule=ScheduleConfig("constant", warmup_steps=50),
        ema_decay=0.995,
        max_minutes=run.minutes,
        save_every=200,
    )


def base(run: Run) -> None:
    """The transformer and its encoders, from random weights or from those of a pipeline."""
    go_on: dict[str, Any] = {}
    if run.start is not None:
        go_on = {"model": str(run.start / "transformer"), "encoders": str(run.start), "train_encoders": True}
    config = TransformerConfig(
        data="the nano world",
        autoencoder=str(run.part("together", "autoencoder")),
        loop=latent_loop("base", run, batch_size=32, rate=6e-4),
        clips=ClipsConfig(FRAMES, LOW, LOW),
        flow=BASE_FLOW,
        **go_on,
    )
    train_transformer(config, Recaptioned(run.folder / "latents" / "clips"))


def upsampler(run: Run) -> None:
    """The latent upsampler, on latents alone."""
    config = UpsamplerConfig(
        data="the nano world",
        autoencoder=str(run.part("together", "autoencoder")),
        loop=latent_loop("upsampler", run, batch_size=8, rate=3e-4),
        clips=ClipsConfig(FRAMES),
        loss=UpsamplerLoss(latent=1.0, pixel=0.0, perceptual=0.0),
    )
    train_upsampler(config, Recaptioned(run.folder / "latents" / "pairs"))


def refiner(run: Run) -> None:
    """The refiner, from the base transformer, on drafts of the base's own one-step estimates."""
    config = RefinerConfig(
        data="the nano world",
        autoencoder=str(run.part("together", "autoencoder")),
        encoders=str(run.folder / "base"),
        model=str(run.part("base", "transformer")),
        base=str(run.part("base", "transformer")),
        base_flow=BASE_FLOW,
        upsampler=str(run.part("upsampler", "upsampler")),
        loop=latent_loop("refiner", run, batch_size=8, rate=3e-4),
        clips=ClipsConfig(FRAMES),
        flow=REFINER_FLOW,
    )
    train_refiner(config, Recaptioned(run.folder / "latents" / "pairs"))


def export(run: Run) -> None:
    """Write the pipeline in half precision, and what it knows; the decoder's last stage is taken if it was run."""
    from fsvideo_pipeline.pipeline import FSVideoPipeline
    from fsvideo_pipeline.settings import Settings

    stage = "decoder" if run.part("decoder", "autoencoder").is_dir() else "together"
    transformer = FSDiT.from_pretrained(run.part("base", "transformer"))
    text_encoder, image_encoder = load_encoders(run.folder / "base", transformer.config.text_len)
    pipeline = FSVideoPipeline(
        autoencoder=FSAE.from_pretrained(run.part(stage, "autoencoder")).half(),
        text_encoder=text_encoder.model.half(),
        tokenizer=text_encoder.tokenizer,
        image_encoder=image_encoder.model.half(),
        transformer=transformer.half(),
        upsampler=LatentUpsampler.from_pretrained(run.part("upsampler", "upsampler")).half(),
        refiner=FSDiT.from_pretrained(run.part("refiner", "refiner")).half(),
        mask=DynamicMask.from_pretrained(run.part("refiner", "dynamic_mask")),
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
    pipeline.save_pretrained(run.export)
    write_json(run.export / "abilities.json", knows())
    size = sum(file.stat().st_size for file in run.export.rglob("*") if file.is_file())
    print(f"wrote {run.export}, {size / 1e6:.1f} MB")


STAGES: dict[str, tuple[Callable[[Run], None], int]] = {
    "images": (images, 20_000),
    "seeing": (seeing, 2000),
    "following": (following, 10_000),
    "together": (together, 20_000),
    "cache": (cache, 100),
    "base": (base, 20_000),
    "upsampler": (upsampler, 4000),
    "refiner": (refiner, 6000),
    "decoder": (decoder, 20_000),
    "export": (export, 0),
}

SMOKE = {"cache": 1, "export": 0}
"""Updates of a smoke run where they are not two."""


def main() -> None:
    """Run one stage, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", default="all", choices=[*STAGES, "all"])
    parser.add_argument("--minutes", type=float, default=0.0, help="save and stop each stage after this time; 0: never")
    parser.add_argument("--steps", type=int, help="updates in all, if not the stage's own number (cache: percent)")
    parser.add_argument("--threads", type=int, help="processor cores to use; all if not given")
    parser.add_argument("--perceptual", nargs="*", default=[], help="files of LPIPS, for `together` and `decoder`")
    parser.add_argument("--folder", type=Path, help="where stages leave their parts; build/nano if not given")
    parser.add_argument("--export", type=Path, default=MODEL, help="where `export` writes the pipeline")
    parser.add_argument("--smoke", action="store_true", help="a few updates of every stage, on textures")
    parser.add_argument("--start", type=Path, help="a pipeline's folder that `base` goes on from")
    parser.add_argument("--device", default="cpu", help="where clips are made: cpu or cuda")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    folder = arguments.folder or ROOT / "build" / ("nano-smoke" if arguments.smoke else "nano")
    target = arguments.export
    if arguments.smoke:
        target = folder / "pipeline"
    for name in STAGES if arguments.stage == "all" else [arguments.stage]:
        stage, steps = STAGES[name]
        steps = SMOKE.get(name, 2) if arguments.smoke else arguments.steps or steps
        perceptual = tuple(arguments.perceptual)
        stage(
            Run(
                folder,
                steps,
                arguments.minutes,
                perceptual,
                target,
                arguments.smoke,
                arguments.device,
                arguments.start,
            )
        )


if __name__ == "__main__":
    main()
