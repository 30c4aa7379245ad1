"""What an autoencoder does to held-out clips, in figures (paper §2.2.3, Tables 1 and 2).

`evaluate` reconstructs clips, the first frame given as it is in use, and writes a folder:

    eval.json    every figure below, each clip's own, the settings and versions
    table.md     the figures as a Markdown table
    grid.png     frames of some clips over their reconstructions
    curves.png   PSNR, SSIM, LPIPS and flicker over the frames

Each figure is the mean over the clips, of the reconstruction clamped to [-1, 1] and not rounded; a clip's PSNR is that
of its mean squared error, its SSIM, LPIPS and flicker are means over its frames. The JSON is strict: an infinite PSNR
(no error at all) is the string "inf", and what was not measured or has no value is null.
"""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fsae.bounds import Checked, Count, Index
from fsae.data.config import Sampling
from fsae.data.datasets import VideoFolder
from fsae.data.video import to_frames
from fsae.errors import UserError
from fsae.evaluation.charts import frame_grid, line_charts
from fsae.evaluation.intrinsic_dimension import NEIGHBOURS, intrinsic_dimension, latent_points
from fsae.evaluation.metrics import (
    VideoFeatures,
    frame_flicker,
    frame_lpips,
    frame_psnr,
    frame_ssim,
    frechet_distance,
    psnr,
)
from fsae.losses.perceptual import PerceptualLoss
from fsae.model import FSAE
from fsae.storage.files import atomic_folder, check_new_folder, write_json

_SHOWN_CLIPS, _SHOWN_FRAMES = 4, 6
_DISTANCES = 10_000  # points whose N^2 distances are taken for the intrinsic dimension
_PACKAGES = ("fsae", "torch", "diffusers", "numpy", "av")


@dataclass(frozen=True)
class EvalSettings(Checked):
    """What is measured.

    Attributes:
        data: Source of the clips, see `fsae.data.sources.read_source`.
        frames: Frames of a clip, one more than a multiple of the model's temporal compression; with 1, images are
            clips too.
        height: Rows of pixels; frames are scaled to cover the size and cropped to it.
        width: Columns of pixels. Both are multiples of the model's spatial compression.
        stride: Take every stride-th frame of the file.
        samples: How many clips, drawn by the seed; None for one of every file.
        batch_size: Clips that are encoded and decoded together.
        seed: Decides which files, and where in them clips start; 0 or more.
        lpips: Files with the perceptual network's trunk and heads; none leaves LPIPS out.
        fvd: I3D as TorchScript; None leaves FVD out.
        memory: Bytes that the activations of encoding and decoding may take; None for no bound.
        dimension_of: What a point of the intrinsic dimension is: a latent "position", or a whole "clip".
    """

    data: str
    frames: int = 17
    height: int = 256
    width: int = 256
    stride: Count = 1
    samples: Count | None = None
    batch_size: Count = 1
    seed: Index = 0
    lpips: tuple[str, ...] = ()
    fvd: str | None = None
    memory: int | None = None
    dimension_of: Literal["position", "clip"] = "position"


class HeldOutClips(VideoFolder):
    """One clip of every file. A file that cannot be used is left out, not replaced: no clip counts twice."""

    def _replacements(self, index: int) -> Sequence[int]:
        return (index,)

    def usable(self, settings: EvalSettings) -> Iterator[tuple[str, Tensor]]:
        """(file, clip `3 T H W`) of up to as many files as asked for."""
        order: Sequence[int] = range(len(self))
        if settings.samples is not None:
            order = np.random.default_rng(settings.seed).permutation(len(self)).tolist()
        given = 0
        for index in order:
            if given == settings.samples:
                return
            try:
                clip = self.sample(index, 0)["video"]
            except UserError:  # named by a warning, and in `skipped`
                continue
            given += 1
            yield str(self.entries[index].media), clip


@dataclass
class Clocks:
    """Seconds and frames of encoding and decoding; the first batch, which also warms up, counts only if it is alone."""

    batches: int = 0
    frames: int = 0
    encode: float = 0.0
    decode: float = 0.0

    def add(self, frames: int, encode: float, decode: float) -> None:
        self.batches += 1
        if self.batches == 2:
            self.frames, self.encode, self.decode = 0, 0.0, 0.0
        self.frames, self.encode, self.decode = self.frames + frames, self.encode + encode, self.decode + decode

    def report(self) -> dict[str, float]:
        return {
            "encode_frames_per_second": self.frames / self.encode,
            "decode_frames_per_second": self.frames / self.decode,
            "timed_frames": self.frames,
        }


@dataclass
class Gathered:
    """What is kept of all clips: some numbers each, the latents, and a few pictures."""

    clips: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    latents: list[Tensor] = field(default_factory=list)
    features: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    rows: list[tuple[str, NDArray[np.uint8]]] = field(default_factory=list)
    clocks: Clocks = field(default_factory=Clocks)


class Evaluation:
    """The measuring of one model with one set of settings; the networks it measures with are read first. UserError for
    settings that the model or the networks' files do not fit, before any clip is read."""

    def __init__(self, model: FSAE, settings: EvalSettings) -> None:
        model.compression.check(settings.frames, settings.height, settings.width)
        self.model, self.settings = model.eval(), settings
        sampling = Sampling(settings.frames, None, settings.stride, (settings.height, settings.width))
        self.data = HeldOutClips(settings.data, sampling, settings.seed)
        self.lpips = PerceptualLoss.from_files(*settings.lpips).to(model.device) if settings.lpips else None
        self.i3d = VideoFeatures(settings.fvd, model.device) if settings.fvd else None

    def run(self) -> tuple[dict[str, Any], Gathered]:
        """The report on all clips (not yet strict JSON), and what its pictures are made of; UserError if no clip can be
        used."""
        gathered = Gathered()
        cuda = self.model.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.model.device)
        total = min(len(self.data), self.settings.samples or len(self.data))
        with tqdm(total=total, desc="evaluating", unit="clip") as bar:
            for names, video in self._batches():
                self._measure(names, video, gathered)
                bar.update(len(names))
        if not gathered.clips:
            raise UserError(f"no clip of {self.settings.data} can be used; {self.data.summary()}")
        return self._report(gathered), gathered

    def _batches(self) -> Iterator[tuple[list[str], Tensor]]:
        names: list[str] = []
        clips: list[Tensor] = []
        for name, clip in self.data.usable(self.settings):
            names.append(name)
            clips.append(clip)
            if len(clips) == self.settings.batch_size:
                yield names, torch.stack(clips)
                names, clips = [], []
        if clips:
            yield names, torch.stack(clips)

    @torch.no_grad()
    def _measure(self, names: list[str], video: Tensor, gathered: Gathered) -> None:
        video = video.to(self.model.device, self.model.dtype)
        latents, encode = _timed(lambda: self.model.encode(video, memory=self.settings.memory))
        first = video[:, :, :1] if self.model.config.first_frame_injection else None
        decoded, decode = _timed(lambda: self.model.decode(latents, first, memory=self.settings.memory))
        gathered.clocks.add(video.shape[0] * video.shape[2], encode, decode)
        gathered.latents += latents.float().cpu().unbind()
        decoded = decoded.clamp(-1, 1)
        curves = {
            "psnr": frame_psnr(decoded, video),
            "ssim": frame_ssim(decoded, video),
            "lpips": None if self.lpips is None else frame_lpips(self.lpips, decoded, video),
            "flicker": frame_flicker(decoded, video),
        }
        for name, curve in curves.items():
            gathered.curves.setdefault(name, []).extend([] if curve is None else curve.tolist())
        whole = psnr(decoded, video).tolist()
        means = {name: None if curve is None else curve.mean(1).tolist() for name, curve in curves.items()}
        for b, name in enumerate(names):
            own = {measure: values and values[b] for measure, values in means.items()}
            gathered.clips.append(
                {"file": name, **own, "psnr": whole[b], "first_frame_psnr": float(curves["psnr"][b, 0])}  # type: ignore[index]
            )
            if len(gathered.rows) < 2 * _SHOWN_CLIPS:
                gathered.rows += _shown(name, video[b], decoded[b])
        if self.i3d is not None:
            gathered.features[0].append(self.i3d(video))
            gathered.features[1].append(self.i3d(decoded))

    def _report(self, gathered: Gathered) -> dict[str, Any]:
        model, fvd = self.model, None
        if self.i3d is not None:
            fvd = frechet_distance(*(torch.cat(features) for features in gathered.features))
        return {
            **{name: _mean([clip[name] for clip in gathered.clips]) for name in gathered.clips[0] if name != "file"},
            "fvd": fvd,
            "intrinsic_dimension": self._dimension(gathered.latents),
            "throughput": gathered.clocks.report(),
            "peak_memory": peak_memory(model.device),
            "curves": {
                name: [_mean(values) for values in zip(*rows, strict=True)] if rows else None
                for name, rows in gathered.curves.items()
            },
            "clips": gathered.clips,
            "skipped": [str(media) for media in self.data.skipped],
            "settings": asdict(self.settings),
            "model": {
                "folder": str(model.config.get("_name_or_path") or ""),
                "decoder_kind": model.config.decoder_kind,
                "parameters": sum(p.numel() for p in model.parameters()),
                "dtype": str(model.dtype).removeprefix("torch."),
            },
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
            "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        }

    def _dimension(self, latents: list[Tensor]) -> dict[str, Any] | None:
        """Of as many scales as there are points for; None if there are not enough for one."""
        points = latent_points(latents, self.settings.dimension_of)
        if len(points) > _DISTANCES:
            generator = torch.Generator().manual_seed(self.settings.seed)
            points = points[torch.randperm(len(points), generator=generator)[:_DISTANCES]]
        distinct = len(torch.unique(points, dim=0))
        scales = [n2 for n2 in NEIGHBOURS if n2 < distinct]
        if not scales:
            return None
        found = intrinsic_dimension(points, scales)
        return {"of": self.settings.dimension_of, **asdict(found)}


def evaluate(model: FSAE, settings: EvalSettings, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Measure a model, write `folder`, which appears whole, and return what its eval.json holds.

    Raises:
        UserError: `folder` is not empty or cannot be written, or as `Evaluation`.
    """
    check_new_folder(folder)
    report, gathered = Evaluation(model, settings).run()
    report = strict(report)
    charts = [
        (name, [math.nan if v is None else float(v) for v in curve])
        for name, curve in report["curves"].items()
        if curve
    ]
    try:
        with atomic_folder(folder) as temporary:
            write_json(temporary / "eval.json", report, allow_nan=False)
            (temporary / "table.md").write_text(table(report), encoding="utf-8")
            frame_grid(gathered.rows).save(temporary / "grid.png")
            line_charts(charts).save(temporary / "curves.png")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; give another place") from error
    return report


def table(report: dict[str, Any]) -> str:
    """The figures of a report as a Markdown table, and what they were measured on."""
    throughput, memory, dimension = (report[name] for name in ("throughput", "peak_memory", "intrinsic_dimension"))
    rows = [
        ("PSNR (dB)", report["psnr"], ".2f"),
        ("PSNR of frame 0 (dB)", report["first_frame_psnr"], ".2f"),
        ("SSIM", report["ssim"], ".4f"),
        ("LPIPS", report["lpips"], ".4f"),
        ("FVD", report["fvd"], ".2f"),
        ("flicker", report["flicker"], ".5f"),
        ("encoding (frames/s)", throughput["encode_frames_per_second"], ".2f"),
        ("decoding (frames/s)", throughput["decode_frames_per_second"], ".2f"),
        (f"peak memory (GiB), {memory['of']}", memory["bytes"] and memory["bytes"] / 2**30, ".2f"),
    ]
    if dimension is not None:
        scales = zip(dimension["neighbours"], dimension["dimension"], strict=True)
        rows += [(f"intrinsic dimension, {n2} neighbours", value, ".2f") for n2, value in scales]
    lines = ["| measure | value |", "|---|---|"]
    lines += [f"| {name} | {'–' if value is None else format(float(value), form)} |" for name, value, form in rows]
    settings = report["settings"]
    size = f"{settings['width']}x{settings['height']}x{settings['frames']}"
    skipped = len(report["skipped"])
    lines += [
        "",
        f"{len(report['clips'])} clip(s) of {settings['data']}, {size}, stride {settings['stride']}; "
        f"{skipped} file(s) skipped; {report['model']['decoder_kind']} decoder on {report['device']}.",
    ]
    return "\n".join(lines) + "\n"


def strict(value: Any) -> Any:
    """A report that strict JSON can hold: infinite numbers as the strings "inf" and "-inf", undefined ones as null."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def peak_memory(device: torch.device) -> dict[str, Any]:
    """Bytes that were taken at most since the process, or on CUDA the evaluation, began, and what they are of."""
    if device.type == "cuda":
        return {"of": "CUDA memory allocated", "bytes": torch.cuda.max_memory_allocated(device)}
    try:
        import resource
    except ImportError:  # Windows
        return {"of": "not measured on this system", "bytes": None}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"of": "the process's resident size", "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _timed(work: Any) -> tuple[Tensor, float]:
    """A computation's result and the seconds until the device has finished it."""
    began = time.perf_counter()
    result: Tensor = work()
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return result, time.perf_counter() - began


def _shown(name: str, video: Tensor, decoded: Tensor) -> list[tuple[str, NDArray[np.uint8]]]:
    """Two rows of a grid: frames of a clip, evenly spaced, and of its reconstruction."""
    count = min(_SHOWN_FRAMES, video.shape[1])
    places = torch.linspace(0, video.shape[1] - 1, count).round().long().to(video.device)
    short = Path(name).name
    return [
        (f"{short}, frames {', '.join(map(str, places.tolist()))}", to_frames(video[:, places]).numpy()),
        (f"{short}, reconstructed", to_frames(decoded[:, places]).numpy()),
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
