"""The benchmarks and the trials of the paper's claims run from end to end at tiny sizes."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fsdit.model import FSDiT

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


def test_a_start_on_many_clips_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bench = tool("bench", "data")
    bench.make(tmp_path / "list.csv", 3000)
    row = bench.start(tmp_path / "list.csv")
    assert row["buckets"] == 21 and 3000 < row["items"] < 9000 and len(row["keys"]) == 4
    assert row["peak_rss_gb"] > 0 and row["open_seconds"] > 0


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_layer_memory_is_tried_against_its_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    claims = tool("claims", "transformer")
    plans = [{"motion": {"kind": "still"}, "sprite": None}] * 20
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


def test_the_transformers_work_is_counted() -> None:
    gpu = tool("bench", "gpu")
    for tokens, teraflops, gigabytes in ((1860, 48.5, 15.6), (7440, 228, 62.4)):
        flops = gpu.forward_flops(gpu.FULL.model, tokens, gpu.FULL.image_tokens)
        assert sum(flops.values()) == pytest.approx(teraflops * 1e12, rel=0.01)
        assert flops["layer_memory"] < 1e-3 * sum(flops.values())
        assert gpu.memory_bytes(gpu.FULL.model, tokens) == pytest.approx(gigabytes * 1e9, rel=0.01)
    # And as torch counts what the blocks do.
    size, job = gpu.TINY, gpu.TINY.jobs["refiner"]
    for memory in (False, True):
        model = FSDiT(**size.model, layer_memory=memory).eval()
        noise, condition, context = gpu.random_inputs(size, job, model.config, torch.device("cpu"))
        velocity = gpu.GuidedVelocity(model, condition, context, job.guidance)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            velocity(noise, 500.0)  # what is computed once for a prompt
            with FlopCounterMode(display=False) as counter:
                velocity(noise, 500.0)
        seen = counter.get_flop_counts()
        blocks = sum(sum(seen[f"FSDiT.blocks.{index}"].values()) for index in range(size.model["num_layers"]))
        flops = gpu.forward_flops(size.model, job.tokens, size.image_tokens)
        assert blocks == sum(flops.values()) - (0 if memory else flops["layer_memory"])


def test_the_memory_kernels_spill_nothing_and_move_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    bench = tool("bench", "kernels")
    launches = {launch.name: launch for launch in bench.launches(bench.DIM, 16)}
    assert len(launches) == 5
    need = bench.compiled(launches["backward, l states"], 90)
    assert need.stack == 0 and 0 < need.registers <= 128 and need.threads == 512 and need.blocks == 1
    assert bench.blocks(255, 92160, 128, 228 * 1024) == 2  # by memory as by registers
    # Forwards read l states, H's input, and write Ĥ and H; the router's product takes five more, as float32.
    state, layers = 2 * 4096 * 64, 8
    rows = sum(count + 1 + 2 + 5 for count in range(2, layers + 1)) + 2
    for training in (False, True):
        forward, backward = bench.layers_of_memory(bench.fused, training, 4096, layers, 64)
        assert forward == pytest.approx(rows * state, rel=0.05)
        unfused = bench.layers_of_memory(bench.plain, training, 4096, layers, 64)
        assert unfused[0] > 4 * forward and unfused[1] >= 4 * backward


@pytest.mark.slow
def test_the_gpu_benchmark_runs_whole_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu, output = tool("bench", "gpu"), tmp_path / "deep" / "gpu.json"
    common = ["--tiny", "--device", "cpu", "--output", str(output)]
    assert gpu.main(common) == 0
    shown = capsys.readouterr().out
    (run,) = json.loads(output.read_text())["runs"]
    assert set(run["machine"]) >= {"card", "driver", "torch", "triton"} and "--tiny --device cpu" in run["command"]
    assert run["command"] in shown and "torch.compile by eager" in shown
    assert run["ceilings"]["copy_gbs"] > 0
    assert run["ceilings"]["matmul_tflops"] == max(
        rate for name, rate in run["ceilings"]["tflops"].items() if "attention" not in name
    )
    assert list(run["parts"]) == gpu.part_names(gpu.TINY)
    for name, part in run["parts"].items():
        if "graph" in name:
            assert "need an NVIDIA GPU" in part["unavailable"]
            continue
        off, plain, fused = part["rows"]
        assert "Triton" in fused["unavailable"]
        for row in (off, plain):
            assert min(row[key] for key in ("forward_seconds", "job_seconds", "tflops", "peak_bytes")) > 0
            assert row["finite"]
        share = 1 - off["forward_seconds"] / plain["forward_seconds"]
        assert plain["memory_share"] == pytest.approx(share) and off["memory_share"] == plain["from_plain"] == 0
        assert off["from_plain"] > 1e-3  # Layer Memory does something
        assert f"| {name} | plain | {plain['forward_seconds']:.4f} |" in shown
    jobs = [run["parts"][f"{job}-eager"]["rows"][1]["job_seconds"] for job in ("base", "refiner")]
    assert f"eager, plain: both transformers {sum(jobs):.3f} s (goal at most 10, paper 27.4" in shown

    def fails(*_: Any) -> None:
        raise RuntimeError("out of something\nand more")

    monkeypatch.setattr(gpu.Bench, "measure", fails)
    assert gpu.main([*common, "--parts", "base-eager"]) == 1
    monkeypatch.setattr(gpu.Bench, "measure", lambda *_: time.sleep(30))
    assert gpu.main([*common, "--parts", "refiner-eager", "--minutes", "0.002"]) == 1
    runs = json.loads(output.read_text())["runs"]
    assert runs[0] == run and runs[1]["parts"]["base-eager"]["failed"] == "RuntimeError: out of something"
    assert "stopped after 0.002 minutes" in runs[2]["parts"]["refiner-eager"]["failed"]
    capsys.readouterr()
    del common[0]  # the figures say themselves that they are tiny
    assert gpu.main([*common, "--table"]) == 1  # as the last call ended
    shown = capsys.readouterr().out
    assert "RuntimeError: out of something" in shown and "| refiner-compiled | plain |" in shown
    assert "in a base forward: 0.0" in shown
    assert len(json.loads(output.read_text())["runs"]) == 3


def test_a_benchmarks_weights_are_made_as_they_are_loaded() -> None:
    gpu = tool("bench", "gpu")
    bench = gpu.Bench(gpu.TINY, torch.device("cpu"))
    plain, off = bench._model("plain", False), bench._model("off", False)
    names = dict(plain.named_parameters())
    assert names["blocks.1.router.weight"].dtype == names["blocks.0.modulation"].dtype == torch.float32
    assert names["blocks.1.ffn.0.weight"].dtype == torch.bfloat16
    assert all(parameter.isfinite().all() and parameter.device.type == "cpu" for parameter in names.values())
    assert float(names["blocks.1.ffn.0.weight"].float().std()) == pytest.approx(64**-0.5, rel=0.1)
    for name, parameter in off.named_parameters():
        assert parameter.data_ptr() == names[name].data_ptr()  # one set of weights for all
    assert {block.memory_kernel for block in plain.blocks} == {"plain"} and not off.router_parameters()


def test_a_benchmark_refuses_parts_that_there_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu = tool("bench", "gpu")
    assert gpu.main(["--list"]) == 0
    assert "base-compiled-graph" in capsys.readouterr().out.split()
    for arguments, words in ((["--parts", "base"], "no part 'base'"), (["--table"], "measure first")):
        with pytest.raises(SystemExit):
            gpu.main([*arguments, "--output", str(tmp_path / "none.json")])
        assert words in capsys.readouterr().err


CONFIGS = TOOLS.parent / "packages" / "fsae" / "configs"
FITS = re.compile(r"^# fits: 80 GB, (\d+)x(\d+)x(\d+) takes ([\d.]+)$", re.MULTILINE)


def test_storages_are_counted_while_they_live() -> None:
    memory = tool("bench", "memory")
    with memory.Storages() as storages:
        x = torch.zeros(100, 10, requires_grad=True)
        y = (2 * x.view(-1)).exp()  # keeps what exp gave, not its input
        assert storages.now == 2 * 4000 and storages.peak == 3 * 4000
        y.sum().backward()
        del x, y
    assert storages.now == 0 and storages.largest == 1000


@pytest.mark.parametrize("stage", ["stage2", "lite"])
def test_a_step_is_counted_without_data(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    memory = tool("bench", "memory")
    memory.main([str(CONFIGS / f"{stage}.yaml"), "--size", "1", "64", "64", "--patch.above", "0"])
    found = json.loads(capsys.readouterr().out)
    weights = 4 * (1_021_000_000 if stage == "stage2" else 2_087_000_000)
    assert found["weights_gb"] == pytest.approx(weights / 1e9, rel=0.05)
    assert found["peak_gb"] > found["weights_gb"] + found["optimiser_and_average_gb"] / 3


@pytest.mark.slow
@pytest.mark.parametrize("file", [f for f in sorted(CONFIGS.glob("*.yaml")) if FITS.search(f.read_text())], ids=str)
def test_what_a_stages_file_says_to_fit_fits(file: Path) -> None:
    memory = tool("bench", "memory")
    said = FITS.findall(file.read_text())
    for *size, total in said:
        found = memory.count(memory.settings(file), tuple(map(int, size)), 1)
        assert found["peak_gb"] + found["optimiser_and_average_gb"] == pytest.approx(float(total), abs=0.1)
        assert float(total) < 80 and found["largest_tensor"] <= 1
