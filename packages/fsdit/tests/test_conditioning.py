"""Text, image and known latents on their way into the transformer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import UMT5EncoderModel

from fsae.errors import CheckpointError, UserError
from fsdit.conditioning import (
    ImageEncoder,
    TextEncoder,
    first_frame_condition,
    load_encoders,
    load_text_encoder,
    model_input,
    nano_tokenizer,
)
from fsdit.conditioning.encoders import clean_prompt, resize_for_clip
from fsdit.conditioning.nano import new_image_encoder, new_text_encoder
from fsdit.conditioning.pretrained import load_encoder


@pytest.fixture(scope="module")
def text() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(new_text_encoder().eval(), nano_tokenizer(), 32)


@pytest.fixture(scope="module")
def image() -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(new_image_encoder().eval())


def test_prompt_cleaning() -> None:
    assert clean_prompt("  a\tcat &amp;amp; a\n dog ") == "a cat & a dog"
    assert clean_prompt("schÃ¶n") == "schön"
    assert clean_prompt("") == ""


def test_text_is_padded_with_zeros_behind_the_encoder(text: TextEncoder) -> None:
    with torch.no_grad():
        got = text(["pan left", "zoom  in &amp; out"])
        assert got.embeddings.shape == (2, 32, 128)
        assert got.tokens == (9, 14) and got.dropped == (0, 0)  # one a byte, and the end token
        for row, prompt in enumerate(["pan left", "zoom in & out"]):
            ids = torch.tensor([[b + 3 for b in prompt.encode()] + [1]])
            alone = text.model(input_ids=ids).last_hidden_state[0]
            length = got.tokens[row]
            assert torch.allclose(got.embeddings[row, :length], alone, atol=1e-5)
            assert not got.embeddings[row, length:].any()


def test_long_and_empty_prompts(text: TextEncoder) -> None:
    ids, dropped = text.tokenize("x" * 10_000)
    assert len(ids) == 32 and ids[-1] == text.tokenizer.eos_token_id and dropped == 10_001 - 32
    assert text.tokenize("x" * 31) == ([123] * 31 + [1], 0)  # exactly full
    with torch.no_grad():
        got = text(["", "x" * 10_000])
    assert got.tokens == (1, 32) and got.dropped == (0, 9969)


def test_image_features_are_the_state_before_the_last_block(image: ImageEncoder) -> None:
    tower, pictures = image.model, torch.rand(2, 3, 90, 50) * 2 - 1
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    squares = F.interpolate((pictures + 1) / 2, (64, 64), mode="bicubic", antialias=False, align_corners=False)
    pixels = (squares - mean) / std
    assert torch.allclose(image.pixel_values(pictures), pixels, atol=1e-5)
    with torch.no_grad():
        state = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer in tower.encoder.layers[:-1]:
            state = layer(state, attention_mask=None)
            state = state[0] if isinstance(state, tuple) else state
        got = image(pictures)
    assert got.shape == (2, 17, 128)
    assert torch.allclose(got, state, atol=1e-4)


def test_encoders_are_differentiable_up_to_the_last_block(image: ImageEncoder, text: TextEncoder) -> None:
    unused = {id(p) for p in image.unused_parameters()}
    picture = torch.zeros(1, 3, 40, 40, requires_grad=True)
    (image(picture).square().sum() + text(["a"]).embeddings.square().sum()).backward()
    assert picture.grad.abs().sum() > 0
    assert all((p.grad is None) == (id(p) in unused) for p in image.model.parameters())
    assert all(p.grad is not None for p in text.model.parameters())


def test_resizing_twice_is_resizing_once() -> None:
    once = resize_for_clip(torch.rand(1, 3, 50, 70), 64)
    assert torch.equal(resize_for_clip(once, 64), once)


def test_first_frame_condition() -> None:
    first = torch.randn(2, 8, 1, 3, 2)
    condition = first_frame_condition(first, 4, mask_channels=4)
    assert torch.equal(condition.latents[:, :, :1], first) and not condition.latents[:, :, 1:].any()
    assert condition.mask.shape == (2, 4, 4, 3, 2)
    assert condition.mask[:, :, 0].eq(1).all() and not condition.mask[:, :, 1:].any()
    assert first_frame_condition(first, 1).latents.shape == first.shape
    noisy = torch.randn(2, 8, 4, 3, 2)
    stacked = model_input(noisy, condition)
    assert torch.equal(stacked, torch.cat([noisy, condition.mask, condition.latents], dim=1))
    for wrong in (torch.zeros(1, 8, 2, 3, 2), torch.zeros(8, 1, 3, 2)):
        with pytest.raises(ValueError, match="a first latent B C 1 h w"):
            first_frame_condition(wrong, 4)
    for wrong in (noisy[:1], noisy[:, :, :3], noisy[..., :1]):
        with pytest.raises(ValueError, match="only C may differ"):
            model_input(wrong, condition)


def test_what_is_no_list_of_prompts_and_no_batch_of_images_is_refused(text: TextEncoder, image: ImageEncoder) -> None:
    for prompts in ("a cat", []):
        with pytest.raises(ValueError, match="give a list of prompts"):
            text(prompts)
    for images in (torch.zeros(1, 3, 5, 16, 16), torch.zeros(3, 16, 16)):
        with pytest.raises(ValueError, match="expected images B 3 H W"):
            image(images)


def test_saved_in_pipeline_layout_and_loaded(tmp_path, text: TextEncoder, image: ImageEncoder) -> None:
    text.model.save_pretrained(tmp_path / "text_encoder")
    text.tokenizer.save_pretrained(tmp_path / "tokenizer")
    image.model.save_pretrained(tmp_path / "image_encoder")
    text2, image2 = load_encoders(tmp_path, 32)
    prompts, picture = ["héllo", "a"], torch.rand(1, 3, 20, 30)
    with torch.no_grad():
        assert torch.equal(text(prompts).embeddings, text2(prompts).embeddings)
        assert torch.equal(image(picture), image2(picture))

    weights = tmp_path / "image_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="image_encoder.*cut short"):
        load_encoders(tmp_path, 32)
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "text_encoder" / "model.safetensors")
    del state["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(state, tmp_path / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="'encoder.block.1.layer.0.SelfAttention.q.weight' is missing"):
        load_encoders(tmp_path, 32)
    with pytest.raises(UserError, match="neither"):
        load_encoders(tmp_path / "absent", 32)
    with pytest.raises(CheckpointError, match="holds a 'clip_vision_model' model, where 'umt5' is read"):
        load_encoder(UMT5EncoderModel, tmp_path / "image_encoder")  # before it is built: its size would be UMT5's own


# --- a folder is data, never a program


@pytest.fixture
def encoders(tmp_path: Path, text: TextEncoder, image: ImageEncoder) -> Path:
    text.model.save_pretrained(tmp_path / "text_encoder")
    text.tokenizer.save_pretrained(tmp_path / "tokenizer")
    image.model.save_pretrained(tmp_path / "image_encoder")
    return tmp_path


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_code_in_a_tokenizers_folder_is_never_run(encoders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = encoders / "it-ran"
    (encoders / "tokenizer" / "own.py").write_text(
        f"open({str(proof)!r}, 'w').close()\nfrom transformers import ByT5Tokenizer\n\n\n"
        "class Own(ByT5Tokenizer):\n    pass\n"
    )
    edit(encoders / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers asks at a terminal
    with pytest.raises(UserError, match=r"names code of its own, auto_map .*own\.Own.* accepted are .*ByT5Tokenizer"):
        load_text_encoder(encoders, 32)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["Own", "BertTokenizer", "", 3, None])
def test_a_tokenizer_of_another_class_is_refused(name: object, encoders: Path) -> None:
    edit(encoders / "tokenizer" / "tokenizer_config.json", tokenizer_class=name)
    with pytest.raises(UserError, match=re.escape(f"names the tokenizer {name!r}; accepted are") + ".*T5Tokenizer"):
        load_text_encoder(encoders, 32)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_attention_that_would_be_downloaded_is_refused(key: str, encoders: Path) -> None:
    config = encoders / "text_encoder" / "config.json"
    repository = "someone/attention:forward"
    for value in (repository, "someone/attention", "paged|someone/attention", {"": "sdpa", "encoder": repository}):
        edit(config, **{key: value})
        with pytest.raises(UserError, match="names the attention '.*someone/attention.*'; accepted are eager, sdpa"):
            load_text_encoder(encoders, 32)
    edit(config, **{key: None}, part={"of_it": {key: repository}})
    with pytest.raises(UserError, match="someone/attention"):
        load_text_encoder(encoders, 32)
    edit(config, part=None)
    for value in ("eager", {"": "eager"}):
        edit(config, **{key: value})
        assert load_text_encoder(encoders, 32).model.config._attn_implementation == "eager"
