"""Prompt embeddings on disk, and encoders that are loaded, used and freed."""

from __future__ import annotations

import gc
import json
import multiprocessing
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

from fsae.errors import CheckpointError, UserError
from fsae.storage.fingerprint import tensor_fingerprint
from fsdit.conditioning import ImageEncoder, TextEncoder, load_text_encoder, nano_tokenizer
from fsdit.conditioning.folders import image_encoder_fingerprint, loaded, text_encoder_fingerprint
from fsdit.conditioning.nano import new_image_encoder
from fsdit.preparation import prompts
from fsdit.preparation.prompts import PromptCache

TEXT_LEN = 24
PROMPTS = ["a cat", "", "  a   cat &amp;amp; a dog", "x" * 100, "a cat"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=384, d_model=16, d_kv=8, num_heads=2, num_layers=2, d_ff=16)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    nano_tokenizer().save_pretrained(folder / "tokenizer")
    new_image_encoder().save_pretrained(folder / "image_encoder")
    return folder


class Loader:
    """Loads the text encoder, counts how often, and watches its weights."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.loads = folder, 0
        self.weights: list[weakref.ref[Any]] = []

    def __call__(self) -> TextEncoder:
        self.loads += 1
        encoder = load_text_encoder(self.folder, TEXT_LEN)
        self.weights += [weakref.ref(parameter) for parameter in encoder.parameters()]
        return encoder


def prompt_cache(folder: Path, encoders: Path) -> PromptCache:
    return PromptCache(folder, text_encoder_fingerprint(encoders), TEXT_LEN)


def test_equals_the_encoder_and_loads_it_once(tmp_path: Path, encoders: Path) -> None:
    load = Loader(encoders)
    cache = prompt_cache(tmp_path / "prompts", encoders)
    assert cache.get("a cat") is None
    got = cache.encode(PROMPTS, load)
    assert load.loads == 1
    with torch.no_grad():
        want = load_text_encoder(encoders, TEXT_LEN).eval()(PROMPTS)
    assert torch.allclose(got.embeddings, want.embeddings, atol=1e-5)
    assert (got.tokens, got.dropped) == (want.tokens, want.dropped)
    assert got.tokens == (6, 1, 14, 24, 6) and got.dropped == (0, 0, 0, 77, 0)
    (shard,) = tmp_path.rglob("*.safetensors")
    assert len(load_file(shard)["keys"]) == 4  # one prompt comes twice

    again = cache.encode(["a  cat ", "", "a cat & a dog"], load)  # cleaned alike
    assert load.loads == 1
    assert torch.equal(again.embeddings, got.embeddings[:3])
    assert cache.fill([*PROMPTS, "a new one"], load) == 1 and load.loads == 2


def test_an_entry_does_not_depend_on_those_made_with_it(tmp_path: Path, encoders: Path) -> None:
    many = [*PROMPTS, *(f"{'very ' * (k % 5)}old cat number {k}" for k in range(40))]
    together = prompt_cache(tmp_path / "a", encoders).encode(many, Loader(encoders))
    for number in (0, 1, 3, 20, 41):
        alone = prompt_cache(tmp_path / str(number), encoders).encode([many[number]], Loader(encoders))
        assert torch.equal(together.embeddings[number], alone.embeddings[0])


def test_prompts_are_encoded_in_batches_of_few_shapes(
    tmp_path: Path, encoders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(prompts, "_BATCH", 4)
    monkeypatch.setattr(prompts, "_MULTIPLE", 8)
    monkeypatch.setattr(prompts, "_IN_A_FILE", 20)

    def load() -> TextEncoder:
        encoder = load_text_encoder(encoders, TEXT_LEN)
        encoder.model.register_forward_pre_hook(
            lambda _, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
        )
        return encoder

    many = [f"{k}{'x' * (k % 11)}" for k in range(30)]
    cache = prompt_cache(tmp_path, encoders)
    got = cache.encode(many, load)
    assert set(shapes) == {(4, 8), (4, 16)} and len(shapes) <= 12
    with torch.no_grad():
        want = load_text_encoder(encoders, TEXT_LEN).eval()(many)
    assert torch.allclose(got.embeddings, want.embeddings, atol=1e-5) and got.tokens == want.tokens
    assert [len(load_file(path)["keys"]) for path in tmp_path.iterdir()] in ([20, 10], [10, 20])
    again = prompt_cache(tmp_path, encoders)
    assert torch.equal(again.encode(many[::-1], load).embeddings, got.embeddings.flip(0)) and len(shapes) <= 12


def test_entries_in_files_of_their_own_are_still_read(tmp_path: Path, encoders: Path) -> None:
    cache, load = prompt_cache(tmp_path, encoders), Loader(encoders)
    key, rows = cache.key("a cat"), torch.randn(6, 16)
    about = {"key": key, "sha256": tensor_fingerprint(rows), "dropped": 2, "prompt": "a cat", "text_len": TEXT_LEN}
    (tmp_path / key[:2]).mkdir()
    path = tmp_path / key[:2] / f"{key}.safetensors"
    save_file({"text": rows}, path, metadata={"entry": json.dumps(about)})
    got = cache.encode(["a cat"], load)
    assert torch.equal(got.embeddings[0, :6], rows) and got.dropped == (2,) and load.loads == 0
    path.write_bytes(path.read_bytes()[:-1])
    assert cache.get("a cat") is None and cache.fill(["a cat"], load) == 1


def test_the_key_is_of_all_that_decides(tmp_path: Path, encoders: Path) -> None:
    cache = prompt_cache(tmp_path, encoders)
    keys = {cache.key("a cat"), cache.key("a dog"), PromptCache(tmp_path, cache.fingerprint, 23).key("a cat")}
    assert len(keys) == 3 and cache.key("a cat") == cache.key(" a\tcat")

    fingerprints = {text_encoder_fingerprint(encoders)}

    def changed(change: Any) -> Path:
        folder = tmp_path / f"changed{len(fingerprints)}"
        shutil.copytree(encoders, folder)
        change(folder)
        return folder

    def weights(folder: Path) -> None:
        state = load_file(folder / "text_encoder/model.safetensors")
        state["encoder.final_layer_norm.weight"] *= 1.001
        save_file(state, folder / "text_encoder/model.safetensors", metadata={"format": "pt"})

    def configuration(folder: Path) -> None:
        path = folder / "text_encoder/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "layer_norm_epsilon": 1e-3}))

    def tokenizer(folder: Path) -> None:
        path = folder / "tokenizer/tokenizer_config.json"
        path.write_text(path.read_text() + " ")

    for number, change in enumerate((weights, configuration, tokenizer)):
        fingerprints.add(text_encoder_fingerprint(changed(change)))
        assert len(fingerprints) == number + 2

    def version(folder: Path) -> None:
        path = folder / "text_encoder/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "transformers_version": "9", "_name_or_path": "x"}))

    assert text_encoder_fingerprint(changed(version)) == text_encoder_fingerprint(encoders)
    assert image_encoder_fingerprint(encoders) != text_encoder_fingerprint(encoders)
    shutil.rmtree(tmp_path / "changed1" / "tokenizer")
    with pytest.raises(CheckpointError, match="there is no folder .*tokenizer"):
        text_encoder_fingerprint(tmp_path / "changed1")
    with pytest.raises(UserError, match="is no folder"):
        text_encoder_fingerprint(tmp_path / "absent")


def test_damaged_entries_are_made_anew(tmp_path: Path, encoders: Path) -> None:
    cache, load = prompt_cache(tmp_path / "a", encoders), Loader(encoders)
    want = cache.encode(["a cat", "a dog"], load).embeddings
    prompt_cache(tmp_path / "b", encoders).encode(["a dog", "no"], load)
    (path,), (other,) = (list((tmp_path / name).iterdir()) for name in "ab")
    good = path.read_bytes()
    end = len(good) - len(load_file(path)["rows"].flatten()) * 4  # of what comes before the rows, if they are last
    flipped = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in (end + 5, len(good) - 1)]
    for number, bad in enumerate((b"", good[:-7], *flipped, other.read_bytes(), b"{}" * 50)):
        for file in (tmp_path / "a").iterdir():
            file.unlink()
        path.write_bytes(bad)
        for damaged in (cache, prompt_cache(tmp_path / "a", encoders)):
            missing = [prompt for prompt in ("a cat", "a dog") if damaged.get(prompt) is None]
            assert missing
            with pytest.raises(UserError, match="missing or damaged"):
                damaged.require(missing[0])
        assert torch.equal(damaged.encode(["a cat", "a dog"], load).embeddings, want)
        assert load.loads == 3 + number
        cache = prompt_cache(tmp_path / "a", encoders)
    assert torch.equal(cache.encode(["a cat"], load).embeddings, want[:1]) and load.loads == 8


def test_nothing_holds_the_encoder_afterwards(tmp_path: Path, encoders: Path) -> None:
    load = Loader(encoders)
    prompt_cache(tmp_path, encoders).encode(["a cat"], load)
    assert load.weights
    assert all(weight() is None for weight in load.weights)  # without waiting for the garbage collector

    watched: list[weakref.ref[Any]] = []
    with loaded(lambda: ImageEncoder(new_image_encoder())) as encoder:
        watched += [weakref.ref(parameter) for parameter in encoder.parameters()]
        assert not encoder.training
        assert encoder(torch.zeros(1, 3, 64, 64)).shape == (1, 17, 128)
    gc.collect()
    assert all(weight() is None for weight in watched)  # though the encoder itself is held here
    assert all(parameter.is_meta for parameter in encoder.parameters())

    with pytest.raises(RuntimeError, match="in use"), loaded(lambda: ImageEncoder(new_image_encoder())) as encoder:
        raise RuntimeError("in use")
    assert next(encoder.parameters()).is_meta


def _fill(folder: Path, encoders: Path, start: Any) -> None:
    start.wait()
    prompt_cache(folder, encoders).fill(
        [f"prompt {n}" for n in range(8)], lambda: load_text_encoder(encoders, TEXT_LEN)
    )


def test_several_processes_fill_one_folder(tmp_path: Path, encoders: Path) -> None:
    forked = multiprocessing.get_context("fork")
    start = forked.Barrier(3)
    processes = [forked.Process(target=_fill, args=(tmp_path, encoders, start)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert 1 <= len(files) <= 3 and not any(path.name.startswith(".") for path in files)
    load = Loader(encoders)
    prompt_cache(tmp_path, encoders).encode([f"prompt {n}" for n in range(8)], load)
    assert load.loads == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, encoders: Path) -> None:
    (tmp_path / "prompts").write_text("a file")
    with pytest.raises(UserError, match="cannot write .*make room, or give another place"):
        prompt_cache(tmp_path / "prompts", encoders).fill(["a"], Loader(encoders))
