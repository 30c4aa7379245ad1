"""Tries the paper's claims about FSAE (§2.2.2, §2.2.3) at nano size on real clips, each against its control.

    python tools/claims/real_clips.py                          # once: the clips
    python tools/claims/autoencoder.py train all --minutes 60  # every run, resumable; or some of them by name
    python tools/claims/autoencoder.py report                  # docs/measured/autoencoder-claims.{csv,png}

claim                                                                 run          control
first-frame injection raises PSNR                                     standard     no-injection
a non-causal decoder flickers less than a causal one                  standard     causal
the Video VF loss lowers the latents' intrinsic dimension             alignment    further
the adversarial stage is stable                                       adversarial  further

The first three runs start from the same seed and see the same clips in the same order; the last three go on from the
run `standard`, again alike in everything but the one thing tried. Held-out clips show other scenes.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from real_clips import ROOT, load

from fsae.data.config import ClipsConfig
from fsae.data.video import to_video_tensor
from fsae.evaluation.intrinsic_dimension import intrinsic_dimension, latent_points
from fsae.evaluation.metrics import flicker, psnr
from fsae.losses.perceptual import PerceptualLoss
from fsae.model import FSAE
from fsae.stages.config import AdversarialConfig, AlignmentConfig, AutoencoderConfig
from fsae.stages.start import prepared_model
from fsae.stages.task import AutoencoderTask, measure_latent_statistics
from fsae.storage.files import atomic_path
from fsae.training.config import LoopConfig, OptimizerConfig, ScheduleConfig
from fsae.training.loop import train

BUILD = ROOT / "build" / "claims"
MEASURED = ROOT / "docs" / "measured"
FRAMES = 9
HELD_OUT = 29  # clips that every point of a curve is measured on: every second one
SCRATCH, FINE = 375, 250  # updates
POINT = 125  # updates between two points of a curve

# LPIPS's AlexNet with real weights, by package name (BSD-2-Clause); its deepest features are the alignment's teacher.
LPIPS = ("stlpips-pytorch", "0.0.2", "stlpips_pytorch/weights/vST0.0/alex_shift_tolerant.pth")


@dataclass(frozen=True)
class Run:
    """One training: what it is, where it starts, and for how many updates."""

    name: str
    what: str
    changes: dict[str, Any]
    start: str | None = None

    @property
    def steps(self) -> int:
        """Updates in all."""
        return SCRATCH if self.start is None else FINE


RUNS = (
    Run("standard", "Standard decoder, injection", {}),
    Run("no-injection", "without injection", {"model_options": {"first_frame_injection": False}}),
    Run("causal", "causal decoder", {"model_options": {"decoder_kind": "causal"}}),
    Run("further", "goes on", {}, "standard"),
    Run("alignment", "goes on, with the VF loss", {"alignment": AlignmentConfig(teacher="lpips")}, "standard"),
    Run(
        "adversarial",
        "goes on, with the discriminator",
        {"adversarial": AdversarialConfig(0.1, width=16, optimizer=OptimizerConfig(1e-4, (0.5, 0.9)))},
        "standard",
    ),
)


class RealClips(torch.utils.data.Dataset[dict[str, Any]]):
    """FRAMES frames of a training clip, mirrored and reversed in every second epoch or so, as (index, epoch) says."""

    def __init__(self, clips: Tensor) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(index, 0)

    def sample(self, index: int, epoch: int) -> dict[str, Any]:
        """`video` 3 T H W in [-1, 1]."""
        draws = torch.randint(2**16, (3,), generator=torch.Generator().manual_seed(1000 * index + epoch)).tolist()
        clip = self.clips[index]
        first = draws[0] % (len(clip) - FRAMES + 1)
        video = to_video_tensor(clip[first : first + FRAMES])
        video = video.flip(3) if draws[1] % 2 else video
        return {"video": video.flip(1) if draws[2] % 2 else video}


def perceptual_weights() -> Path:
    """LPIPS's file, downloaded once."""
    name, version, file = LPIPS
    folder = BUILD / "lpips"
    if not (folder / file).is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, f"{name}=={version}"], check=True)
    return folder / file


def configuration(run: Run, steps: int) -> AutoencoderConfig:
    """The run's training up to `steps` updates."""
    loop = LoopConfig(
        output_dir=str(BUILD / run.name),
        max_steps=steps,
        optimizer=OptimizerConfig(learning_rate=1.5e-4),
        schedule=ScheduleConfig("constant", warmup_steps=50),
        ema_decay=0.99,
        mixed_precision="bf16",
        save_every=50,
        log_every=10,
    )
    config = AutoencoderConfig(
        data="real clips",
        loop=loop,
        model="nano" if run.start is None else str(BUILD / run.start / "autoencoder"),
        clips=ClipsConfig(FRAMES, 128, 128),
        perceptual_weights=[str(perceptual_weights())],
    )
    return replace(config, **run.changes)


@torch.inference_mode()
def measure(model: FSAE, clips: Tensor, lpips: PerceptualLoss) -> dict[str, float]:
    """Means over held-out clips `N T H W 3`; the intrinsic dimension of their latents, a point a position."""
    rows, latents = [], []
    for clip in clips:
        video = to_video_tensor(clip[:FRAMES]).unsqueeze(0)
        made = model(video).clamp(-1, 1)
        pair = (made, video)
        values = [psnr(*pair), psnr(made[:, :, :1], video[:, :, :1]), flicker(*pair), lpips(*pair)]
        rows.append(torch.stack([value.reshape(()) for value in values]))
        latents.append(model.encode(video)[0])
    figures = dict(zip(("psnr", "frame_0_psnr", "flicker", "lpips"), torch.stack(rows).mean(0).tolist(), strict=True))
    found = intrinsic_dimension(latent_points(latents).double(), (2, 4, 8, 16, 32))
    return figures | {f"dimension_{n}": d for n, d in zip(found.neighbours, found.dimension, strict=True)}


def train_run(run: Run, deadline: float) -> bool:
    """Train a run to its end or to the deadline, a curve's point at a time; whether it came to its end."""
    curve = BUILD / run.name / "curve.json"
    points: list[dict[str, float]] = json.loads(curve.read_text()) if curve.is_file() else []
    clips = load()
    held_out, lpips = clips["held-out"][::2][:HELD_OUT], PerceptualLoss.from_files(perceptual_weights())
    dataset = RealClips(clips["train"])
    for steps in range(POINT, run.steps + 1, POINT):
        if any(point["step"] == steps for point in points):
            continue
        if time.monotonic() > deadline:
            return False
        config = configuration(run, steps)
        torch.manual_seed(0)
        task = AutoencoderTask(config, prepared_model(config))
        result = train(task, dataset, config.loop)
        if result.step < steps:
            return False
        model = result.export("autoencoder")
        assert isinstance(model, FSAE)
        mean, std = measure_latent_statistics(model, dataset, 32)
        model.register_to_config(latents_mean=mean, latents_std=std)
        points.append({"step": steps, **measure(model, held_out, lpips)})
        print(run.name, json.dumps(points[-1]), flush=True)
        model.save_pretrained(BUILD / run.name / "autoencoder")
        with atomic_path(curve) as path:
            path.write_text(json.dumps(points, indent=1))
    return True


# --- the report ------------------------------------------------------------------------------------------------------


def curves() -> dict[str, list[dict[str, float]]]:
    """The points of every run there is."""
    files = {run.name: BUILD / run.name / "curve.json" for run in RUNS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def logged(run: str, tags: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """Scalars of a run's TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values: dict[str, list[tuple[int, float]]] = {tag: [] for tag in tags}
    for folder in sorted({file.parent for file in (BUILD / run).rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
        events.Reload()
        for tag in tags:
            if f"train/{tag}" in events.Tags()["scalars"]:
                values[tag] += [(event.step, event.value) for event in events.Scalars(f"train/{tag}")]
    return values


def draw(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """One panel a claim."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("PSNR, dB (higher is better)", "psnr", ("standard", "no-injection")),
        ("flicker (lower is better)", "flicker", ("standard", "causal")),
        ("intrinsic dimension, 8 neighbours", "dimension_8", ("further", "alignment")),
        ("LPIPS, adversarial stage", "lpips", ("further", "adversarial")),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), layout="constrained")
    for axis, (title, key, names) in zip(axes, panels, strict=True):
        for name in names:
            points = found.get(name, [])
            axis.plot([p["step"] for p in points], [p[key] for p in points], marker="o", markersize=3, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("updates")
        axis.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def report() -> None:
    """Write what is there to docs/measured."""
    found = curves()
    MEASURED.mkdir(parents=True, exist_ok=True)
    with atomic_path(MEASURED / "autoencoder-claims.csv") as path, path.open("w", newline="") as target:
        keys = ["step", *[key for key in next(iter(found.values()))[0] if key != "step"]]
        table = csv.DictWriter(target, ["run", *keys])
        table.writeheader()
        for name, points in found.items():
            table.writerows({"run": name, **{key: f"{point[key]:.5g}" for key in keys}} for point in points)
    draw(found, MEASURED / "autoencoder-claims.png")
    keys = ["psnr", "frame_0_psnr", "lpips", "flicker", "dimension_2", "dimension_8", "dimension_32"]
    print(f"{'run':14s}{'updates':>8s}" + "".join(f"{key:>14s}" for key in keys))
    for name, points in found.items():
        print(f"{name:14s}{points[-1]['step']:8d}" + "".join(f"{points[-1][key]:14.4f}" for key in keys))
    if "adversarial" in found:
        for tag, values in logged("adversarial", ["opponent_logistic", "opponent_r1", "adversarial"]).items():
            levels = [value for _, value in values]
            if levels:
                third = max(1, len(levels) // 3)
                ends = sum(levels[:third]) / third, sum(levels[-third:]) / third
                print(f"{tag}: first third {ends[0]:.3f}, last third {ends[1]:.3f}, largest {max(levels):.3f}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; {MEASURED}")


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
    deadline = time.monotonic() + 60 * arguments.minutes
    for run in RUNS:
        if "all" in arguments.runs or run.name in arguments.runs:
            if run.start is not None and not (BUILD / run.start / "autoencoder").is_dir():
                raise SystemExit(f"{run.name} goes on from {run.start}, which is not trained yet")
            if not train_run(run, deadline):
                print(f"{run.name} is not finished; run again to go on", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
