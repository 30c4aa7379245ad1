"""What README.md, docs/training.md and the packages' pages tell a reader to type is typed here."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from PIL import Image

from fsae import FSAE
from fsae.data.video import write_video

ROOT = Path(__file__).resolve().parents[1]

# Later flags win: the commands stay the page's, their size becomes a test's.
SMALL = ["--loop.max_steps", "1", "--loop.batch_size", "1", "--frames", "5"]


def fenced(page: str, language: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    """Run one of the project's commands as this environment's script."""
    script = Path(sys.executable).with_name(command[0])
    done = subprocess.run([str(script), *command[1:]], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def size_and_frames(path: Path) -> tuple[int, int, int]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return frames[0].width, frames[0].height, len(frames)


def make_clips(folder: Path, frames: int = 9) -> None:
    """Two short videos, their list, and a photo."""
    rng = np.random.default_rng(0)
    (folder / "clips").mkdir()
    lines = []
    for index in range(2):
        picture = np.asarray(Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((320, 320)))
        shown = [np.ascontiguousarray(picture[:256, t : t + 256]) for t in range(frames)]
        write_video(folder / "clips" / f"{index}.mp4", shown, 16.0, None)
        lines.append(json.dumps({"path": f"clips/{index}.mp4", "caption": "the camera pans right"}))
    (folder / "clips.jsonl").write_text("\n".join(lines) + "\n")
    Image.fromarray(picture).save(folder / "photo.jpg")


def as_readme_installs(folder: Path) -> dict[str, str]:
    """An environment for commands that finds what the README's line installs and none of the packages' extras."""
    folder.mkdir()
    hidden = "".join(f"sys.modules[{name!r}] = None\n" for name in ("tensorboard", "deepspeed", "decord", "triton"))
    (folder / "sitecustomize.py").write_text(f"import sys\n\n{hidden}")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    look = "import importlib.util; assert importlib.util.find_spec('tensorboard') is None"
    subprocess.run([sys.executable, "-c", look], env=environment, check=True)
    return environment


@pytest.mark.slow
def test_the_training_page_from_clips_to_a_video(tmp_path: Path) -> None:
    make_clips(tmp_path)
    environment = as_readme_installs(tmp_path / "site")
    *training, generating = [
        shlex.split(line) for block in fenced("docs/training.md", "sh") for line in block.splitlines()
    ]
    assert [c[0] for c in training] == ["fsae", "fsae", "fsdit", "fsupsampler", "fsupsampler"]
    for command in training:
        side = "128" if command[0] == "fsupsampler" else "64"
        frames = ["--frames", "1"] if "runs/images" in command else []
        run([*command, *SMALL, *frames, "--height", side, "--width", side], tmp_path, environment)
    (program,) = fenced("docs/training.md", "python")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    run([*generating, "--frames", "5", "--steps", "1", "--size", "128x128"], tmp_path, environment)
    assert size_and_frames(tmp_path / "out.mp4") == (128, 128, 5)


def test_the_readmes_first_command_makes_a_video(tmp_path: Path) -> None:
    first, second = (block.strip() for block in fenced("README.md", "sh")[:2])
    install, generate = first.split("&&")
    assert install.split()[:4] == ["python", "-m", "pip", "install"]
    command = shlex.split(generate)
    assert command[:2] == ["fsvideo", "generate"]
    photo = ROOT / command[2]
    assert photo.is_file()
    output = run(["fsvideo", "generate", str(photo), *command[3:]], tmp_path)
    made = tmp_path / command[command.index("-o") + 1]
    assert made.name in output
    width, height, frames = size_and_frames(made)
    # The photo is 4:3; its short side becomes the model's.
    assert (width, height, frames) == (342, 256, 33)
    assert second == "python -m pip install -c constraints.txt -r requirements-test.txt && python -m pytest"


def test_the_readmes_program_runs() -> None:
    (program,) = fenced("README.md", "python")
    assert "autoencoder.decode" in program
    check = "\nassert latents.shape == (1, 128, 5, 2, 2) and again.shape == video.shape\n"
    subprocess.run([sys.executable, "-c", program + check], check=True)


AUTOENCODER_PAGE = "packages/fsae/README.md"


def test_the_autoencoders_program_runs() -> None:
    (program,) = fenced(AUTOENCODER_PAGE, "python")
    assert program.count("\n    assert torch.allclose") == 3
    check = "\nassert latents.shape == (1, 128, 5, 3, 2) and len(pieces) == 5\n"
    subprocess.run([sys.executable, "-c", program + check], check=True)


@pytest.mark.slow
def test_the_autoencoders_commands_run(tmp_path: Path) -> None:
    make_clips(tmp_path)
    (tmp_path / "clips").rename(tmp_path / "held-out")
    (tmp_path / "held-out" / "0.mp4").rename(tmp_path / "clip.mp4")
    torch.manual_seed(0)
    FSAE.from_preset("nano").save_pretrained(tmp_path / "autoencoder")
    # DC-AE's architecture, every width a sixteenth.
    widths = [8, 16, 32, 32, 64, 64]
    kinds = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
    scales: list[list[int]] = [[], [], [], [5], [5], [5]]
    AutoencoderDC(
        latent_channels=32,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=[1] * 6,
        decoder_layers_per_block=[1] * 6,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        attention_head_dim=8,
    ).save_pretrained(tmp_path / "dc-ae-f32c32-sana-1.1")
    shown = {}
    for line in fenced(AUTOENCODER_PAGE, "sh")[1].splitlines():
        command = shlex.split(line)
        small = {"eval": ["--frames", "5"], "convert": []}.get(command[1], [])
        shown[" ".join(command[1:3])] = run([*command, *small], tmp_path)
    assert size_and_frames(tmp_path / "again.mp4") == (256, 256, 9)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "eval.json",
        "table.md",
        "grid.png",
        "curves.png",
    }
    assert "carried" in shown["convert dc-ae-f32c32-sana-1.1"]
    assert FSAE.from_pretrained(tmp_path / "inflated").config.decoder_kind == "causal"
    assert FSAE.from_pretrained(tmp_path / "lite").config.decoder_kind == "lite"


@pytest.mark.slow
def test_the_autoencoders_stages_run(tmp_path: Path) -> None:
    make_clips(tmp_path, 33)
    commands = [shlex.split(line) for line in fenced(AUTOENCODER_PAGE, "sh")[2].splitlines()]
    assert [Path(command[3]).stem for command in commands] == ["stage1", "stage2", "stage3"]
    for command in commands:
        command[3] = str(ROOT / command[3])
        run([*command, "--loop.max_steps", "1", "--loop.batch_size", "1", "--loop.validate_every", "0"], tmp_path)
    names = {path.name for path in (ROOT / AUTOENCODER_PAGE).parent.joinpath("configs").glob("*.yaml")}
    page = (ROOT / AUTOENCODER_PAGE).read_text(encoding="utf-8")
    assert names == set(re.findall(r"^\| `(\w+\.yaml)`", page, re.MULTILINE))


@pytest.mark.parametrize("package", ["fsae", "fsdit", "fsupsampler", "fsvideo_pipeline"])
def test_a_package_with_a_command_is_a_module_as_well(package: str) -> None:
    done = subprocess.run([sys.executable, "-m", package, "--version"], check=True, capture_output=True, text=True)
    assert done.stdout.split()[0] == {"fsvideo_pipeline": "fsvideo"}.get(package, package)
