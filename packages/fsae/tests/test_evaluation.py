"""The evaluation's figures against the metrics applied by hand, and its files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from fsae.data.config import Sampling
from fsae.data.datasets import VideoFolder
from fsae.data.video import write_video
from fsae.errors import UserError
from fsae.evaluation import evaluate as evaluation
from fsae.evaluation.charts import frame_grid, line_charts
from fsae.evaluation.evaluate import Clocks, EvalSettings, evaluate, peak_memory, strict, table
from fsae.evaluation.intrinsic_dimension import intrinsic_dimension, latent_points
from fsae.evaluation.metrics import (
    VideoFeatures,
    flicker,
    frame_flicker,
    frame_psnr,
    frame_ssim,
    frechet_distance,
    psnr,
    ssim,
)
from fsae.model import FSAE

TINY: dict[str, Any] = {
    "widths": (8,) * 3,
    "frame_matching": False,
    "encoder_depths": (1,) * 3,
    "decoder_depths": (1,) * 3,
    "residual_stages": 2,
}
SIZE: dict[str, Any] = {"frames": 5, "height": 16, "width": 20}


@pytest.fixture(scope="module")
def model() -> FSAE:
    torch.manual_seed(0)
    model = FSAE.from_preset("tiny", **TINY).eval()
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if ".injection." in name:  # which starts as nothing
                parameter += 0.3 * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three usable clips, a short one, and a file that is no video."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for name, frames in (("a", 9), ("b", 12), ("c", 5), ("short", 3)):
        write_video(folder / f"{name}.mp4", rng.integers(0, 255, (frames, 20, 24, 3), np.uint8), 8)
    (folder / "broken.mp4").write_text("no video")
    return folder


class Features(nn.Module):
    """Stands for I3D."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 4)

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        return self.mix(x.mean([2, 3, 4]))


@pytest.fixture(scope="module")
def i3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("i3d") / "i3d.pt"
    torch.jit.script(Features()).save(str(path))
    return path


def lpips_weights(folder: Path) -> tuple[str, str]:
    """An AlexNet trunk and heads of random numbers, in two files."""
    generator = torch.Generator().manual_seed(0)
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    trunk, heads = {}, {}
    for number, (index, (out, into, k)) in enumerate(shapes.items()):
        trunk[f"features.{index}.weight"] = torch.randn(out, into, k, k, generator=generator) / (into * k * k) ** 0.5
        trunk[f"features.{index}.bias"] = torch.zeros(out)
        heads[f"lin{number}.model.1.weight"] = torch.rand(1, out, 1, 1, generator=generator)
    save_file(trunk, folder / "trunk.safetensors")
    save_file(heads, folder / "heads.safetensors")
    return str(folder / "trunk.safetensors"), str(folder / "heads.safetensors")


@pytest.mark.filterwarnings("ignore:skipped")
def test_every_figure_is_the_metrics(tmp_path: Path, model: FSAE, clips: Path, i3d: Path) -> None:
    settings = EvalSettings(str(clips), **SIZE, batch_size=2, seed=3, fvd=str(i3d), memory=10**9)
    report = evaluate(model, settings, tmp_path / "out")
    data = VideoFolder(clips, Sampling(5, size=(16, 20)), seed=3)
    videos = [data.sample(index, 0)["video"] for index in (0, 1, 3)]
    video = torch.stack(videos)
    with torch.no_grad():
        latents = model.encode(video)
        decoded = model.decode(latents, video[:, :, :1]).clamp(-1, 1)
    near = {"rel": 1e-4, "abs": 1e-5}
    assert report["psnr"] == pytest.approx(psnr(decoded, video).mean().item(), **near)
    assert report["ssim"] == pytest.approx(ssim(decoded, video).mean().item(), **near)
    assert report["flicker"] == pytest.approx(flicker(decoded, video).mean().item(), **near)
    assert report["first_frame_psnr"] == pytest.approx(frame_psnr(decoded, video)[:, 0].mean().item(), **near)
    assert report["lpips"] is None and report["curves"]["lpips"] is None
    for name, metric in (("psnr", frame_psnr), ("ssim", frame_ssim), ("flicker", frame_flicker)):
        assert report["curves"][name] == pytest.approx(metric(decoded, video).mean(0).tolist(), **near)
    features = VideoFeatures(i3d)
    assert report["fvd"] == pytest.approx(frechet_distance(features(video), features(decoded)), rel=1e-3)
    found = intrinsic_dimension(latent_points(latents.unbind()), (2, 4, 8, 16, 32, 64))
    dimension = report["intrinsic_dimension"]
    assert (dimension["of"], dimension["points"], dimension["duplicates"]) == ("position", 3 * 2 * 20, 0)
    assert dimension["neighbours"] == [2, 4, 8, 16, 32, 64]
    np.testing.assert_allclose(dimension["dimension"], found.dimension, rtol=1e-3)
    assert [clip["file"] for clip in report["clips"]] == [str(clips / f"{name}.mp4") for name in "abc"]
    assert [clip["psnr"] for clip in report["clips"]] == pytest.approx(psnr(decoded, video).tolist(), **near)
    assert report["skipped"] == [str(clips / "broken.mp4"), str(clips / "short.mp4")]
    assert report["throughput"]["timed_frames"] == 5  # of the second batch
    assert report["throughput"]["decode_frames_per_second"] > 0 and report["peak_memory"]["bytes"] > 10**7
    assert report["settings"]["seed"] == 3 and report["versions"]["torch"] == torch.__version__
    # An untrained decoder is not the video, and an injected first frame is not left out.
    assert report["psnr"] < 25
    with torch.no_grad():
        without = model.decode(latents).clamp(-1, 1)
    assert abs(psnr(without, video).mean().item() - report["psnr"]) > 1e-3


@pytest.mark.filterwarnings("ignore:skipped")
def test_files_of_an_evaluation(tmp_path: Path, model: FSAE, clips: Path) -> None:
    weights = lpips_weights(tmp_path)
    settings = EvalSettings(str(clips), frames=5, height=64, width=64, samples=2, lpips=weights, dimension_of="clip")
    report = evaluate(model, settings, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "curves.png",
        "eval.json",
        "grid.png",
        "table.md",
    ]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not strict JSON")

    text = (tmp_path / "out" / "eval.json").read_text()
    assert json.loads(text, parse_constant=refuse) == report
    assert len(report["clips"]) == 2 and report["lpips"] > 0 and len(report["curves"]["lpips"]) == 5
    assert report["lpips"] == pytest.approx(np.mean([clip["lpips"] for clip in report["clips"]]))
    assert report["intrinsic_dimension"] is None  # two points have no two neighbours each
    written = (tmp_path / "out" / "table.md").read_text()
    assert f"| PSNR (dB) | {report['psnr']:.2f} |" in written and f"| LPIPS | {report['lpips']:.4f} |" in written
    assert "2 clip(s) of" in written and "| FVD | – |" in written
    grid = Image.open(tmp_path / "out" / "grid.png")
    assert grid.size == (5 * 64 + 4 * 2, 4 * (64 + 14 + 2))
    with Image.open(tmp_path / "out" / "curves.png") as curves:
        assert curves.size == (480, 4 * 220)


def test_samples_are_drawn_by_the_seed(clips: Path) -> None:
    def chosen(seed: int) -> list[str]:
        settings = EvalSettings(str(clips), **SIZE, samples=2, seed=seed)
        data = evaluation.HeldOutClips(settings.data, Sampling(5, size=(16, 20)), seed)
        return [Path(name).name for name, _ in data.usable(settings)]

    with pytest.warns(UserWarning, match="skipped"):
        drawn = {tuple(chosen(seed)) for seed in range(8)}
    assert len(drawn) > 2 and all(len(set(names)) == 2 for names in drawn)
    with pytest.warns(UserWarning, match="skipped"):
        assert chosen(5) == chosen(5)


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_perfect_autoencoder_and_single_frames_are_strict_json(
    tmp_path: Path, model: FSAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (20, 16), "white").save(tmp_path / "white.png")
    monkeypatch.setattr(model, "decode", lambda latents, first, memory=None: torch.ones(1, 3, 1, 16, 20))
    report = evaluate(model, EvalSettings(str(tmp_path), frames=1, height=16, width=20), tmp_path / "out")
    assert report["psnr"] == "inf" and report["curves"]["psnr"] == ["inf"] and report["flicker"] is None
    assert report["ssim"] == pytest.approx(1) and report["curves"]["flicker"] == []
    assert report == json.loads((tmp_path / "out" / "eval.json").read_text())
    assert "| PSNR (dB) | inf |" in (tmp_path / "out" / "table.md").read_text()


def test_strict_values() -> None:
    given = {"a": [math.inf, -math.inf, math.nan], "b": (1, 2.5, None, "x")}
    assert strict(given) == {"a": ["inf", "-inf", None], "b": [1, 2.5, None, "x"]}
    assert float(strict(math.inf)) == math.inf


def test_the_first_batch_warms_up() -> None:
    clocks = Clocks()
    clocks.add(10, 5.0, 2.0)
    assert clocks.report() == {
        "encode_frames_per_second": 2.0,
        "decode_frames_per_second": 5.0,
        "timed_frames": 10,
    }
    clocks.add(4, 1.0, 0.5)
    clocks.add(4, 1.0, 0.5)
    assert clocks.report() == {
        "encode_frames_per_second": 4.0,
        "decode_frames_per_second": 8.0,
        "timed_frames": 8,
    }


def test_peak_memory_sees_a_large_tensor() -> None:
    before = peak_memory(torch.device("cpu"))["bytes"]
    kept = torch.ones(40 * 2**20)
    assert peak_memory(torch.device("cpu"))["bytes"] >= before
    assert kept.nbytes / 2 < peak_memory(torch.device("cpu"))["bytes"] < 2**36


@pytest.mark.filterwarnings("ignore:skipped")
def test_bad_input_is_a_sentence_and_leaves_nothing(tmp_path: Path, model: FSAE, clips: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "data"
    broken.mkdir()
    (broken / "broken.mp4").write_text("no video")
    before = sorted(tmp_path.rglob("*"))
    good = {"data": str(clips), **SIZE}
    cases: list[tuple[dict[str, Any], str, str]] = [
        (good, "full", "is not empty; give a new folder"),
        (good, "file", "is a file; give a new folder"),
        (good, "none/out", r"^cannot write .*/none/out: there is no folder .*/none; create it first$"),
        (good | {"frames": 6}, "out", "6 frames cannot be encoded"),
        (good | {"height": 18}, "out", "cannot be encoded; accepted are multiples of 4"),
        (good | {"data": "none"}, "out", "neither a folder nor"),
        (good | {"data": str(broken)}, "out", "no clip of .* can be used; 1 file"),
        (good | {"lpips": ("none.pth",)}, "out", "none.pth does not exist"),
        (good | {"fvd": str(clips / "broken.mp4")}, "out", "cannot be read as TorchScript"),
        (good | {"memory": 1000}, "out", "memory is 1000 bytes"),
    ]
    for settings, folder, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            evaluate(model, EvalSettings(**settings), tmp_path / folder)
    with pytest.raises(UserError, match="batch_size is 0"):
        EvalSettings(**good, batch_size=0)
    with pytest.raises(UserError, match="seed is -1; it must be 0 or more"):
        EvalSettings(**good, seed=-1)
    assert sorted(tmp_path.rglob("*")) == before
    evaluate(model, EvalSettings(**good, samples=1), tmp_path / "empty")
    assert (tmp_path / "empty" / "eval.json").is_file()


def test_table_shows_what_was_not_measured_as_a_dash() -> None:
    report: dict[str, Any] = {
        **dict.fromkeys(("psnr", "first_frame_psnr", "ssim", "lpips", "fvd", "flicker", "intrinsic_dimension")),
        "throughput": {"encode_frames_per_second": 1.0, "decode_frames_per_second": 2.0, "timed_frames": 1},
        "peak_memory": {"of": "not measured on this system", "bytes": None},
        "settings": SIZE | {"data": "clips", "stride": 1},
        "clips": [],
        "skipped": ["x"],
        "model": {"decoder_kind": "lite"},
        "device": "cpu",
    }
    shown = table(report)
    assert shown.count("–") == 7 and "20x16x5" in shown and "1 file(s) skipped; lite decoder on cpu" in shown


def test_charts_draw_what_is_finite() -> None:
    rows = [("a", np.zeros((2, 4, 6, 3), np.uint8)), ("b", np.full((1, 4, 6, 3), 255, np.uint8))]
    sheet = np.asarray(frame_grid(rows))
    assert sheet.shape == (2 * (4 + 14 + 2), 2 * 6 + 2, 3)
    assert not sheet[14:18, :6].any() and (sheet[14:18, 6:8] == 255).all() and (sheet[34:38] == 255).all()
    flat, rising, broken = (
        np.asarray(line_charts([("x", values)])) for values in ([1.0, 1.0], [1.0, 2.0], [math.inf, math.nan])
    )
    assert flat.shape == (220, 480, 3)
    blue = [(picture == (31, 96, 180)).all(-1) for picture in (flat, rising, broken)]
    assert np.ptp(np.argwhere(blue[0])[:, 0]) < 8 and np.ptp(np.argwhere(blue[1])[:, 0]) > 150 and not blue[2].any()
