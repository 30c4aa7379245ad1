"""Checkpoints fit exactly or are refused in words; what is saved is whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file
from torch import nn

from fsae.errors import CheckpointError, UserError
from fsae.model import FSAE
from fsae.storage.checkpoint import StrictModelMixin, load_state, save_state, tensor_shapes

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
SMALL_SHARDS = {"max_shard_size": 600}  # bytes


class Toy(StrictModelMixin):
    """Three layers and a buffer."""

    presets = {"small": {"width": 8}, "wide": {"width": 16, "depth": 3}}

    @register_to_config
    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.register_buffer("scale", torch.arange(width, dtype=torch.float32))


def saved(folder: Path, **kwargs: Any) -> Toy:
    torch.manual_seed(0)
    toy = Toy()
    toy.save_pretrained(folder, **kwargs)
    return toy


def assert_same(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert list(left) == list(right)
    for key, tensor in left.items():
        assert torch.equal(tensor, right[key]), key


class ToyPipeline(DiffusionPipeline):
    """diffusers' own saving and loading, of one component."""

    def __init__(self, autoencoder: FSAE) -> None:
        super().__init__()
        self.register_modules(autoencoder=autoencoder)


def rewrite(folder: Path, change: Any) -> None:
    """Let `change` edit the state of a single-file checkpoint."""
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


@pytest.mark.parametrize("kwargs", [{}, SMALL_SHARDS, {"variant": "fp16"}, {"variant": "fp16", **SMALL_SHARDS}])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_round_trip(tmp_path: Path, kwargs: dict[str, Any], low_cpu_mem_usage: bool) -> None:
    toy = saved(tmp_path, **kwargs)
    loaded = Toy.from_pretrained(tmp_path, variant=kwargs.get("variant"), low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same(toy, loaded)
    assert loaded.config.width == 8
    assert any(name.startswith(".tmp-") for name in os.listdir(tmp_path)) is False


def test_loading_options_pass_through(tmp_path: Path) -> None:
    saved(tmp_path / "part")
    loaded = Toy.from_pretrained(tmp_path, subfolder="part", torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    loaded, info = Toy.from_pretrained(str(tmp_path / "part"), output_loading_info=True)  # type: ignore[misc]
    assert info["missing_keys"] == []


def drop(state: dict[str, torch.Tensor]) -> None:
    del state["layers.1.bias"]


def rename(state: dict[str, torch.Tensor]) -> None:
    state["layers.1.biass"] = state.pop("layers.1.bias")


def add(state: dict[str, torch.Tensor]) -> None:
    state["layers.2.bias"] = torch.zeros(8)


def reshape(state: dict[str, torch.Tensor]) -> None:
    state["layers.0.weight"] = torch.zeros(8, 4)


MISFITS = [
    (drop, r"lacks 'layers.1.bias' \(nearest: 'layers.\d.bias'\).* 1 missing, 0 unknown and 0 misshapen"),
    (rename, r"lacks 'layers.1.bias' \(nearest: 'layers.1.biass'\).* 1 missing, 1 unknown and 0 misshapen"),
    (add, r"holds 'layers.2.bias', .*\(nearest: 'layers.\d.bias'\).* 0 missing, 1 unknown"),
    (reshape, r"holds 'layers.0.weight' as \[8, 4\], where the model has \[8, 8\]"),
]


@pytest.mark.parametrize(("change", "words"), MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path: Path, change: Any, words: str) -> None:
    saved(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=words):
        Toy.from_pretrained(tmp_path)


@pytest.mark.parametrize(("change", "words"), MISFITS)
def test_plain_modules_are_as_strict_and_stay_untouched(tmp_path: Path, change: Any, words: str) -> None:
    saved(tmp_path)
    rewrite(tmp_path, change)
    module, before = Toy(), Toy()
    before.load_state_dict(module.state_dict())
    with pytest.raises(CheckpointError, match=words):
        load_state(module, tmp_path / WEIGHTS)
    assert_same(module, before)


def test_a_config_that_contradicts_the_weights_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth": 3}))
    with pytest.raises(CheckpointError, match=r"lacks 'layers.2.weight'"):
        Toy.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", [{"width": "wide"}, {"width": -1}])
def test_a_config_of_no_model_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    saved(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config.json describes no Toy \(\w+Error: "):
        Toy.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"Toy cannot be built with .*width.*correct the values"):
        Toy.from_preset("small", **config)


def test_a_model_of_another_class_is_refused_in_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Other(Toy):
        pass

    saved(tmp_path / "toy")
    Other().save_pretrained(tmp_path / "other")
    sentence = f"{tmp_path / 'other'} holds a saved Other, where Toy is read; give the folder of such"
    for read in (Toy.from_pretrained, Toy.outline):
        with pytest.raises(CheckpointError, match=f"^{sentence}$"):
            read(str(tmp_path / "other"))
    assert capfd.readouterr() == ("", "")
    assert_same(Other.from_pretrained(tmp_path / "toy"), Toy.from_pretrained(tmp_path / "toy"))  # its base class


@pytest.mark.parametrize("kept", [0, 4, 40, 0.5, 0.999])
def test_a_weights_file_cut_short_is_refused(tmp_path: Path, kept: float) -> None:
    saved(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    for load in (lambda: Toy.from_pretrained(tmp_path), lambda: load_state(Toy(), tmp_path / WEIGHTS)):
        with pytest.raises(CheckpointError, match=r"cut short .* copy it again"):
            load()


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    def refused(words: str, folder: Path) -> None:
        with pytest.raises(CheckpointError, match=words):
            Toy.from_pretrained(folder)

    refused(r"no model folder .*nowhere", tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    refused(r"no model folder .*file", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    refused(r"there is no .*config.json", tmp_path / "empty")
    saved(tmp_path / "weightless")
    (tmp_path / "weightless" / WEIGHTS).unlink()
    refused(r"there is no weights file .*diffusion_pytorch_model.safetensors", tmp_path / "weightless")
    saved(tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("{")
    refused(r"config.json cannot be read as JSON", tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("[]")
    refused(r"holds no JSON object", tmp_path / "broken")
    saved(tmp_path / "pointer")
    (tmp_path / "pointer" / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(r"git lfs pull", tmp_path / "pointer")


def test_pickles_are_neither_read_nor_written(tmp_path: Path) -> None:
    toy = saved(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save(toy.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="there is no weights file"):
        Toy.from_pretrained(tmp_path, use_safetensors=False)
    with pytest.raises(UserError, match="safetensors only"):
        toy.save_pretrained(tmp_path, safe_serialization=False)


def test_shards_missing_cut_short_or_misplaced_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, **SMALL_SHARDS)
    index = json.loads((tmp_path / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    whole = (tmp_path / shards[-1]).read_bytes()

    (tmp_path / shards[-1]).write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=rf"{shards[-1]} is cut short"):
        Toy.from_pretrained(tmp_path)
    (tmp_path / shards[-1]).unlink()
    with pytest.raises(CheckpointError, match=rf"there is no weights file .*{shards[-1]}"):
        Toy.from_pretrained(tmp_path)
    (tmp_path / shards[-1]).write_bytes(whole)
    for weight_map, words in [
        ({key: shards[0] for key in index["weight_map"]}, r"places .* which lacks it"),
        ({key: "../" + shard for key, shard in index["weight_map"].items()}, "no plain file name"),
        (
            {key: shard for key, shard in index["weight_map"].items() if key != "scale"},
            "does not list 'scale'",
        ),
    ]:
        (tmp_path / INDEX).write_text(json.dumps({**index, "weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=words):
            Toy.from_pretrained(tmp_path)


def test_a_later_save_leaves_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    saved(tmp_path, **SMALL_SHARDS)
    saved(tmp_path, variant="fp16")
    (tmp_path / "README.md").write_text("kept")
    toy = saved(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
        WEIGHTS,
    ]
    assert_same(toy, Toy.from_pretrained(tmp_path))
    saved(tmp_path, **SMALL_SHARDS)
    assert WEIGHTS not in os.listdir(tmp_path)
    assert_same(toy, Toy.from_pretrained(tmp_path))


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = saved(tmp_path)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        Toy().save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", WEIGHTS]
    assert_same(toy, Toy.from_pretrained(tmp_path))


def test_only_the_main_process_writes_and_a_file_is_no_folder(tmp_path: Path) -> None:
    Toy().save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").write_text("")
    with pytest.raises(UserError, match="it is a file"):
        Toy().save_pretrained(tmp_path / "b")


def test_presets() -> None:
    assert Toy.from_preset("wide").config.depth == 3
    overridden = Toy.from_preset("wide", depth=1)
    assert (overridden.config.width, overridden.config.depth) == (16, 1)
    assert Toy.presets["wide"] == {"width": 16, "depth": 3}
    with pytest.raises(UserError, match=r"no preset 'smal' \(nearest: 'small'\); choose one of small, wide"):
        Toy.from_preset("smal")
    with pytest.raises(UserError, match=r"no option 'dept' \(nearest: 'depth'\)"):
        Toy.from_preset("small", dept=1)


def test_a_hub_name_is_downloaded_and_checked_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = saved(tmp_path / "part")
    asked: list[tuple[Any, ...]] = []

    def download(name: str, allow_patterns: list[str], **options: Any) -> str:
        asked.append((name, allow_patterns, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same(toy, Toy.from_pretrained("someone/toy", subfolder="part", revision="v1"))
    assert asked == [("someone/toy", ["part/*.json", "part/*.safetensors"], {"revision": "v1"})]
    rewrite(tmp_path / "part", drop)
    with pytest.raises(CheckpointError, match="lacks 'layers.1.bias'"):
        Toy.from_pretrained("someone/toy", subfolder="part")

    def fail(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"no model folder someone/toy, nor could it be had from the Hub"):
        Toy.from_pretrained("someone/toy")


def test_plain_modules_and_dictionaries_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, other = Toy(), Toy()
    save_state(module, tmp_path / "a.safetensors")
    load_state(other, tmp_path / "a.safetensors")
    assert_same(module, other)

    tied = torch.arange(6.0).reshape(2, 3)
    save_state({"one": tied, "two": tied, "turned": tied.T}, tmp_path / "b.safetensors")
    loaded = load_file(tmp_path / "b.safetensors")
    assert torch.equal(loaded["one"], tied)
    assert torch.equal(loaded["two"], tied)
    assert torch.equal(loaded["turned"], tied.T)
    assert tensor_shapes(tmp_path / "b.safetensors") == {"one": (2, 3), "two": (2, 3), "turned": (3, 2)}
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]


def test_loading_keeps_the_modules_dtype(tmp_path: Path) -> None:
    save_state(Toy(), tmp_path / "a.safetensors")
    module = Toy().to(torch.bfloat16)
    load_state(module, tmp_path / "a.safetensors")
    assert module.dtype == torch.bfloat16


def test_a_pipeline_of_diffusers_saves_and_loads_our_models(tmp_path: Path) -> None:
    model = FSAE.from_preset("tiny")
    ToyPipeline(model).save_pretrained(tmp_path)
    loaded = ToyPipeline.from_pretrained(tmp_path).autoencoder
    assert isinstance(loaded, FSAE)
    assert_same(loaded, model)

    weights = tmp_path / "autoencoder" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        ToyPipeline.from_pretrained(tmp_path)


def test_a_saved_config_does_not_say_where_its_model_was_loaded_from(tmp_path: Path) -> None:
    saved(tmp_path / "first")
    Toy.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert str(tmp_path) not in (tmp_path / "second" / "config.json").read_text()
    Toy.from_pretrained(tmp_path / "second")


def test_saved_weights_can_be_read_by_whoever_reads_the_folder(tmp_path: Path) -> None:
    Toy().save_pretrained(tmp_path / "a")
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "a").iterdir()}
    assert modes == {(tmp_path / "other").stat().st_mode}


def test_an_outline_has_the_shapes_and_no_weight(tmp_path: Path) -> None:
    saved(tmp_path)
    for outline in (Toy.outline(str(tmp_path)), Toy.outline("wide", depth=2)):
        assert all(parameter.is_meta for parameter in outline.parameters())
        assert outline.config.depth == 2 == len(outline.layers)
    with pytest.raises(UserError, match="neither a preset"):
        Toy.outline(str(tmp_path / "none"))
    with pytest.raises(UserError, match="has no option 'deep'"):
        Toy.outline("wide", deep=2)
    with pytest.raises(UserError, match=r"has no option 'sel' \(nearest: '(?!self)"):
        Toy.outline("wide", sel=2)
    (tmp_path / WEIGHTS).write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match="cut short"):
        Toy.outline(str(tmp_path))
