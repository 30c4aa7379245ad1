"""The command line: help without torch, files and flags, sentences instead of tracebacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fsdit.flow.path import FlowSchedule
from fsupsampler.cli import main
from fsupsampler.training.config import MaskConfig, RefinerConfig, RegularizationConfig, UpsamplerConfig, UpsamplerLoss

UPSAMPLER = ["train", "upsampler", "--data", "d", "--autoencoder", "nowhere"]
REFINER = ["train", "refiner", *UPSAMPLER[2:], "--upsampler", "u", "--encoders", "e"]


def test_help_needs_no_torch() -> None:
    code = """
import sys
from fsupsampler.cli import main
for command in ([], ["train"], ["train", "upsampler"], ["train", "refiner"]):
    assert main([*command, "--help"]) == 0
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for flag in (
        "--loss.pixel",
        "--mask.inverted",
        "--regularization.dropout",
        "--base_flow.shift",
        "--flow.shift",
    ):
        assert flag in done.stdout
    assert "--train_encoders" not in done.stdout


def capture(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path) -> list[Any]:
    seen: list[Any] = []
    function = f"fsupsampler.training.{name}.train_{name}"
    monkeypatch.setattr(function, lambda config: seen.append(config) or [folder])
    return seen


def test_upsampler_flags_override_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = capture(monkeypatch, "upsampler", tmp_path / "upsampler")
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: d\nautoencoder: ae\nloss: {latent: 0.5, pixel: 0.0}\nloop: {output_dir: out, max_steps: 5}\n"
    )
    argv = ["train", "upsampler", "--config", str(file), "--loop.max_steps", "9", "--loss.perceptual", "0.2"]
    assert main(argv) == 0
    assert f"saved {tmp_path / 'upsampler'}" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")  # another process of the run
    assert main(argv) == 0 and capsys.readouterr().out == ""
    got, _ = seen
    assert isinstance(got, UpsamplerConfig)
    assert got.loss == UpsamplerLoss(0.5, 0.0, 0.2) and got.loop.max_steps == 9 and got.autoencoder == "ae"


def test_refiner_flags_override_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = capture(monkeypatch, "refiner", tmp_path / "refiner")
    flags = [
        "--mask.low",
        "0.2",
        "--regularization.shuffle_ratios",
        "[1,2,3]",
        "--flow.std",
        "2",
        "--base",
        "b",
    ]
    assert main([*REFINER, "--loop.output_dir", "out", *flags]) == 0
    (got,) = seen
    assert isinstance(got, RefinerConfig)
    assert got.mask == MaskConfig(low=0.2) and got.flow == FlowSchedule(shift=8.0, std=2.0)
    assert got.regularization == RegularizationConfig(shuffle_ratios=(1.0, 2.0, 3.0))
    assert (got.base, got.encoders, got.upsampler, got.validation_steps) == ("b", "e", "u", 8)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([*UPSAMPLER, "--loop.output_dir", "out"], "there is no model folder nowhere"),
        ([*REFINER, "--loop.output_dir", "out"], "there is no model folder nowhere"),
        ([*UPSAMPLER, "--loop.output_dir", "out", "--loss.latent", "-1"], "loss.latent is -1.0"),
        ([*REFINER[:-1], "nano", "--loop.output_dir", "out"], "give encoders as their folder"),
        ([*REFINER, "--loop.output_dir", "out", "--mask.decay", "1.5"], "mask.decay is 1.5"),
        (UPSAMPLER, "output_dir"),
        (["train", "refinery"], "invalid choice"),
    ],
)
def test_errors_are_sentences(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error


def test_print_config_shows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*REFINER, "--loop.output_dir", "out", "--print_config"]) == 0
    text = capsys.readouterr().out
    for key in ("replacement_fraction: 0.3", "scalar: false", "shift: 8.0", "validation_guidance: 1.0"):
        assert key in text
