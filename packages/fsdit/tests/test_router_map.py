"""The map of the routers' weights: against brute force, against what a fresh router gives, and as a command."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fsae import FSAE
from fsae.data.config import Sampling
from fsae.errors import UserError
from fsdit import FSDiT
from fsdit.cli import main
from fsdit.conditioning import Context, first_frame_condition, load_encoders, model_input, nano_tokenizer
from fsdit.flow.path import FlowSchedule
from fsdit.layers.modulation import modulate
from fsdit.router_map import RouterMap, RouterTally, map_routers, watch_routers

SMALL: dict[str, Any] = {"num_layers": 4, "text_dim": 128, "image_dim": 128, "latent_channels": 4}


def model(random_routers: bool = True, **changes: Any) -> FSDiT:
    torch.manual_seed(0)
    built = FSDiT.from_preset("tiny", **{**SMALL, **changes}).eval()
    if random_routers:
        for parameter in built.router_parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return built


def batches(count: int = 2) -> list[tuple[Tensor, Context]]:
    torch.manual_seed(1)
    return [
        (torch.randn(2, 4, 3, 2, 2), Context(torch.randn(2, 16, 128), torch.randn(2, 5, 128))) for _ in range(count)
    ]


def naive_weights(built: FSDiT, inputs: Tensor, times: Tensor, context: Context) -> dict[int, Tensor]:
    """Each layer's softmax, from what the blocks are seen to take in."""
    seen: dict[int, Tensor] = {}
    hooks = []
    for layer, block in enumerate(built.blocks, start=1):

        def look(block: Any, args: tuple[Any, ...], layer: int = layer) -> None:
            time, states = args[0], args[3]
            modulation = block.modulation + time
            hidden = modulate(states[-1], modulation[:, 0:1], modulation[:, 1:2], block.eps)
            if block.router is not None:
                logits = hidden.double() @ block.router.weight.double().T + block.router.bias.double()
                seen[layer] = logits.exp() / logits.exp().sum(-1, keepdim=True)

        hooks.append(block.register_forward_pre_hook(look))
    with torch.no_grad():
        built(inputs, times, context.text, context.image)
    for hook in hooks:
        hook.remove()
    return seen


def test_figures_are_those_of_brute_force() -> None:
    built, schedule = model(), FlowSchedule(3.0)
    found = map_routers(built, batches(), schedule, 3, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    weights: dict[int, list[Tensor]] = {2: [], 3: [], 4: []}
    for latents, context in batches():
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for _ in latents])
        for sigma in (
            1.0,
            schedule.warp(torch.tensor(2 / 3 + 0.001 / 3)),
            schedule.warp(torch.tensor(1 / 3 + 0.002 / 3)),
        ):
            noisy = (1 - sigma) * latents + sigma * noise
            inputs = model_input(noisy, first_frame_condition(latents[:, :, :1], 3))
            times = torch.full((2,), 1000.0 * float(sigma))
            for layer, values in naive_weights(built, inputs, times, context).items():
                weights[layer].append(values.flatten(0, 1))
    assert found.tokens == 2 * 3 * 2 * 12
    assert found.maximum.shape == found.mean.shape == (3, 4)
    for layer, parts in weights.items():
        values = torch.cat(parts)
        np.testing.assert_allclose(found.maximum[layer - 2, :layer], values.amax(0), rtol=1e-4)
        np.testing.assert_allclose(found.mean[layer - 2, :layer], values.mean(0), rtol=1e-4)
        assert np.isnan(found.maximum[layer - 2, layer:]).all() and np.isnan(found.mean[layer - 2, layer:]).all()
    assert (found.maximum >= found.mean)[np.tril_indices(3, 1, 4)].all()


def test_stills_are_seen_without_their_picture_as_in_training() -> None:
    def mapped(frames: int, sign: float) -> np.ndarray:
        ((latents, context),) = batches(1)
        assert context.image is not None
        clips = [(latents[:, :, :frames], Context(context.text, sign * context.image))]
        return map_routers(model(), clips, FlowSchedule(), 1, torch.Generator().manual_seed(0)).mean

    assert np.array_equal(mapped(1, 1.0), mapped(1, -1.0), equal_nan=True)
    assert not np.allclose(mapped(3, 1.0), mapped(3, -1.0), rtol=1e-3, equal_nan=True)


@pytest.mark.parametrize("bias", [1.0, 7.0])
def test_fresh_routers_choose_the_newest_state_alike_at_every_depth(bias: float) -> None:
    found = map_routers(model(False, memory_bias=bias), batches(1), FlowSchedule(), 2, torch.Generator())
    newest = math.exp(bias) / (math.exp(bias) + 1)
    for layer in (2, 3, 4):
        for figures in (found.maximum, found.mean):
            assert figures[layer - 2, layer - 1] == pytest.approx(newest, rel=1e-5)
            assert figures[layer - 2, : layer - 1] == pytest.approx((1 - newest) / (layer - 1), rel=1e-4)


def test_a_closed_gate_shows_what_the_model_does() -> None:
    built = model(memory_gate=True)
    for block in built.blocks[1:]:
        block.router.gate.data.zero_()
    found = map_routers(built, batches(1), FlowSchedule(), 1, torch.Generator())
    assert np.array_equal(np.nan_to_num(found.maximum), np.eye(4)[1:])


def test_the_options_of_a_map_count() -> None:
    def mapped(**changes: Any) -> RouterMap:
        given = {"schedule": FlowSchedule(), "levels": 2, "generator": torch.Generator().manual_seed(0), **changes}
        return map_routers(model(), batches(1), **given)

    plain = mapped()
    assert np.array_equal(plain.mean, mapped().mean, equal_nan=True)
    others = ({"schedule": FlowSchedule(1.0)}, {"levels": 3}, {"generator": torch.Generator().manual_seed(1)})
    for changes in others:
        assert not np.array_equal(plain.mean, mapped(**changes).mean, equal_nan=True)


def test_the_model_is_left_as_it_was() -> None:
    built = model()
    with pytest.raises(RuntimeError, match="on the way"), watch_routers(built):
        assert all(block.router._forward_hooks for block in built.blocks[1:])
        raise RuntimeError("on the way")
    assert not any(block.router._forward_hooks for block in built.blocks[1:])
    with pytest.raises(ValueError, match="not run"):
        RouterTally().result()


def test_without_memory_there_is_nothing_to_see() -> None:
    for changes in ({"layer_memory": False}, {"num_layers": 1}):
        with pytest.raises(UserError, match="no router to look at"):
            map_routers(model(**changes), [], FlowSchedule(), 1, torch.Generator())


def test_the_files_hold_the_figures(tmp_path: Path) -> None:
    maximum, mean = np.full((2, 3, 4), np.nan)
    for layer in (2, 3, 4):
        maximum[layer - 2, :layer] = np.linspace(0, 1, layer)
        mean[layer - 2, :layer] = 1 / layer
    RouterMap(maximum, mean, 7).save(tmp_path / "a.png", tmp_path / "a.csv", "title")
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [(row["layer"], row["state"]) for row in rows] == [(str(x), str(j)) for x in (2, 3, 4) for j in range(x)]
    assert [float(row["max"]) for row in rows] == pytest.approx([0, 1, 0, 0.5, 1, 0, 1 / 3, 2 / 3, 1], abs=1e-5)
    assert float(rows[-1]["mean"]) == 0.25
    picture = Image.open(tmp_path / "a.png").convert("RGB")
    colours = {colour for _, colour in picture.getcolors(100_000) or []}
    assert {(240, 244, 249), (8, 40, 90)} <= colours  # nought and one
    assert {file.name for file in tmp_path.iterdir()} == {"a.png", "a.csv"}


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved transformer, autoencoder and encoders, and pictures with captions, as files and cached."""
    folder = tmp_path_factory.mktemp("parts")
    model().save_pretrained(folder / "transformer")
    model(layer_memory=False).save_pretrained(folder / "plain")
    torch.manual_seed(0)
    FSAE.from_preset("tiny", latent_channels=4).save_pretrained(folder / "fsae")
    text, image = load_encoders("nano", 16)
    text.model.save_pretrained(folder / "text_encoder")
    image.model.save_pretrained(folder / "image_encoder")
    nano_tokenizer().save_pretrained(folder / "tokenizer")
    lines = []
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"path": str(folder / f"{number}.png"), "caption": f"picture {number}"}))
    (folder / "list.jsonl").write_text("\n".join(lines))
    made = ["--output", str(folder / "cache"), "--text_len", "16", "--latents", "fp32"]
    assert main(["cache", *encoded(folder), *made]) == 0
    return folder


def encoded(parts: Path) -> list[str]:
    return [
        *("--data", str(parts / "list.jsonl"), "--autoencoder", str(parts / "fsae"), "--encoders", str(parts)),
        *("--frames", "1", "--height", "64", "--width", "128", "--device", "cpu"),
    ]


def figures(path: Path) -> list[list[float]]:
    return [[float(value) for value in row.values()] for row in csv.DictReader(path.open())]


def test_from_files_and_from_their_cache_the_map_is_the_same(parts: Path, tmp_path: Path, capsys: Any) -> None:
    common = ["router-map", "--model", str(parts / "transformer"), "--levels", "2", "--samples", "2"]
    assert main([*common, *encoded(parts), "--output", str(tmp_path / "files.png")]) == 0, capsys.readouterr().err
    assert f"saved {tmp_path / 'files.png'} and {tmp_path / 'files.csv'}" in capsys.readouterr().out
    cached = [*common, "--cache", str(parts / "cache"), "--device", "cpu", "--output", str(tmp_path / "cached.png")]
    assert main(cached) == 0, capsys.readouterr().err
    files, cache = figures(tmp_path / "files.csv"), figures(tmp_path / "cached.csv")
    assert [row[:2] for row in files] == [[layer, state] for layer in (2, 3, 4) for state in range(layer)]
    np.testing.assert_allclose(files, cache, rtol=1e-3)


def test_every_option_reaches_the_map(parts: Path, tmp_path: Path) -> None:
    def mapped(*changes: str) -> list[list[float]]:
        clips = ["--cache", str(parts / "cache"), "--levels", "2", "--batch_size", "3", "--device", "cpu"]
        arguments = ["--model", str(parts / "transformer"), *clips, "--output", str(tmp_path / "a.png"), *changes]
        assert main(["router-map", *arguments]) == 0
        return figures(tmp_path / "a.csv")

    first = mapped()
    np.testing.assert_allclose(mapped("--batch_size", "1"), first, rtol=1e-3)
    for changes in ({"samples": "1"}, {"levels": "3"}, {"shift": "1"}, {"seed": "1"}, {"precision": "bf16"}):
        ((name, value),) = changes.items()
        assert mapped(f"--{name}", value) != first, name


def test_options_of_files_reach_their_reader(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def reader(*arguments: Any) -> None:
        seen.append(arguments)
        raise UserError("far enough")

    monkeypatch.setattr("fsae.data.datasets.VideoFolder", reader)
    changes = ["--frames", "5", "--height", "192", "--width", "256", "--stride", "3", "--seed", "7"]
    arguments = ["--model", str(parts / "transformer"), *encoded(parts), "--output", str(tmp_path / "a.png"), *changes]
    assert main(["router-map", *arguments]) == 2
    assert seen == [(str(parts / "list.jsonl"), Sampling(5, stride=3, size=(192, 256)), 7)]


def test_what_does_not_fit_is_one_sentence(parts: Path, tmp_path: Path, capsys: Any) -> None:
    good = ["--model", str(parts / "transformer"), "--output", str(tmp_path / "a.png")]
    for arguments, words in (
        (good, "neither data nor cache"),
        ([*good, *encoded(parts), "--cache", "x"], "both data and cache"),
        ([*good, "--data", "x", "--encoders", "y"], "without autoencoder"),
        ([*good, "--cache", "x", "--encoders", "y"], "leave it out"),
        ([*good, "--cache", "x", "--frames", "5"], "frames is given with cache"),
        ([*good, *encoded(parts), "--levels", "0"], "levels is 0"),
        ([*good, *encoded(parts), "--output", str(tmp_path / "a.jpg")], "ends in .png"),
        ([*good, *encoded(parts), "--output", str(tmp_path / "no" / "a.png")], "there is no folder"),
        ([*good, *encoded(parts), "--model", str(parts / "plain")], "no router to look at"),
        ([*good, *encoded(parts), "--frames", "2"], "frames is 2; it must be 1 + 4k"),
        ([*good, "--cache", str(tmp_path)], "cache"),
    ):
        assert main(["router-map", *arguments]) == 2, arguments
        err = capsys.readouterr().err
        assert words in err and "Traceback" not in err, err
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_torch() -> None:
    code = """
import sys
from fsdit.cli import main
assert main(["router-map", "--help"]) == 0
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for flag in ("--model", "--levels", "--shift", "--cache", "--precision"):
        assert flag in done.stdout
