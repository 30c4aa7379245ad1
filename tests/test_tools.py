"""The benchmarks and the trials of the paper's claims run from end to end at tiny sizes."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

TOOLS = Path(__file__).resolve().parents[1] / "tools"
WIDTHS = ["8", "16", "32", "32", "32", "32", "64"]


def tool(folder: str, name: str) -> ModuleType:
    """A tool as a module of its own name: folders have files of equal names."""
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", TOOLS / folder / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["standard", "lite"])
def test_folding_is_timed_against_the_same_numbers(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "deep" / "folding.json"
    arguments = ["folding", "--decoders", kind, "--size", "5", "256", "256", "--widths", *WIDTHS, "--rounds", "1"]
    bench = tool("bench", "autoencoder")
    ways: list[bool] = []
    set_folded = bench.set_folded
    bench.set_folded = lambda model, folded: (ways.append(folded), set_folded(model, folded))
    assert bench.main([*arguments, "--output", str(output)]) == 0
    assert ways == [True, False] * 2
    (row,) = json.loads(output.read_text())["rows"]
    assert row["saved_percent"] == pytest.approx(100 * (1 - row["folded_seconds"] / row["plain_seconds"]))
    # Two ways and not one: they round differently.
    assert 0 < row["largest_difference"] < 1e-3


def test_the_peak_of_streams_is_that_of_processes(tmp_path: Path) -> None:
    output = tmp_path / "streaming.json"
    arguments = ["streaming", "--frames", "1", "9", "--side", "64", "--widths", *WIDTHS, "--rounds", "1"]
    assert tool("bench", "autoencoder").main([*arguments, "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["size"] for row in rows] == ["1x64x64", "9x64x64"]
    assert rows[0]["times_the_first"] == 1.0
    assert rows[1]["times_the_first"] == pytest.approx(rows[1]["peak_mib"] / rows[0]["peak_mib"])
    assert rows[0]["peak_mib"] > 100  # torch alone takes more


@pytest.mark.slow
def test_claims_are_trained_continued_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    claims: Any = tool("claims", "autoencoder")
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (8, claims.FRAMES, 128, 128, 3), dtype=torch.uint8)
    weights = tmp_path / "lpips.pth"
    torch.save(random_alexnet(), weights)
    for name, value in {
        "BUILD": tmp_path / "build",
        "MEASURED": tmp_path / "measured",
        "POINT": 1,
        "SCRATCH": 1,
        "FINE": 2,
        "load": lambda: {"train": frames[:2], "held-out": frames},
        "perceptual_weights": lambda: weights,
    }.items():
        monkeypatch.setattr(claims, name, value)
    configuration = claims.configuration

    def logging_each_step(run: Any, steps: int) -> Any:
        config = configuration(run, steps)
        return replace(config, loop=replace(config.loop, log_every=1))

    monkeypatch.setattr(claims, "configuration", logging_each_step)
    runs = {run.name: run for run in claims.RUNS}
    assert claims.train_run(runs["standard"], float("inf"))
    assert not claims.train_run(runs["adversarial"], -1.0)  # no time is left
    assert claims.train_run(runs["adversarial"], float("inf"))
    found = claims.curves()
    assert {name: [point["step"] for point in points] for name, points in found.items()} == {
        "standard": [1],
        "adversarial": [1, 2],
    }
    assert claims.train_run(runs["adversarial"], float("inf"))  # nothing is left to do
    assert claims.curves() == found
    claims.report()
    lines = (tmp_path / "measured" / "autoencoder-claims.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["run", "standard", "adversarial", "adversarial"]
    assert Image.open(tmp_path / "measured" / "autoencoder-claims.png").width > 1000
    assert "opponent_logistic: first third" in capsys.readouterr().out


def random_alexnet() -> dict[str, torch.Tensor]:
    """LPIPS's AlexNet with drawn weights, as its file names them."""
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    state = {f"lin{n}.model.1.weight": torch.rand(1, shape[0], 1, 1) for n, shape in enumerate(shapes.values())}
    for index, (out, into, side) in shapes.items():
        state[f"features.{index}.weight"] = torch.randn(out, into, side, side) / (into * side * side) ** 0.5
        state[f"features.{index}.bias"] = torch.zeros(out)
    return state


def test_the_transformer_is_timed_against_the_same_weights(tmp_path: Path) -> None:
    bench = tool("bench", "transformer")
    size = ["--dim", "64", "--layers", "2", "--grid", "2", "4", "4", "--rounds", "1"]
    forward, sampling = tmp_path / "forward.json", tmp_path / "sampling.json"
    assert bench.main(["forward", *size, "--output", str(forward)]) == 0
    assert bench.main(["sampling", *size, "--steps", "3", "--output", str(sampling)]) == 0
    figures, run = json.loads(forward.read_text()), json.loads(sampling.read_text())
    assert figures["tokens"] == 8 and figures["largest_difference"] < 1e-4
    assert set(figures["forward_seconds"]) == {"diffusers", "without memory", "with memory"}
    assert all(seconds > 0 for seconds in figures["training_seconds"].values())
    assert run["relative_difference"] < 1e-4 and run["memory_to_diffusers"] > 0


def test_layer_memory_is_tried_against_its_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    claims = tool("claims", "transformer")
    plans = [{"kind": "still", "direction": 1, "sprite": None}] * 20
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(20, 128, 2, 1, 1, generator=generator).half()
    save_file({"low": low, "image": torch.rand(20, 3, 64, 64, generator=generator).half()}, tmp_path / "c.safetensors")
    (tmp_path / "c.json").write_text(json.dumps(plans))
    runs = tuple(claims.Run(kind, 0) for kind in claims.KINDS)
    patches = {"CLIPS": tmp_path / "c", "BUILD": tmp_path / "build", "MEASURED": tmp_path / "measured", "RUNS": runs}
    sizes = {"SEEDS": (0,), "LAYERS": 3, "SCRATCH": 2, "TUNED": 2, "POINT": 1, "HELD_OUT": 4, "BATCH": 4}
    for name, value in {**patches, **sizes}.items():
        monkeypatch.setattr(claims, name, value)
    starts = {run.name: claims.make_model(run) for run in runs[:2]}
    without, with_memory = (starts[run.name].state_dict() for run in runs[:2])
    assert all(torch.equal(with_memory[name], value) for name, value in without.items())
    assert {name for name in with_memory if name not in without} == {
        f"blocks.{i}.router.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }

    monkeypatch.setattr(sys, "argv", ["transformer.py", "train", "all"])
    assert claims.main() == 0
    curves = {run.name: json.loads((tmp_path / "build" / run.name / "curve.json").read_text()) for run in runs}
    assert all([point["step"] for point in points] == [0, 1, 2] for points in curves.values())
    # Adapting begins where the model without memory ended, exactly so without memory, nearly so with it.
    assert curves["tuned-0"][0]["loss"] == curves["scratch-0"][-1]["loss"]
    assert curves["tuned-memory-0"][0]["loss"] == pytest.approx(curves["scratch-0"][-1]["loss"], rel=1e-2)
    monkeypatch.setattr(sys, "argv", ["transformer.py", "report"])
    assert claims.main() == 0
    gap = curves["scratch-0"][2]["loss"] - curves["scratch-memory-0"][2]["loss"]
    assert f"(a) from scratch after    2: gap {gap:+.5f}" in capsys.readouterr().out
    assert Image.open(tmp_path / "measured" / "layer-memory.png").size[0] > 500
    assert len((tmp_path / "measured" / "layer-memory.csv").read_text().splitlines()) == 1 + 4 * 3
