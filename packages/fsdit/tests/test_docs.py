"""What the package's page tells a reader to type is typed here, at tiny sizes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from PIL import Image

from fsae import FSAE
from fsdit import FSDiT
from fsdit.cli import COMMANDS, main
from fsdit.preparation import captions

PACKAGE = Path(__file__).parents[1]
PAGE = (PACKAGE / "README.md").read_text(encoding="utf-8")
TRAINING = ["--loop.max_steps", "1", "--loop.validate_every", "1", "--loop.tensorboard", "false"]
VALIDATION = ["--validation_steps", "1", "--validation_samples", "1"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[list[str]]:
    lines = [shlex.split(line) for line in block.splitlines()]
    assert all(line[0] == "fsdit" for line in lines)
    return [line[1:] for line in lines]


@pytest.mark.slow
def test_the_program_runs() -> None:
    check = "\nassert latents.shape == (1, 128, 5, 2, 2) and video.shape == (1, 3, 17, 128, 128)\n"
    subprocess.run([sys.executable, "-c", blocks("python")[0] + check], check=True)


@pytest.fixture
def autoencoder() -> FSAE:
    torch.manual_seed(0)
    return FSAE.from_preset("nano")


def test_from_ones_own_videos_to_a_video(
    films: Path, parts: Path, autoencoder: FSAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    for film in sorted(films.glob("*-left.mp4"))[:3]:
        (tmp_path / "clips" / film.name).symlink_to(film)
    (tmp_path / "encoders").symlink_to(parts / "encoders")
    autoencoder.save_pretrained("autoencoder")
    Image.new("RGB", (200, 150), (90, 60, 30)).save("photo.jpg")
    WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=36,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        image_dim=16,
        added_kv_proj_dim=64,
    ).save_pretrained("wan")
    (tmp_path / "qwen").mkdir()
    monkeypatch.setattr(captions.QwenCaptioner, "load", lambda config: Says())
    size = ["--frames", "5", "--height", "64", "--width", "64"]
    training = [*size, *TRAINING, *VALIDATION]
    small = {"cache": size, "train": training, "router-map": ["--levels", "1"]}
    typed = commands(blocks("sh")[1])
    assert {command[0] for command in typed} == {command.name for command in COMMANDS}
    for command in typed:
        assert main([*command, *small.get(command[0], [])]) == 0
    assert FSDiT.from_pretrained("runs/mine/transformer").config.memory_bias == 7
    assert (tmp_path / "map.png").is_file() and (tmp_path / "map.csv").is_file()
    program = blocks("python")[1]
    exec(program.replace("steps=20", "steps=1"), {})
    assert (tmp_path / "out.mp4").stat().st_size > 0


def test_the_program_about_speed_runs() -> None:
    model: dict[str, Any] = {}
    exec(blocks("python")[2].replace("compile_repeated_blocks()", 'compile_repeated_blocks(backend="eager")'), model)
    assert model["latents"].shape == (1, 128, 5, 2, 2) and model["latents"].isfinite().all()
    torch._dynamo.reset()


def test_layer_memory_runs_in_another_model() -> None:
    model: dict[str, Any] = {}
    exec(blocks("python")[3], model)
    routers = [block.router for block in model["blocks"]]
    assert [None if router is None else len(router.bias) for router in routers] == [None, 2, 3, 4]
    assert all(router.weight.grad.any() and router.bias.grad.any() for router in routers[1:])


class Says(torch.nn.Module):
    """In Qwen2.5-VL's place."""

    def __call__(self, frames: Any) -> str:
        return "the camera pans left"


@pytest.mark.slow
def test_the_stages_run(films: Path, tmp_path: Path, autoencoder: FSAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for film in films.iterdir():
        (tmp_path / film.name).symlink_to(film)
    autoencoder.save_pretrained("autoencoder")
    typed = commands(blocks("sh")[2])
    assert [Path(command[2]).stem for command in typed] == [
        "pretrain-images",
        "pretrain-256",
        "pretrain-512",
        "clips",
        "sft",
    ]
    for command in typed:
        small = ["--frames", "5", "--height", "64", "--width", "64"]
        if command[0] == "train":
            command[2] = str(PACKAGE / Path(command[2]).relative_to("packages/fsdit"))
            small += [*TRAINING, *VALIDATION, "--loop.batch_size", "1"]
        small += [] if "sft" in command[2] or "images" in command[2] else ["--fps", "24"]
        small += ["--buckets", "[{frames: 5, area: 4096}]"] if "512" in command[2] else []
        assert main([*command, *small]) == 0
    FSDiT.from_pretrained("runs/nano/sft/transformer")


def test_the_table_lists_the_files() -> None:
    named = set(re.findall(r"^\| `([\w-]+\.yaml)`", PAGE, re.MULTILINE))
    assert named == {file.name for file in (PACKAGE / "configs").glob("*.yaml")}
