"""`fsdit convert`: its options reach the conversion, it says what it did, and checks before it works."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from fsdit import FSDiT
from fsdit.cli import main
from fsdit.wan.convert import WanImport, from_wan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan2.1-I2V transformer as diffusers saves it."""
    path = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=36,
        text_dim=24,
        freq_dim=32,
        ffn_dim=176,
        num_layers=2,
        image_dim=20,
        added_kv_proj_dim=64,
    ).save_pretrained(path)
    return path


def test_the_commands_help_needs_no_torch() -> None:
    code = "import sys; from fsdit.cli import main; sys.exit(main(['convert', '--help']) or 'torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert "--memory-gate" in shown.stdout


def test_command_converts_and_says_what_it_did(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plain"
    assert main(["convert", str(folder), "-o", str(output)]) == 0
    said = capsys.readouterr().out
    model, report = from_wan(folder)
    assert f"saved {output}" in said and str(report) in said
    counts = rf"carried over\s+{report.tensors('carried')}\s+{report.parameters('carried'):,}\n"
    assert re.search(counts, said)
    loaded = FSDiT.from_pretrained(output).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    for number, (flags, options) in enumerate(
        {
            ("--latents", "wan"): {"latents": "wan"},
            ("--latents", "wan", "--memory-bias", "1"): {"latents": "wan", "memory_bias": 1.0},
            ("--memory-gate", "--seed", "5"): {"memory_gate": True, "seed": 5},
            ("--no-layer-memory",): {"layer_memory": False},
            ("--dtype", "bf16"): {"dtype": torch.bfloat16},
        }.items()
    ):
        output = tmp_path / str(number)
        assert main(["convert", str(folder), "-o", str(output), *flags]) == 0
        stored = load_file(output / "diffusion_pytorch_model.safetensors")
        model, _ = from_wan(folder, WanImport(**options))
        state = model.state_dict()
        assert set(stored) == set(state)
        assert all(
            torch.equal(stored[name], tensor) and stored[name].dtype == tensor.dtype for name, tensor in state.items()
        )
        config = json.loads((output / "config.json").read_text())
        assert config["memory_bias"] == options.get("memory_bias", 7.0)


def test_command_checks_before_it_works(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    new = str(tmp_path / "new")

    def told(*arguments: str) -> str:
        assert main(["convert", *arguments]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    with monkeypatch.context() as patch:
        patch.setattr("fsdit.wan.convert.from_wan", None)
        assert "not empty" in told(str(folder), "-o", str(tmp_path / "full"))
        assert "no folder" in told(str(folder), "-o", str(tmp_path / "a" / "b"))
        assert "--no-layer-memory" in told(str(folder), "-o", new, "--no-layer-memory", "--memory-gate")
        assert "--no-layer-memory" in told(str(folder), "-o", new, "--no-layer-memory", "--memory-bias", "3")
        assert "--encoders" in told(str(folder), "-o", new, "--encoders", "--latents", "wan")
        assert "invalid choice" in told(str(folder), "-o", new, "--latents", "ltx")
    assert "no model folder" in told(str(tmp_path / "nowhere"), "-o", new)
    assert "finite" in told(str(folder), "-o", new, "--memory-bias", "nan")

    def full_disk(_: FSDiT, folder: str, **_options: Any) -> None:
        Path(folder, "config.json").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FSDiT, "save_pretrained", full_disk)
    assert "No space left" in told(str(folder), "-o", new)
    assert not Path(new).exists()
