"""Wan's encoders into transformers' folders: against both forward passes written out by Wan's names."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsae.errors import CheckpointError
from fsdit.cli import main
from fsdit.conditioning import ImageEncoder, load_encoders, nano_tokenizer
from fsdit.wan.encoders import image_encoder, open_encoders, text_encoder

TEXT_SHAPES: dict[str, tuple[int, ...]] = {
    "norm1.weight": (24,),
    "attn.q.weight": (32, 24),
    "attn.k.weight": (32, 24),
    "attn.v.weight": (32, 24),
    "attn.o.weight": (24, 32),
    "norm2.weight": (24,),
    "ffn.gate.0.weight": (40, 24),
    "ffn.fc1.weight": (40, 24),
    "ffn.fc2.weight": (24, 40),
    "pos_embedding.embedding.weight": (32, 4),
}
IMAGE_SHAPES: dict[str, tuple[int, ...]] = {
    "norm1": (160,),
    "attn.to_qkv": (480, 160),
    "attn.proj": (160, 160),
    "norm2": (160,),
    "mlp.0": (96, 160),
    "mlp.2": (160, 96),
}


def drawn(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        scale = 0.2 if len(shape) == 1 else shape[-1] ** -0.5
        state[name] = (noise * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0)).to(dtype)
    return state


@pytest.fixture(scope="module")
def text_state() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (384, 24), "norm.weight": (24,)}
    for block in range(2):
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in TEXT_SHAPES.items()}
    return drawn(shapes, torch.bfloat16)


@pytest.fixture(scope="module")
def image_state() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "log_scale": (),
        "textual.token_embedding.weight": (9, 8),
        "visual.cls_embedding": (1, 1, 160),
        "visual.pos_embedding": (1, 5, 160),
        "visual.patch_embedding.weight": (160, 3, 14, 14),
        "visual.head": (160, 12),
    }
    for norm in ("pre_norm", "post_norm"):
        shapes |= {f"visual.{norm}.weight": (160,), f"visual.{norm}.bias": (160,)}
    for block in range(3):
        for name, shape in IMAGE_SHAPES.items():
            shapes[f"visual.transformer.{block}.{name}.weight"] = shape
            shapes[f"visual.transformer.{block}.{name}.bias"] = shape[:1]
    shapes["visual.patch_embedding.weight"] = (160, 3, 14, 14)
    return drawn({name: shape for name, shape in shapes.items() if shape}, torch.float16) | {
        "log_scale": torch.tensor(2.6)
    }


@pytest.fixture
def original(text_state: dict[str, Tensor], image_state: dict[str, Tensor], tmp_path: Path) -> Path:
    folder = tmp_path / "Wan2.1-I2V"
    folder.mkdir()
    torch.save(text_state, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(image_state, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    nano_tokenizer().save_pretrained(folder / "google" / "umt5-xxl")
    return folder


# --- both forward passes, by Wan's names -------------------------------------------------------------------------


def relative_bucket(distance: int) -> int:
    """T5's 32 buckets: 16 a side, the first 8 exact, the others logarithmic up to 128."""
    side, distance = 16 * (distance > 0), abs(distance)
    if distance < 8:
        return side + distance
    return side + min(15, 8 + int(math.log(distance / 8) / math.log(128 / 8) * 8))


def text_features(state: dict[str, Tensor], ids: list[int]) -> Tensor:
    state = {name: tensor.double() for name, tensor in state.items()}

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[name]

    length = len(ids)
    buckets = torch.tensor([[relative_bucket(key - query) for key in range(length)] for query in range(length)])
    x = state["token_embedding.weight"][ids]
    for block in ("blocks.0.", "blocks.1."):
        h = rms(x, block + "norm1.weight")
        q, k, v = ((h @ state[f"{block}attn.{c}.weight"].T).view(length, 4, 8).transpose(0, 1) for c in "qkv")
        scores = q @ k.mT + state[block + "pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)
        attended = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, 32)
        x = x + attended @ state[block + "attn.o.weight"].T
        h = rms(x, block + "norm2.weight")
        gate = F.gelu(h @ state[block + "ffn.gate.0.weight"].T, approximate="tanh")
        x = x + ((h @ state[block + "ffn.fc1.weight"].T) * gate) @ state[block + "ffn.fc2.weight"].T
    return rms(x, "norm.weight")


def image_features(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The state before the last of three blocks, one picture."""
    state = {name.removeprefix("visual."): t.double() for name, t in state.items() if name.startswith("visual.")}

    def layer(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[name + ".weight"], state[name + ".bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (160,), state[name + ".weight"], state[name + ".bias"], 1e-5)

    patches = F.conv2d(pixels.double(), state["patch_embedding.weight"], stride=14).flatten(2).mT
    x = norm(torch.cat([state["cls_embedding"], patches], dim=1) + state["pos_embedding"], "pre_norm")
    for block in ("transformer.0.", "transformer.1."):
        qkv = layer(norm(x, block + "norm1"), block + "attn.to_qkv").view(1, 5, 3, 2, 80)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        attended = ((q @ k.mT) / math.sqrt(80)).softmax(-1) @ v
        x = x + layer(attended.transpose(1, 2).reshape(1, 5, 160), block + "attn.proj")
        x = x + layer(F.gelu(layer(norm(x, block + "norm2"), block + "mlp.0")), block + "mlp.2")
    return x


@torch.no_grad()
def test_the_converted_encoders_compute_what_wans_compute(
    original: Path,
    text_state: dict[str, Tensor],
    image_state: dict[str, Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "encoders"
    assert main(["convert", str(original), "-o", str(output), "--encoders"]) == 0
    said = capsys.readouterr().out
    assert "text_encoder" in said and "image_encoder" in said and f"saved {output}" in said
    text, image = load_encoders(output, 64)
    assert text.model.dtype == torch.bfloat16 and image.model.dtype == torch.float16
    prompt = "a cat walks to the left, then it looks up"
    ids, _ = text.tokenize(prompt)
    assert len(ids) == 42
    want = text_features(text_state, ids)
    text.model.double()
    got = text([prompt]).embeddings[0]
    assert (got[:42] - want).norm() < 1e-5 * want.norm() and not got[42:].any()
    assert isinstance(image, ImageEncoder)
    picture = torch.rand(1, 3, 28, 28) * 2 - 1
    want = image_features(image_state, image.pixel_values(picture))
    image.model.double()
    got = image(picture)
    assert got.shape == (1, 5, 160)
    assert (got - want).norm() < 1e-5 * want.norm()


def test_every_key_is_accounted_for(text_state: dict[str, Tensor], image_state: dict[str, Tensor]) -> None:
    text, image = text_encoder(text_state), image_encoder(image_state)
    assert set(text.report.carried) == set(text_state) and not text.report.dropped
    assert set(image.report.dropped) == {"log_scale", "textual.token_embedding.weight", "visual.head"}
    assert set(image.report.carried) | set(image.report.dropped) == set(image_state)
    for encoder in (text, image):
        unique = {parameter.data_ptr(): parameter.numel() for parameter in encoder.model.parameters()}
        assert sum(unique.values()) == encoder.report.parameters("carried")
    config = image.model.config
    assert (config.num_attention_heads, config.image_size, config.num_hidden_layers) == (2, 28, 3)


def test_keys_that_do_not_fit_are_named(text_state: dict[str, Tensor], image_state: dict[str, Tensor]) -> None:
    def refused(state: dict[str, Tensor]) -> str:
        with pytest.raises(CheckpointError) as error:
            (image_encoder if any(name.startswith("visual") for name in state) else text_encoder)(state)
        return str(error.value)

    for state, key in (
        (text_state, "blocks.1.ffn.fc2.weight"),
        (text_state, "token_embedding.weight"),
        (image_state, "visual.transformer.2.attn.to_qkv.bias"),
        (image_state, "visual.pos_embedding"),
    ):
        assert f"lacks '{key}'" in refused({name: tensor for name, tensor in state.items() if name != key})
        assert f"'{key}'" in refused(state | {key: torch.zeros(3)})
        assert f"'{key}.more'" in refused(state | {key + ".more": torch.zeros(3)})
        assert "int8" in refused(state | {key: torch.zeros(3, dtype=torch.int8)})
    assert "heads of 80" in refused(image_state | {"visual.patch_embedding.weight": torch.zeros(100, 3, 14, 14)})


def test_files_that_cannot_be_used_are_refused(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> str:
        with pytest.raises(CheckpointError) as error:
            open_encoders(original)
        return str(error.value)

    clip = next(original.glob("models_clip_*.pth"))
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) // 2])
    assert clip.name in refused() and "cut short" in refused()
    assert main(["convert", str(original), "-o", str(tmp_path / "out"), "--encoders"]) == 2
    assert "Traceback" not in capsys.readouterr().err and not (tmp_path / "out").exists()
    torch.save({"visual": Path("code")}, clip)
    assert "other things than tensors" in refused()
    torch.save([torch.zeros(1)], clip)
    assert "no dictionary of tensors" in refused()
    clip.unlink()
    assert "models_clip_*.pth" in refused() and "none" in refused()
    (original / "google" / "umt5-xxl").rename(original / "tokenizer")
    assert "umt5-xxl" in refused()
    (original / "text_encoder").mkdir()
    (original / "text_encoder" / "config.json").write_text("{}")
    assert "diffusers' layout" in refused()
