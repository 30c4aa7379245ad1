"""Tries the paper's claim about Layer Memory (§2.3.1, Fig. 7) at nano size: does it lower the flow matching loss?

    python tools/nano/train.py cache                             # once: clips of the nano world as latents
    python tools/claims/transformer.py train all --minutes 90    # every run, resumable; or some of them by name
    python tools/claims/transformer.py report                    # docs/measured/layer-memory.{csv,png}

question                                     with memory      control        seeds
(a) training from scratch                    scratch-memory   scratch        3
(b) adapting a model trained without it      tuned-memory     tuned          3

A pair shares everything else: initial weights, clips, captions, order, noise, rates. In (b) both go on from the pair's
`scratch` run. The encoders are the shipped nano model's, frozen. A point of a curve is the loss on clips that no run
trains on, with noise and noise levels that never change.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nano"))

from captions import caption
from motion import motion_from_dict
from numpy.random import default_rng

from fsae.storage.checkpoint import save_state
from fsae.storage.files import atomic_path
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsae.training.loop import train
from fsdit.conditioning import Context, FlowBatch, load_encoders
from fsdit.conditioning.inputs import training_condition
from fsdit.flow.path import FlowSchedule
from fsdit.model import FSDiT
from fsdit.training.config import FlowMatchingConfig
from fsdit.training.task import FlowMatchingTask

ROOT = Path(__file__).resolve().parents[2]
CLIPS = ROOT / "build" / "nano" / "latents" / "clips-128x128"
BUILD = ROOT / "build" / "claims" / "layer-memory"
MEASURED = ROOT / "docs" / "measured"
ENCODERS = ROOT / "packages" / "fsvideo-pipeline" / "src" / "fsvideo_pipeline" / "models" / "nano"

SEEDS = (0, 1, 2)
LAYERS = 12  # deeper than the shipped model: memory is about depth
SCRATCH, TUNED = 800, 400  # updates
POINT = 100  # updates between two points of a curve
HELD_OUT = 100  # clips
LEVELS = 4  # noise levels that each of them is measured at
BATCH = 16
FLOW = FlowSchedule(shift=3.0)
SCRATCH_BIAS, TUNED_BIAS = 1.0, 7.0  # c of the routers' start


@dataclass(frozen=True)
class Run:
    """One training: with Layer Memory or without, from random weights or from another run's."""

    kind: str
    seed: int

    @property
    def name(self) -> str:
        """The run's folder."""
        return f"{self.kind}-{self.seed}"

    @property
    def memory(self) -> bool:
        """Whether it has Layer Memory."""
        return self.kind.endswith("memory")

    @property
    def start(self) -> Run | None:
        """The run whose weights it goes on from."""
        return Run("scratch", self.seed) if self.kind.startswith("tuned") else None

    @property
    def steps(self) -> int:
        """Updates in all."""
        return SCRATCH if self.start is None else TUNED


KINDS = ("scratch", "scratch-memory", "tuned", "tuned-memory")
RUNS = tuple(Run(kind, seed) for seed in SEEDS for kind in KINDS)
PAIRS = (("scratch", "scratch-memory", "(a) from scratch"), ("tuned", "tuned-memory", "(b) adapting"))


class Clips(Dataset[dict[str, Tensor]]):
    """Encoded clips with the embeddings of their captions and first frames, some of them."""

    def __init__(self, tensors: dict[str, Tensor], first: int, last: int) -> None:
        self.tensors, self.first, self.count = tensors, first, last - first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[self.first + index] for name, tensor in self.tensors.items()}


@torch.inference_mode()
def encoded_clips() -> dict[str, Tensor]:
    """Latents ``M C t h w``, text ``M L D`` and image ``M P D'`` embeddings of the nano world's clips; made once."""
    file = BUILD / "clips.safetensors"
    if file.is_file():
        return load_file(file)
    stored, plans = load_file(CLIPS.with_suffix(".safetensors")), json.loads(CLIPS.with_suffix(".json").read_text())
    words = [
        caption(default_rng((index, 0)), motion_from_dict(plan["motion"]), sprite=plan["sprite"])
        for index, plan in enumerate(plans)
    ]
    text_encoder, image_encoder = load_encoders(ENCODERS, 128)
    text = torch.cat([text_encoder.float()(words[i : i + 50]).embeddings for i in range(0, len(words), 50)])
    image = torch.cat([image_encoder.float()(part.float()) for part in stored["image"].split(50)])
    tensors = {"latents": stored["low"].float(), "text": text, "image": image}
    BUILD.mkdir(parents=True, exist_ok=True)
    save_state(tensors, file)
    return tensors


class VelocityTask(FlowMatchingTask):
    """The transformer's training (`fsdit.training.task`) on embeddings that are there already, none of them dropped."""

    def __init__(self, transformer: FSDiT) -> None:
        loop = LoopConfig(output_dir=str(BUILD))
        config = FlowMatchingConfig("the nano world", loop, autoencoder="none", encoders=str(ENCODERS), flow=FLOW)
        super().__init__(transformer, None, config)

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Pseudo-Huber loss of the velocity and its mean square error."""
        latents = batch["latents"]
        noise = torch.randn(latents.shape, generator=generator)
        sigma = FLOW.sample(len(latents), generator)
        clean = FlowBatch(latents, training_condition(latents), Context(batch["text"], batch["image"]))
        return self.velocity_loss(clean, noise, sigma)


def make_model(run: Run) -> FSDiT:
    """The run's model at its start. The routers draw no random numbers, so a pair begins alike."""
    if run.start is None:
        torch.manual_seed(run.seed)
        return FSDiT.from_preset("nano", num_layers=LAYERS, layer_memory=run.memory, memory_bias=SCRATCH_BIAS)
    begun = FSDiT.from_pretrained(BUILD / run.start.name / "transformer")
    if not run.memory:
        return begun
    model = FSDiT.from_preset("nano", num_layers=LAYERS, memory_bias=TUNED_BIAS)
    missing, unknown = model.load_state_dict(begun.state_dict(), strict=False)
    assert not unknown and all(".router." in name for name in missing)
    return model


@torch.inference_mode()
def held_out_loss(model: FSDiT, clips: Clips) -> dict[str, float]:
    """Means of loss and mean square error over the held-out clips, the same noise for every model."""
    model.eval()
    sums = {"loss": 0.0, "mse": 0.0}
    batches = list(_batches(clips, 25))
    for level in range(LEVELS):
        for number, batch in enumerate(batches):
            generator = torch.Generator().manual_seed(1000 * level + number)
            for name, value in VelocityTask(model).loss(batch, generator).items():
                sums[name] += value.item() / (LEVELS * len(batches))
    return sums


def _batches(clips: Clips, size: int) -> Iterator[dict[str, Tensor]]:
    for first in range(0, len(clips), size):
        items = [clips[i] for i in range(first, min(first + size, len(clips)))]
        yield {name: torch.stack([item[name] for item in items]) for name in items[0]}


def train_run(run: Run, tensors: dict[str, Tensor], deadline: float) -> bool:
    """Train a run to its end or to the deadline, a curve's point at a time; whether it came to its end."""
    curve = BUILD / run.name / "curve.json"
    points: list[dict[str, float]] = json.loads(curve.read_text()) if curve.is_file() else []
    total = len(tensors["latents"])
    clips, held_out = Clips(tensors, 0, total - HELD_OUT), Clips(tensors, total - HELD_OUT, total)
    model = make_model(run)
    if not points:
        points.append({"step": 0, **held_out_loss(model, held_out)})
    for steps in range(POINT, run.steps + 1, POINT):
        if any(point["step"] == steps for point in points):
            continue
        if time.monotonic() > deadline:
            return False
        loop = LoopConfig(
            output_dir=str(BUILD / run.name),
            max_steps=steps,
            batch_size=BATCH,
            optimizer=OptimizerConfig(learning_rate=6e-4, weight_decay=0.01),
            schedule=ScheduleConfig("constant", warmup_steps=50),
            ema_decay=0.0,
            seed=run.seed,
            save_every=0,
            keep_checkpoints=1,
            tensorboard=False,
        )
        result = train(VelocityTask(model), clips, loop)
        if result.step < steps:
            return False
        points.append({"step": steps, **held_out_loss(model, held_out)})
        print(run.name, json.dumps(points[-1]), flush=True)
        with atomic_path(curve) as path:
            path.write_text(json.dumps(points, indent=1))
    model.save_pretrained(BUILD / run.name / "transformer")
    return True


# --- the report ------------------------------------------------------------------------------------------------------


def curves() -> dict[str, list[dict[str, float]]]:
    """The points of every run there is."""
    files = {run.name: BUILD / run.name / "curve.json" for run in RUNS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def gaps(found: dict[str, list[dict[str, float]]], control: str, memory: str) -> dict[int, list[float]]:
    """Loss of the control minus loss with memory, a value a seed, by step; above 0 memory is better."""
    values: dict[int, list[float]] = {}
    for seed in SEEDS:
        pair = [{p["step"]: p["loss"] for p in found.get(f"{kind}-{seed}", [])} for kind in (control, memory)]
        for step in sorted(set(pair[0]) & set(pair[1])):
            values.setdefault(int(step), []).append(pair[0][step] - pair[1][step])
    return values


def draw(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """A column a question: every seed's curve, thin, with their mean, and below it the mean gap and its spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(PAIRS), figsize=(10, 6), layout="constrained", squeeze=False)
    for (upper, lower), (control, memory, title) in zip(axes.T, PAIRS, strict=True):
        for kind, colour, label in ((control, "tab:gray", "without"), (memory, "tab:blue", "with Layer Memory")):
            runs = [found[f"{kind}-{seed}"] for seed in SEEDS if f"{kind}-{seed}" in found]
            for points in runs:
                upper.plot([p["step"] for p in points], [p["loss"] for p in points], color=colour, lw=0.6, alpha=0.6)
            length = min((len(points) for points in runs), default=0)
            means = [statistics.mean(points[i]["loss"] for points in runs) for i in range(length)]
            upper.plot([p["step"] for p in runs[0][:length]] if runs else [], means, color=colour, lw=2, label=label)
        upper.set_title(f"{title}, {len(SEEDS)} seeds", fontsize=10)
        upper.set_ylabel("held-out loss")
        upper.legend(fontsize=8)
        apart = gaps(found, control, memory)
        spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in apart.values()]
        lower.axhline(0, color="black", lw=0.8)
        lower.errorbar(list(apart), [statistics.mean(v) for v in apart.values()], spreads, color="tab:blue", capsize=3)
        lower.set_xlabel("updates")
        lower.set_ylabel("loss without - with")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def report() -> None:
    """Write what is there to docs/measured and print the gaps."""
    found = curves()
    MEASURED.mkdir(parents=True, exist_ok=True)
    with atomic_path(MEASURED / "layer-memory.csv") as path, path.open("w", newline="") as target:
        table = csv.DictWriter(target, ["run", "step", "loss", "mse"])
        table.writeheader()
        for name, points in found.items():
            table.writerows({"run": name, **{k: f"{v:.6g}" for k, v in point.items()}} for point in points)
    draw(found, MEASURED / "layer-memory.png")
    for control, memory, title in PAIRS:
        for step, values in gaps(found, control, memory).items():
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            seeds = ", ".join(f"{value:+.5f}" for value in values)
            print(f"{title} after {step:4d}: gap {statistics.mean(values):+.5f} +- {spread:.5f} ({seeds})")
    print(f"torch {torch.__version__}; {MEASURED}")


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    trained = commands.add_parser("train", help="train some runs, one after another")
    trained.add_argument("runs", nargs="+", choices=["all", *[run.name for run in RUNS]])
    trained.add_argument("--minutes", type=float, default=1e9, help="begin no further point of a curve after this")
    commands.add_parser("report", help="write what was measured so far")
    arguments = parser.parse_args()
    if arguments.command == "report":
        report()
        return 0
    deadline, tensors = time.monotonic() + 60 * arguments.minutes, encoded_clips()
    for run in RUNS:
        if "all" in arguments.runs or run.name in arguments.runs:
            if run.start is not None and not (BUILD / run.start.name / "transformer").is_dir():
                raise SystemExit(f"{run.name} goes on from {run.start.name}, which is not trained yet")
            if not train_run(run, tensors, deadline):
                print(f"{run.name} is not finished; run again to go on", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
