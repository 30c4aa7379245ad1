"""The command line: options, their sources and their errors, and a file through encode and decode."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from fsae.cli import main
from fsae.cli.options import parse_bytes
from fsae.data.config import BucketConfig, ClipsConfig, SourceConfig
from fsae.data.image import cover, load_image
from fsae.data.video import read_video, to_video_tensor, write_video
from fsae.errors import UserError
from fsae.evaluation import evaluate as evaluation
from fsae.evaluation.evaluate import EvalSettings
from fsae.model import FSAE
from fsae.stages import task as autoencoder
from fsae.stages.config import AutoencoderConfig
from fsae.transcoding import transcode as transcoding
from fsae.transcoding.latents import SavedLatents, load_latents, save_latents


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    FSAE.from_preset("tiny").save_pretrained(folder)
    return folder


HELP = {
    "--help": "encode",
    "train": "--loop.ema_decay",
    "encode": "--frames",
    "decode": "--first-frame",
    "eval": "--dimension-of",
    "convert": "--decoder-widths",
}


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in HELP if name != "--help")])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    code = f"import sys; from fsae.cli import main; sys.exit(main({arguments}) or 'torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert HELP[arguments[0]] in shown.stdout


def test_training_options_come_from_yaml_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[AutoencoderConfig] = []
    monkeypatch.setattr(autoencoder, "train_autoencoder", lambda config: given.append(config) or Path("run"))
    file = {
        "data": "clips",
        "frames": 9,
        "loop": {"output_dir": "run", "max_steps": 7, "optimizer": {"eps": 1e-5}},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(file))
    flags = ["--frames", "5", "--loop.optimizer.betas", "[0.8, 0.99]", "--loop.schedule.kind", "constant"]
    assert main(["train", "--config", str(tmp_path / "train.yaml"), *flags]) == 0
    config = given[0]
    assert (config.data, config.clips.frames, config.loop.max_steps) == ("clips", 5, 7)
    assert (config.loop.optimizer.eps, config.loop.optimizer.betas) == (1e-5, (0.8, 0.99))
    assert config.loop.schedule.kind == "constant" and config.loop.batch_size == 1


def test_settings_of_clips_are_read_as_they_once_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is under `clips` now was at the top; a file of both leaves open which of them counts."""
    given: list[AutoencoderConfig] = []
    monkeypatch.setattr(autoencoder, "train_autoencoder", lambda config: given.append(config) or Path("run"))
    loop, file = "data: films\nloop: {output_dir: run, optimizer: {learning_rate: 1e-5}}\n", tmp_path / "train.yaml"
    new = "clips:\n  frames: 9\n  width: 128\n  fps: 8\n  buckets:\n  - {frames: 5, height: 64, width: 64}\n"
    old = "frames: 9\nwidth: 128\nfps: 8\nbuckets:\n- {frames: 5, height: 64, width: 64}\n"
    for text, flags in ((new, ["--clips.frames", "5", "--clips.more_data=[{path: x}]"]), (old, ["--frames", "5"])):
        file.write_text(loop + text)
        flags += [] if text is new else ["--more_data=[{path: x}]"]
        assert main(["train", "--config", str(file), *flags]) == 0
        assert main(["train", f"--config={file}", *flags]) == 0
    clips = ClipsConfig(5, 256, 128, [BucketConfig(5, height=64, width=64)], [SourceConfig("x")], 8.0)
    assert [config.clips for config in given] == [clips] * 4 and given[0] == given[2]
    file.write_text(loop + old + "clips: {stride: 2}\n")
    assert main(["train", "--config", str(file)]) == 2
    assert "beside clips; write all of them under clips" in capsys.readouterr().err


def test_print_config_can_be_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [
        "--data",
        "clips",
        "--loop.output_dir",
        "run",
        "--loop.seed",
        "3",
        "--perceptual_weights",
        '["a.pth"]',
    ]
    assert main(["train", *flags, "--print_config"]) == 0
    (tmp_path / "train.yaml").write_text(capsys.readouterr().out)
    given: list[AutoencoderConfig] = []
    monkeypatch.setattr(autoencoder, "train_autoencoder", lambda config: given.append(config) or Path("run"))
    assert main(["train", "--config", str(tmp_path / "train.yaml")]) == 0
    assert main(["train", *flags]) == 0
    assert given[0] == given[1] and given[0].loop.seed == 3


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "required"),
        (["--data", "none", "--loop.output_dir", "run"], "neither a folder nor"),
        (["--data", "x", "--loop.output_dir", "run", "--loop.batch_size", "0"], "batch_size is 0"),
        (["--data", "x", "--loop.output_dir", "run", "--loop.schedule.kind", "step"], "step"),
        (["--data", "x", "--loop.output_dir", "run", "--frames", "many"], "many"),
        (["--data", "x", "--loop.output_dir", "run", "--fames", "5"], "fames"),
        (["--data", "x", "--loop.output_dir", "/dev/null/run"], "/dev/null is a file"),
        (
            ["--data", "x", "--loop.output_dir", "run", "--model_options", "{widths: [16, 32]}"],
            "FSAE cannot be built with {'widths': [16, 32]}",
        ),
    ],
    ids=str,
)
def test_bad_training_options(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *flags]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_training_that_was_stopped_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what a shell runs after it does not start."""
    flags = ["--data", "x", "--loop.output_dir", "run"]
    for stopped, code in ((None, 130), (Path("run/autoencoder"), 0)):
        monkeypatch.setattr(autoencoder, "train_autoencoder", lambda config, folder=stopped: folder)
        assert main(["train", *flags]) == code


def test_a_decoder_of_first_frames_without_one_says_so(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_latents(tmp_path / "z.safetensors", torch.zeros(8, 1, 1, 1), 8)
    assert main(["decode", str(tmp_path / "z.safetensors"), "-o", str(tmp_path / "o.png"), "--model", str(model)]) == 0
    assert "no first frame came with these latents" in capsys.readouterr().err


def test_a_video_through_encode_and_decode(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    write_video(tmp_path / "in.mp4", rng.integers(0, 255, (7, 70, 70, 3), np.uint8), 12)
    Image.fromarray(rng.integers(0, 255, (70, 70, 3), np.uint8)).save(tmp_path / "first.png")
    latents_path, out = str(tmp_path / "z.safetensors"), str(tmp_path / "out.mp4")
    assert main(["encode", str(tmp_path / "in.mp4"), "-o", latents_path, "--model", str(model)]) == 0
    assert latents_path in capsys.readouterr().out

    fsae = FSAE.from_pretrained(model).eval()
    frames, _ = read_video(tmp_path / "in.mp4", frames=5, size=(64, 64))
    saved = load_latents(latents_path)
    with torch.no_grad():
        expected = fsae.encode(to_video_tensor(frames)[None])[0]
    assert saved.fps == 12 and saved.latents.shape == (8, 2, 1, 1)
    torch.testing.assert_close(saved.latents, expected)
    assert saved.first_frame is not None and torch.equal(saved.first_frame, frames[0])

    first = ["--first-frame", str(tmp_path / "first.png")]
    assert main(["decode", latents_path, "-o", out, "--model", str(model), "--device", "cpu", *first]) == 0
    assert "5 frame(s)" in capsys.readouterr().out
    decoded, rate = read_video(out)
    assert decoded.shape == (5, 64, 64, 3) and rate == 12
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".mp4", ".mp4", ".png", ".safetensors"]


def test_options_of_encode_and_decode_reach_the_work(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first frame: that of the latents unless another is given; and --frames, --memory and --device."""
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    stored = torch.zeros(64, 64, 3, dtype=torch.uint8)
    save_latents(tmp_path / "with.safetensors", torch.zeros(8, 2, 1, 1), 8, stored)
    save_latents(tmp_path / "without.safetensors", torch.zeros(8, 2, 1, 1), 8)
    given: list[Any] = []

    def decode(model: FSAE, saved: SavedLatents, output: str, first: torch.Tensor | None, memory: int | None) -> int:
        given[:] = [model.device.type, saved.latents.shape, None if first is None else first.mean().item(), memory]
        return 5

    def encode(model: FSAE, path: str, output: str, frames: int | None, memory: int | None) -> SavedLatents:
        given[:] = [model.device.type, path, output, frames, memory]
        return SavedLatents(torch.zeros(8, 2, 1, 1), 8)

    monkeypatch.setattr(transcoding, "decode_file", decode)
    monkeypatch.setattr(transcoding, "encode_file", encode)
    monkeypatch.chdir(tmp_path)
    to = ["-o", "out.mp4", "--model", str(model), "--device", "cpu"]
    white = ["--first-frame", "white.png", "--memory", "1.5GiB"]
    assert main(["decode", "with.safetensors", *to]) == 0 and given == ["cpu", (8, 2, 1, 1), -1.0, None]
    assert main(["decode", "with.safetensors", *to, *white]) == 0 and given[2:] == [1.0, 3 * 2**29]
    assert main(["decode", "without.safetensors", *to]) == 0 and given[2:] == [None, None]
    to = ["-o", "out.safetensors", "--model", str(model), "--device", "cpu"]
    assert main(["encode", "in.mp4", *to]) == 0 and given == ["cpu", "in.mp4", "out.safetensors", None, None]
    assert main(["encode", "in.mp4", *to, "--frames", "9", "--memory", "4GB"]) == 0 and given[3:] == [9, 4 * 10**9]


def test_decode_refuses_what_does_not_belong_to_the_model(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "in.png")
    torch.manual_seed(0)
    other = FSAE.from_preset("tiny", first_frame_injection=False, decoder_kind="lite")
    encoder = FSAE.from_pretrained(model).encoder.state_dict()
    other.save_pretrained(tmp_path / "stranger")
    other.encoder.load_state_dict(encoder)
    other.save_pretrained(tmp_path / "sibling")
    latents, out = str(tmp_path / "z.safetensors"), str(tmp_path / "out.png")
    assert main(["encode", str(tmp_path / "in.png"), "-o", latents, "--model", str(model)]) == 0
    with torch.no_grad():
        other.encoder.conv_in.weight += 0.1
    other.save_pretrained(tmp_path / "stranger")
    # A decoder of another kind that was trained on the same encoder is welcome.
    assert main(["decode", latents, "-o", out, "--model", str(tmp_path / "sibling")]) == 0
    first = ["--first-frame", str(tmp_path / "in.png")]
    capsys.readouterr()
    assert main(["decode", latents, "-o", out, "--model", str(tmp_path / "stranger")]) == 2
    assert "was made by another encoder than this model's" in capsys.readouterr().err
    assert main(["decode", latents, "-o", out, "--model", str(tmp_path / "sibling"), *first]) == 2
    assert "takes no first frame; leave --first-frame out" in capsys.readouterr().err
    assert main(["decode", latents, "-o", out, "--model", str(model), "--memory", "1KB"]) == 2
    assert "memory is 1000 bytes" in capsys.readouterr().err


def test_options_of_eval_reach_their_settings(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = []

    def measure(fsae: FSAE, settings: EvalSettings, folder: str) -> dict[str, Any]:
        given[:] = [fsae.device.type, settings, folder]
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "table.md").write_text("| the table |\n")
        return {"skipped": [f"{n}.mp4" for n in range(12)]}

    monkeypatch.setattr(evaluation, "evaluate", measure)
    out = ["-o", str(tmp_path / "out"), "--model", str(model)]
    assert main(["eval", "clips", *out]) == 0
    assert given[1:] == [EvalSettings("clips"), str(tmp_path / "out")]
    printed = capsys.readouterr().out
    assert (
        "| the table |" in printed
        and "skipped 0.mp4, 1.mp4" in printed
        and "and 2 more" in printed
        and str(tmp_path / "out") in printed
    )
    flags = "--frames 5 --height 128 --width 192 --stride 2 --samples 7 --batch-size 3 --seed 9 --lpips a.pth b.pth"
    more = "--fvd i3d.pt --memory 600MiB --dimension-of clip --device cpu"
    assert main(["eval", "clips", *out, *flags.split(), *more.split()]) == 0
    assert given[:2] == [
        "cpu",
        EvalSettings(
            data="clips",
            frames=5,
            height=128,
            width=192,
            stride=2,
            samples=7,
            batch_size=3,
            seed=9,
            lpips=("a.pth", "b.pth"),
            fvd="i3d.pt",
            memory=600 * 2**20,
            dimension_of="clip",
        ),
    ]


def test_eval_from_end_to_end(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 70, 3), np.uint8)).save(tmp_path / "a.png")
    size = ["--frames", "1", "--height", "64", "--width", "64"]
    out = ["-o", str(tmp_path / "out"), "--model", str(model)]
    assert main(["eval", str(tmp_path), *out, *size]) == 0
    assert "| PSNR (dB) |" in capsys.readouterr().out
    assert main(["eval", str(tmp_path), *out, *size]) == 2
    assert "is not empty; give a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GB", 4 * 10**9), ("600 MiB", 600 * 2**20), ("1.5g", 1_500_000_000), ("123", 123), ("2kib", 2048)],
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "4 apples", "1e9", "4GGB"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no amount of memory; give one such as 4GB"):
        parse_bytes(text)


def test_an_image_through_encode_and_decode(tmp_path: Path, model: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 90, 3), np.uint8)).save(tmp_path / "in.png")
    latents_path, out, injected = (str(tmp_path / n) for n in ("z.safetensors", "out.png", "injected.png"))
    assert main(["encode", str(tmp_path / "in.png"), "-o", latents_path, "--model", str(model)]) == 0
    options = [latents_path, "--model", str(model)]
    assert main(["decode", *options, "-o", out]) == 0
    assert main(["decode", *options, "-o", injected, "--first-frame", str(tmp_path / "in.png")]) == 0
    np.testing.assert_array_equal(load_image(injected), load_image(out))  # the one that came with the latents
    image = torch.from_numpy(cover(load_image(tmp_path / "in.png"), (64, 64)))
    fsae = FSAE.from_pretrained(model).eval()
    with torch.no_grad():
        video = to_video_tensor(image[None])[None]
        expected = fsae.decode(fsae.encode(video), video)[0, :, 0]
    pixels = ((expected.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).numpy()
    np.testing.assert_allclose(np.asarray(Image.open(out), dtype=float), pixels, atol=1)
    assert load_image(injected).shape == (64, 64, 3)


def test_bad_input_ends_in_a_sentence_and_leaves_nothing(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "small.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    (tmp_path / "text.mp4").write_text("no video")
    save_latents(tmp_path / "clip.safetensors", torch.zeros(8, 2, 1, 1), 8)
    save_latents(tmp_path / "wide.safetensors", torch.zeros(9, 1, 1, 1), 8)
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, shape, value in (("empty", (8, 0, 1, 1), 0.0), ("infinite", (8, 1, 1, 1), torch.inf)):
        save_latents(tmp_path / f"{name}.safetensors", torch.full(shape, value), 8)
    before = sorted(tmp_path.iterdir())
    good = ["--model", str(model)]
    out = ["-o", str(tmp_path / "out.safetensors")]
    png, mp4 = ["-o", str(tmp_path / "out.png")], ["-o", str(tmp_path / "out.mp4")]
    cases = [
        (["encode", "none.mp4", *out, *good], "there is no video file none.mp4"),
        (["encode", "small.png", *out, *good], "at least 64x64 are needed"),
        (["encode", "text.mp4", *out, *good], "cannot be decoded"),
        (["encode", "image.png", "-o", "out.txt", *good], "ends in .safetensors"),
        (["encode", "image.png", "-o", "none/out.safetensors", *good], "there is no folder"),
        (["encode", "image.png", *out, "--model", "none"], "there is no model folder none"),
        (["encode", "image.png", *out, *good, "--device", "abacus"], "abacus cannot be used"),
        (["encode", "image.png", *out, *good, "--frames", "0"], "'0' is no number from 1 on"),
        (["encode", "image.png", *out, *good, "--memory", "much"], "'much' is no amount of memory"),
        (["encode", "image.png", *out, *good, "--memory", "1KB"], "memory is 1000 bytes"),
        (["eval", "none", "-o", "out", *good], "neither a folder nor"),
        (["eval", ".", "-o", "out", *good, "--frames", "2"], "2 frames cannot be encoded"),
        (["eval", ".", "-o", "out", *good, "--lpips", "none.pth"], "none.pth does not exist"),
        (["eval", ".", "-o", "out", *good, "--samples", "0"], "'0' is no number from 1 on"),
        (["decode", "none.safetensors", *mp4, *good], "there is no file none.safetensors"),
        (["decode", "other.safetensors", *mp4, *good], "holds no latents"),
        (["decode", "wide.safetensors", *mp4, *good], "have 9 channels, the model 8"),
        (["decode", "empty.safetensors", *mp4, *good], "none of them 0"),
        (["decode", "infinite.safetensors", *mp4, *good], "not all finite"),
        (["decode", "clip.safetensors", *mp4, *good, "--device", "meta"], "computes nothing"),
        (["decode", "clip.safetensors", *png, *good], "several frames"),
        (["decode", "clip.safetensors", "-o", "out.txt", *good], "ends in"),
        (
            ["decode", "clip.safetensors", *mp4, *good, "--first-frame", "none.png"],
            "there is no image file none.png",
        ),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for arguments, sentence in cases:
            assert main(arguments) == 2, arguments
            printed = capsys.readouterr()
            assert sentence in printed.err and "Traceback" not in printed.err, (arguments, printed.err)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(UserError, match="c t h w is wanted"):
        save_latents(tmp_path / "flat.safetensors", torch.zeros(8), 8)
        load_latents(tmp_path / "flat.safetensors")
    with pytest.raises(UserError, match="H W 3 of bytes is wanted"):
        save_latents(tmp_path / "flat.safetensors", torch.zeros(8, 1, 1, 1), 8, torch.zeros(3, 3))
        load_latents(tmp_path / "flat.safetensors")


def test_train_then_encode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 90, 3), np.uint8)).save(tmp_path / "in.png")
    size = ["--frames", "1", "--height", "64", "--width", "64"]
    loop = [
        "--loop.output_dir",
        str(tmp_path / "run"),
        "--loop.max_steps",
        "1",
        "--loop.tensorboard",
        "false",
    ]
    assert main(["train", "--data", str(tmp_path), "--model", "tiny", *size, *loop]) == 0
    saved = ["--model", str(tmp_path / "run" / "autoencoder")]
    assert main(["encode", str(tmp_path / "in.png"), "-o", str(tmp_path / "z.safetensors"), *saved]) == 0
    assert load_latents(tmp_path / "z.safetensors").latents.shape == (8, 1, 1, 1)
