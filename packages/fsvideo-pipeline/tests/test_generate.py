"""The command line as a user meets it: a video on disk, or one sentence, exit code 2 and nothing left behind."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from fsae.data.video import probe, read_video, write_video
from fsvideo_pipeline.cli import generate, main
from fsvideo_pipeline.cli.options import GenerateOptions
from fsvideo_pipeline.cli.progress import STAGE_NAMES
from fsvideo_pipeline.output import describe, load_sample, save_video
from fsvideo_pipeline.pipeline import FSVideoPipeline
from fsvideo_pipeline.request import Job

PROMPT = "the camera pans left"


@pytest.fixture
def command(
    saved: Path, photo_file: Path, tmp_path: Path, pipeline: FSVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """`fsvideo generate photo.png PROMPT -o out.mp4 ...` in this process, the model loaded once for all tests."""

    def load(folder: Path) -> FSVideoPipeline:
        assert folder == saved
        return pipeline

    monkeypatch.setattr(generate, "load", load)

    def call(*flags: str, image: object = photo_file, prompt: str = PROMPT, output: str = "out.mp4") -> int:
        arguments = ["generate", str(image), prompt, "-o", str(tmp_path / output), "--model", str(saved)]
        return main([*arguments, "--seed", "1", *flags])

    return call


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def metadata(path: Path) -> dict[str, Any]:
    with av.open(str(path)) as container:
        return json.loads(container.metadata["comment"]) if "comment" in container.metadata else {}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_whole_process(saved: Path, photo_file: Path, tmp_path: Path, pipeline: FSVideoPipeline) -> None:
    """From a shell, with nothing replaced."""
    arguments = ["generate", photo_file, PROMPT, "-o", tmp_path / "out.mp4", "--model", saved, "--seed", "11"]
    arguments += ["--keep-latents"]
    done = python("import sys; from fsvideo_pipeline.cli import main; sys.exit(main())", *map(str, arguments))
    assert done.returncode == 0, done.stderr
    kept, result, timings = done.stdout.splitlines()
    assert kept == str(tmp_path / "out.latents.safetensors")
    assert result == f"{tmp_path / 'out.mp4'}: 5 frames of 128x96 at 8 fps, seed 11"
    for stage in ("load", "encode", "base", "upsample", "refine", "decode", "write"):
        assert f"{stage} " in timings
    for bar in STAGE_NAMES.values():
        assert f"{bar}: 100%" in done.stderr
    assert "Traceback" not in done.stderr
    assert names(tmp_path) == {"photo.png", "out.mp4", "out.latents.safetensors"}

    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.frames) == (128, 96, 5)
        assert stream.average_rate == 8
    photo = np.asarray(Image.open(photo_file))
    expected, other = (pipeline(photo, PROMPT, generator=seed) for seed in (11, 12))
    assert expected.frames is not None
    assert_same_video(tmp_path / "out.mp4", expected.frames, tmp_path)
    # Two processes may differ by rounding, two seeds by all there is. The first latent is the photo's.
    latents, same, others = (
        sample.latents[:, :, 1:]
        for sample in (load_sample(tmp_path / "out.latents.safetensors"), expected.sample, other.sample)
    )
    assert float((latents - same).abs().max()) < 1e-3
    assert float((latents - others).abs().max()) > 1


def test_the_same_seed_writes_the_same_bytes(command: Callable[..., int], tmp_path: Path) -> None:
    for output, flags in (("a.mp4", ()), ("b.mp4", ()), ("c.mp4", ("--seed", "2"))):
        assert command(*flags, output=output) == 0
    first, again, other = ((tmp_path / name).read_bytes() for name in ("a.mp4", "b.mp4", "c.mp4"))
    assert first == again
    assert first != other


def test_without_a_seed_one_is_drawn_and_printed(
    photo_file: Path, tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = GenerateOptions(str(photo_file), PROMPT, str(tmp_path / "out.mp4"))
    seeds = {generate.make_job(options, saved).seed for _ in range(4)}
    assert len(seeds) == 4


def test_the_metadata_says_what_made_the_video(command: Callable[..., int], tmp_path: Path) -> None:
    assert command("--steps", "3", "--guidance", "2", "--size", "100x60", prompt='"ä" <pans> left') == 0
    facts = metadata(tmp_path / "out.mp4")
    versions = facts.pop("versions")
    assert facts == {
        "prompt": '"ä" <pans> left',
        "seed": 1,
        "size": "100x60",
        "canvas": "128x128",
        "frames": 5,
        "fps": 8,
        "steps": 3,
        "guidance": 2,
        "refiner_steps": 3,
        "model": "tiny",
    }
    assert versions["fsvideo-pipeline"] == version("fsvideo-pipeline")
    assert versions["torch"] == version("torch")
    assert str(tmp_path) not in json.dumps(metadata(tmp_path / "out.mp4"))


def test_a_prompt_that_is_no_text_is_refused_before_any_work(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a shell hands over where a word holds a Latin-1 byte."""
    assert command(prompt=b"caf\xe9, the camera zooms in".decode(errors="surrogateescape")) == 2
    told = capsys.readouterr().err
    assert r"the prompt 'caf\udce9, the camera zooms in' is no UTF-8" in told and "100%" not in told
    assert names(tmp_path) == {"photo.png"}


def test_a_models_name_that_is_no_text_costs_no_video(tmp_path: Path) -> None:
    name = b"mod\xe8le".decode(errors="surrogateescape")
    save_video(tmp_path / "out.mp4", np.zeros((5, 64, 64, 3), np.uint8), 8.0, describe({"model": name, "seed": 1}))
    assert metadata(tmp_path / "out.mp4")["model"] == "mod?le"


def test_packages_without_their_metadata_make_a_video(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a path, a zip file or a bundle no installation knows them."""

    def unknown(name: str) -> str:
        if name.startswith("fs"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("fsvideo_pipeline.output.version", unknown)
    assert command() == 0
    versions = metadata(tmp_path / "out.mp4")["versions"]
    assert versions.keys() == {"torch", "diffusers", "transformers", "python"}


def test_no_metadata_leaves_it_out(command: Callable[..., int], tmp_path: Path) -> None:
    assert command("--no-metadata") == 0
    assert metadata(tmp_path / "out.mp4") == {}
    assert PROMPT.encode() not in (tmp_path / "out.mp4").read_bytes()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--seed", "5"), {"seed": 5}),
        (("--size", "64x32"), {"size": "64x32"}),
        (("--frames", "9"), {"frames": 9}),
        (("--steps", "7"), {"steps": 7}),
        (("--guidance", "1.5"), {"guidance": 1.5}),
        (("--fps", "12"), {"fps": 12}),
    ],
)
def test_every_flag_reaches_the_pipeline(
    flags: tuple[str, ...],
    expected: dict[str, Any],
    command: Callable[..., int],
    pipeline: FSVideoPipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Job] = []

    def sample(job: Job, *others: object) -> None:
        seen.append(job)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "sample", sample, raising=False)
    assert command(*flags) == 130
    defaults = {"seed": 1, "size": "128x96", "frames": 5, "steps": 2, "guidance": 3.0, "fps": 8}
    facts = seen[0].facts()
    assert {name: facts[name] for name in defaults} == {**defaults, **expected}


def test_fps_and_keep_latents_reach_the_files(
    command: Callable[..., int], pipeline: FSVideoPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--fps", "12.5", "--keep-latents") == 0
    assert probe(tmp_path / "out.mp4").fps == 12.5
    kept = tmp_path / "out.latents.safetensors"
    assert f"{kept}\n" in capsys.readouterr().out
    decoded = pipeline.decode(load_sample(kept)).frames
    assert decoded is not None
    assert_same_video(tmp_path / "out.mp4", decoded, tmp_path)


@pytest.mark.parametrize("failing", ["decode", "save_video"])
def test_the_latents_outlive_a_failure_after_sampling(
    failing: str,
    command: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FSVideoPipeline if failing == "decode" else generate, failing, fail)
    assert command() == 130
    assert names(tmp_path) == {"photo.png", "out.latents.safetensors"}
    assert "the latents are saved in" in capsys.readouterr().err
    assert load_sample(tmp_path / "out.latents.safetensors").geometry.frames == 5


@pytest.mark.parametrize(
    ("size", "video"), [((1, 1), (128, 128)), ((20_000, 10), (256, 64)), ((10, 20_000), (64, 256))]
)
def test_extreme_photos_become_videos(
    size: tuple[int, int],
    video: tuple[int, int],
    command: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGB", size, "red").save(tmp_path / "extreme.png")
    assert command(image=tmp_path / "extreme.png") == 0
    assert tuple(read_video(tmp_path / "out.mp4")[0].shape[1:3]) == video[::-1]
    assert f"note: the photo of {size[0]}x{size[1]}" in capsys.readouterr().err or size == (1, 1)


def test_what_is_snapped_is_said(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--frames", "6", "--size", "101x100") == 0
    assert read_video(tmp_path / "out.mp4")[0].shape == (5, 100, 100, 3)
    notes = capsys.readouterr().err
    assert "note: size 101x100 asked for; a video has even sides, so it gets 100x100\n" in notes
    assert "note: 6 frames asked for; a video has 1 + 4k frames, so it gets 5\n" in notes


def test_a_long_prompt_is_cut_and_that_is_said(
    command: Callable[..., int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert command(prompt="pan " * 2500) == 0
    assert "the prompt has 10000 tokens; the model reads the first 24" in caplog.text
    assert (tmp_path / "out.mp4").is_file()


def bad_images(folder: Path) -> dict[str, Path]:
    (folder / "text.jpg").write_text("this is not a picture")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:3000])
    missing, text, cut = (folder / name for name in ("none.jpg", "text.jpg", "cut.png"))
    return {"missing": missing, "text": text, "cut": cut, "folder": folder}


@pytest.mark.parametrize("which", ["missing", "text", "cut", "folder"])
def test_a_bad_image_is_one_sentence(
    which: str,
    command: Callable[..., int],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = bad_images(tmp_path_factory.mktemp("images"))[which]
    assert command(image=path) == 2
    assert_one_sentence(capsys, path.name)
    assert names(tmp_path) == {"photo.png"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--frames", "0"), "0 frames given"),
        (("--frames", "-5"), "-5 frames given"),
        (("--size", "big"), "size 'big' given"),
        (("--size", "8x8"), "size 8x8 given"),
        (("--size", "99999x10"), "size 99999x10 given"),
        (("--steps", "0"), "0 steps given"),
        (("--guidance", "0"), "guidance 0.0 given"),
        (("--fps", "0"), "0.0 frames per second given"),
        (("--seed", "-1"), "seed -1 given"),
        (("--model", "no/such/folder"), "there is no model folder no/such/folder"),
    ],
)
def test_a_bad_flag_is_one_sentence(
    flags: tuple[str, ...],
    words: str,
    command: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(*flags) == 2
    assert_one_sentence(capsys, words)
    assert names(tmp_path) == {"photo.png"}


@pytest.mark.parametrize(
    "flags",
    [("--frames", "many"), ("--steps", "1.5"), ("--fps", "inf"), ("--guidance", "nan"), ("--no-flag", "1")],
)
def test_what_the_parser_refuses_exits_with_2(flags: tuple[str, ...], command: Callable[..., int]) -> None:
    assert command(*flags) == 2


@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
def test_an_empty_prompt_is_one_sentence(
    prompt: str, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(prompt=prompt) == 2
    assert_one_sentence(capsys, "the prompt is empty")


@pytest.mark.parametrize("output", ["photo.png/out.mp4", "missing/out.mp4", "out.gif", "folder.mp4", "out"])
def test_an_output_that_cannot_be_written_is_one_sentence_before_any_work(
    output: str,
    command: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    monkeypatch.setattr(generate, "load_image", lambda path: pytest.fail("work was begun"))
    assert command(output=output) == 2
    assert_one_sentence(capsys, f"cannot write {tmp_path / output}")
    assert names(tmp_path) == {"photo.png", "folder.mp4"}


@pytest.fixture
def broken(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path_factory.mktemp("broken") / "model"))


@pytest.mark.parametrize("component", ["text_encoder", "transformer"])
@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_broken_model_is_one_sentence(
    component: str, damage: str, broken: Path, photo_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tmp_path = broken, photo_file.parent
    weights = next((model / component).glob("*.safetensors"))
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1])
    output = tmp_path / "out.mp4"
    assert main(["generate", str(photo_file), PROMPT, "-o", str(output), "--model", str(model)]) == 2
    error = capsys.readouterr().err
    assert str(weights) in error
    assert "Traceback" not in error
    assert names(tmp_path) == {"photo.png"}


def test_help_is_fast_and_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys; from fsvideo_pipeline.cli import main; code = main(sys.argv[1:]);"
        "print(sorted({'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    for arguments, heavy in ((["--help"], "[]"), (["generate", "--help"], "['numpy']")):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = python(code, *arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "usage: fsvideo" in done.stdout
        assert done.stdout.splitlines()[-1] == heavy
        # Time on the processor, which other processes on the machine do not stretch.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.7


def test_the_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--help"]) == 0
    text = capsys.readouterr().out
    for flag in ("--output", "--seed", "--size", "--frames", "--fps", "--steps", "--guidance", "--model"):
        assert flag in text
    assert "--keep-latents" in text
    assert "--no-metadata" in text


def assert_same_video(path: Path, frames: np.ndarray, folder: Path) -> None:
    """The file holds these frames, but for what the codec does to them.

    Frames that differ by rounding in a few pixels may be coded quite differently, each as well as the other: what is
    compared is the distance to the frames.
    """
    write_video(folder / "expected.mp4", frames, fps=probe(path).fps)
    expected, given = (read_video(file)[0].numpy().astype(int) for file in (folder / "expected.mp4", path))
    loss = abs(expected - frames).mean()
    assert abs(given - frames).mean() < 1.05 * loss
    assert abs(given[::-1] - frames).mean() > 1.05 * loss


def assert_one_sentence(capsys: pytest.CaptureFixture[str], words: str) -> None:
    """One line on stderr with these words, nothing on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fsvideo: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
