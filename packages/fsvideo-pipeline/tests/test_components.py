"""Model folders: a round trip through diffusers' layout, and every way in which one can be broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fsae.errors import CheckpointError, UserError
from fsvideo_pipeline.pipeline import FSVideoPipeline
from fsvideo_pipeline.settings import MODEL_INDEX, Settings, packaged_model, read_index, read_settings

MODULES = ("autoencoder", "text_encoder", "image_encoder", "transformer", "upsampler", "refiner")


def weights_of(folder: Path, component: str) -> Path:
    return next((folder / component).glob("*.safetensors"))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / MODEL_INDEX).read_text())
    change(index)
    (folder / MODEL_INDEX).write_text(json.dumps(index))


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_a_round_trip_keeps_every_tensor_and_setting(pipeline: FSVideoPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "again")
    again = FSVideoPipeline.from_pretrained(tmp_path / "again")
    assert again.settings == pipeline.settings
    assert again.mask.config.error_95 == 2.0
    assert again.tokenizer("ab")["input_ids"] == pipeline.tokenizer("ab")["input_ids"]
    for name in MODULES:
        before, after = (getattr(p, name).state_dict() for p in (pipeline, again))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert not getattr(again, name).training


def test_components_make_a_pipeline_of_the_same_settings(pipeline: FSVideoPipeline) -> None:
    """Diffusers' ways to share models: by components, with the parameters as well, and by `from_pipe`."""
    for again in (
        FSVideoPipeline(**pipeline.components),
        FSVideoPipeline(**pipeline.components, **pipeline.parameters),
        FSVideoPipeline.from_pipe(pipeline),
    ):
        assert again.settings == pipeline.settings != Settings()
        assert all(getattr(again, name) is getattr(pipeline, name) for name in (*MODULES, "tokenizer", "mask"))
    other = FSVideoPipeline(**{**pipeline.components, "settings": Settings(steps=7)})
    assert other.settings == Settings(steps=7)


def test_the_layout_is_diffusers(saved: Path) -> None:
    index = read_index(saved)
    assert index["_class_name"] == "FSVideoPipeline"
    assert index["transformer"] == ["fsdit.model", "FSDiT"]
    for name in (*MODULES, "tokenizer", "mask"):
        assert isinstance(index[name], list)
        assert (saved / name).is_dir()
    assert read_settings(saved) == Settings(**index["settings"])
    assert not [path for path in saved.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


def test_half_precision_is_saved_as_such_and_loads_as_float32(saved: Path, tmp_path: Path) -> None:
    pipeline = FSVideoPipeline.from_pretrained(saved)
    for name in MODULES:
        getattr(pipeline, name).half()
    pipeline.save_pretrained(tmp_path / "half")
    size = sum(weights_of(tmp_path / "half", name).stat().st_size for name in MODULES)
    assert size < 0.6 * sum(weights_of(saved, name).stat().st_size for name in MODULES)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = FSVideoPipeline.from_pretrained(tmp_path / "half", torch_dtype=dtype)
        for name in MODULES:
            assert next(getattr(loaded, name).parameters()).dtype == dtype


def test_a_component_that_is_given_need_not_be_in_the_folder(pipeline: FSVideoPipeline, copy: Path) -> None:
    shutil.rmtree(copy / "refiner")
    loaded = FSVideoPipeline.from_pretrained(copy, refiner=pipeline.refiner)
    assert loaded.refiner is pipeline.refiner
    with pytest.raises(UserError, match="from_pretrained was given 'vae'"):
        FSVideoPipeline.from_pretrained(copy, vae=pipeline.autoencoder)


@pytest.mark.parametrize("name", MODULES)
def test_missing_weights_are_named(name: str, copy: Path) -> None:
    path = weights_of(copy, name)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"no weights file {path}"):
        FSVideoPipeline.from_pretrained(copy)


@pytest.mark.parametrize("name", MODULES)
def test_weights_cut_short_are_named(name: str, copy: Path) -> None:
    path = weights_of(copy, name)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{path} is cut short"):
        FSVideoPipeline.from_pretrained(copy)


@pytest.mark.parametrize("name", ["text_encoder", "image_encoder", "transformer"])
def test_a_missing_an_unknown_and_a_misshapen_tensor_are_errors(name: str, copy: Path) -> None:
    path = weights_of(copy, name)
    key = min(key for key in load_file(path) if "norm" in key)
    original = path.read_bytes()

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["stray"] = tensors.pop(key)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[key]

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["stray"] = torch.zeros(1)

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = torch.zeros(tensors[key].shape[0] + 1, *tensors[key].shape[1:])

    for change, word in ((rename, key), (drop, key), (add, "stray"), (grow, key)):
        path.write_bytes(original)
        edit_weights(path, change)
        with pytest.raises(CheckpointError, match=word.replace(".", r"\.")):
            FSVideoPipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    "file", ["text_encoder/config.json", "tokenizer/tokenizer_config.json", "mask/mask_config.json"]
)
def test_missing_and_broken_configurations_are_named(file: str, copy: Path) -> None:
    for content, words in ((None, "there is no"), ("{", "cannot be read as JSON"), ("[]", "no JSON object")):
        if content is None:
            (copy / file).unlink()
        else:
            (copy / file).write_text(content)
        with pytest.raises(CheckpointError, match=words):
            FSVideoPipeline.from_pretrained(copy)


def test_a_missing_component_is_named_before_any_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsvideo_pipeline.pipeline.load_component", lambda *given: pytest.fail(f"{given[0]} was read"))
    shutil.rmtree(copy / "upsampler")
    with pytest.raises(CheckpointError, match="there is no .*upsampler"):
        FSVideoPipeline.from_pretrained(copy)
    edit_index(copy, lambda index: index.pop("upsampler"))
    with pytest.raises(CheckpointError, match="lists no upsampler"):
        FSVideoPipeline.from_pretrained(copy)


@pytest.mark.parametrize("name", ["os", "CLIPModel", "NoSuchTokenizer", "torch"])
def test_only_a_tokenizer_of_transformers_is_built(name: str, copy: Path) -> None:
    edit_index(copy, lambda index: index.update(tokenizer=["transformers", name]))
    with pytest.raises(CheckpointError, match=f"names the tokenizer '{name}'"):
        FSVideoPipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.update(_class_name="WanPipeline"), "does not describe an FSVideoPipeline"),
        (lambda index: index.update(settings=[1]), "no JSON object"),
        (lambda index: index["settings"].update(stepps=3), "setting 'stepps'"),
        (lambda index: index["settings"].update(steps="30"), "sets steps to '30'"),
        (lambda index: index["settings"].update(fps=0), "sets fps to 0"),
    ],
)
def test_a_wrong_index_is_a_sentence(change: Callable[[dict[str, Any]], Any], words: str, copy: Path) -> None:
    edit_index(copy, change)
    with pytest.raises(CheckpointError, match=words):
        read_settings(copy)


def test_no_folder_and_no_index_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no model folder"):
        read_index(tmp_path / "none")
    with pytest.raises(CheckpointError, match=MODEL_INDEX):
        read_index(tmp_path)
    (tmp_path / MODEL_INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_index(tmp_path)


def test_an_installation_without_the_model_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsvideo_pipeline.settings.files", lambda package: tmp_path)
    with pytest.raises(UserError, match="holds no model; give one with --model"):
        packaged_model()
