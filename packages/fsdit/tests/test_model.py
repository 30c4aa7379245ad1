"""FSDiT as a whole: sizes, equality with diffusers' Wan transformer, inputs, checkpointing, dtypes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from fsae.errors import UserError
from fsae.training.config import OptimizerConfig
from fsae.training.task import decay_groups
from fsdit import FSDiT
from fsdit.layers.rope import rotary_tables


def tiny(**overrides: Any) -> FSDiT:
    torch.manual_seed(0)
    return FSDiT.from_preset("tiny", **overrides)


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter a value that no special case (zero, one) hides."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.2 if parameter.ndim == 1 or "modulation" in name or "scale_shift" in name else 0.7
            fan_in = parameter[0].numel() if parameter.ndim > 1 and "modulation" not in name else 1
            parameter.copy_(noise * scale / math.sqrt(fan_in) + (1.0 if "norm" in name and "weight" in name else 0.0))


def inputs(model: FSDiT, grid: tuple[int, int, int] = (3, 4, 2), text_len: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    config, batch = model.config, 2
    return {
        "hidden_states": torch.randn(batch, config.in_channels, *grid, generator=generator),
        "timestep": torch.tensor([3.25, 87.5]),
        "encoder_hidden_states": torch.randn(batch, text_len, config.text_dim, generator=generator),
        "encoder_hidden_states_image": torch.randn(batch, 5, config.image_dim, generator=generator),
    }


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


# --- sizes -------------------------------------------------------------------------------------------------------


def test_14b_has_the_papers_size() -> None:
    with torch.device("meta"):
        model = FSDiT.from_preset("14b")
    d, ffn, layers, text, image, freq = 5120, 13824, 40, 4096, 1280, 256

    def linear(i: int, o: int) -> int:
        return i * o + o

    self_attention = 4 * linear(d, d) + 2 * d  # q, k, v, o; two RMS norms
    cross_attention = 6 * linear(d, d) + 3 * d  # and k, v of the image with a norm
    block = self_attention + cross_attention + linear(d, ffn) + linear(ffn, d) + 6 * d + 2 * d  # modulation, norm3
    assert block == 403_838_464
    embeddings = linear(text, d) + linear(d, d) + linear(freq, d) + linear(d, d) + linear(d, 6 * d)
    embeddings += 2 * image + linear(image, image) + linear(image, d) + 2 * d
    ends = linear(2 * 128 + 4, d) + linear(d, 128) + 2 * d
    routers = sum(length * d + length for length in range(2, layers + 1))
    assert routers == 4_194_099
    assert layers * block + embeddings + ends == 16_395_800_448
    total = layers * block + embeddings + ends + routers
    assert sum(p.numel() for p in model.parameters()) == total == 16_399_994_547
    assert sum(p.numel() for p in model.router_parameters()) == routers


def test_nano_size() -> None:
    with torch.device("meta"):
        model = FSDiT.from_preset("nano")
    assert sum(p.numel() for p in model.parameters()) == 4_485_467
    assert model.config.in_channels == 260


def test_config_fields_reach_the_model() -> None:
    model = tiny(mask_channels=1, patch_size=(1, 2, 2), out_channels=6, layer_memory=False)
    assert model.config.in_channels == 17
    assert model.patch_embedding.weight.shape == (64, 17, 1, 2, 2)
    assert model.head.head.out_features == 24
    assert model.router_parameters() == []
    assert tiny(in_channels=9).patch_embedding.in_channels == 9
    assert tiny(image_dim=None).image_embedding is None
    assert tiny(memory_bias=3.0).blocks[2].router.bias[-1].item() == pytest.approx(math.log(2) + 3)
    assert tiny(eps=1e-3).blocks[0].self_attn.norm_q.eps == 1e-3
    with pytest.raises(UserError, match="nano"):
        FSDiT.from_preset("nanno")
    with pytest.raises(ValueError, match="heads of even width"):
        tiny(num_heads=5)


def test_rope_theta_changes_the_output() -> None:
    a, b = tiny(), tiny(rope_theta=100.0)
    randomize(a)
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        assert relative(a(**inputs(a)), b(**inputs(a))) > 1e-4


def test_initialisation() -> None:
    model = tiny(num_layers=2, dim=128, ffn_dim=256, freq_dim=256)
    assert not model.head.head.weight.any()
    assert not any(m.bias.any() for m in model.modules() if isinstance(m, nn.Linear))
    assert model.text_embedding[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.time_embedding[2].weight.std().item() == pytest.approx(0.02, rel=0.1)
    xavier = math.sqrt(2 / (128 + 128))  # K and V start as two square matrices, not as one wide one
    assert model.blocks[0].self_attn.to_kv.weight.std().item() == pytest.approx(xavier, rel=0.05)
    assert model.blocks[0].ffn[0].weight.std().item() == pytest.approx(math.sqrt(2 / (128 + 256)), rel=0.05)
    assert model.blocks[0].modulation.std().item() == pytest.approx(128**-0.5, rel=0.15)


# --- against diffusers -------------------------------------------------------------------------------------------

# diffusers' names of our tensors outside the blocks, and inside them
_OUTER = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection": "condition_embedder.time_proj",
    "image_embedding.0": "condition_embedder.image_embedder.norm1",
    "image_embedding.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "image_embedding.3": "condition_embedder.image_embedder.ff.net.2",
    "image_embedding.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_INNER = {
    "self_attn.to_out": "attn1.to_out.0",
    "self_attn.": "attn1.",
    "cross_attn.to_out": "attn2.to_out.0",
    "cross_attn.norm_k_image": "attn2.norm_added_k",
    "cross_attn.": "attn2.",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
    "modulation": "scale_shift_table",
}


def diffusers_names(name: str) -> list[str]:
    """The diffusers tensors that, concatenated, are our tensor `name`."""
    if not name.startswith("blocks."):
        new = next((name.replace(a, b, 1) for a, b in _OUTER.items() if name.startswith(a)), name)
        return [new]
    _, index, inner = name.split(".", 2)
    inner = next(inner.replace(a, b, 1) for a, b in _INNER.items() if inner.startswith(a))
    prefix = f"blocks.{index}."
    if "to_kv_image" in inner:
        return [prefix + inner.replace("to_kv_image", part) for part in ("add_k_proj", "add_v_proj")]
    if "to_kv" in inner:
        return [prefix + inner.replace("to_kv", part) for part in ("to_k", "to_v")]
    return [prefix + inner]


def wan(model: FSDiT) -> WanTransformer3DModel:
    config = model.config
    reference = WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        image_dim=config.image_dim,
        added_kv_proj_dim=config.dim,
    )
    state = {}
    for name, tensor in model.state_dict().items():
        targets = diffusers_names(name)
        state.update(zip(targets, tensor.chunk(len(targets)), strict=True))
    reference.load_state_dict(state, strict=True)
    return reference


@pytest.mark.parametrize("patch, channels", [((1, 1, 1), 128), ((1, 2, 2), 16)])
def test_without_memory_it_is_diffusers_wan(patch: tuple[int, int, int], channels: int) -> None:
    model = tiny(layer_memory=False, patch_size=patch, latent_channels=channels, text_len=512)
    randomize(model)
    reference = wan(model)
    batch = inputs(model, text_len=512)
    ours, theirs = model(**batch), reference(**batch).sample
    assert ours.shape == theirs.shape == (2, channels, 3, 4, 2)
    assert relative(ours, theirs) < 1e-5

    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    errors: dict[str, tuple[float, float]] = {}
    for name, parameter in model.named_parameters():
        expected = torch.cat([gradients.pop(target) for target in diffusers_names(name)])
        errors[name] = float((parameter.grad - expected).norm()), float(expected.norm())
    largest = max(size for _, size in errors.values())
    for name, (error, size) in errors.items():  # sums of terms that cancel are held to a thousandth of the largest
        assert size > 0 and error < 1e-5 * max(size, 1e-3 * largest), f"{name}: {error} of {size}"
    assert math.hypot(*(e for e, _ in errors.values())) < 1e-5 * math.hypot(*(n for _, n in errors.values()))
    assert not gradients


def test_float64_time_embedding_at_large_timesteps() -> None:
    # 1000·sigma goes through sines of up to 1000 rad: in float32 the argument alone is off by 3e-5
    from fsdit.layers.embeddings import sinusoidal_embedding

    timestep, half = 987.654, 16
    expected = [math.cos(timestep * 10000 ** (-i / half)) for i in range(half)]
    got = sinusoidal_embedding(torch.tensor([timestep], dtype=torch.float64), 2 * half)[0, :half]
    assert (got - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-12


# --- behaviour ---------------------------------------------------------------------------------------------------


def test_short_text_is_continued_with_zero_rows() -> None:
    model = tiny()
    randomize(model)
    batch = inputs(model, text_len=7)
    padded = {**batch, "encoder_hidden_states": nn.functional.pad(batch["encoder_hidden_states"], (0, 0, 0, 5))}
    with torch.no_grad():
        assert torch.equal(model(**batch), model(**padded))
        model.register_to_config(text_len=7)  # the control: without the zero rows the result is another
        unpadded = model(**batch)
        model.register_to_config(text_len=12)
        assert relative(model(**batch), unpadded) > 1e-3


def test_wrong_inputs_are_named() -> None:
    model = tiny(patch_size=(1, 2, 2))
    batch = inputs(model, grid=(1, 2, 2))
    for change, message in (
        ({"hidden_states": torch.zeros(2, 19, 1, 2, 2)}, "expected B 20 t h w"),
        ({"hidden_states": torch.zeros(2, 20, 1, 3, 2)}, "does not divide"),
        ({"encoder_hidden_states": torch.zeros(2, 17, 32)}, "at most 16"),
        ({"encoder_hidden_states": torch.zeros(12, 32)}, r"expected text embeddings 2 L 32, got \(12, 32\)"),
        ({"encoder_hidden_states": torch.zeros(2, 12, 20)}, "expected text embeddings 2 L 32"),
        ({"encoder_hidden_states": torch.zeros(3, 12, 32)}, "expected text embeddings 2 L 32"),
        ({"encoder_hidden_states_image": None}, "needs one"),
        ({"encoder_hidden_states_image": torch.zeros(2, 5, 24)}, "expected image embeddings 2 L 16"),
        ({"timestep": torch.tensor(3.0)}, r"expected 2 timesteps, got \(\)"),
        ({"timestep": torch.zeros(3)}, "expected 2 timesteps"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**batch, **change})
    for heads in (0, 3):
        with pytest.raises(ValueError, match=f"dim 64 does not divide into {heads} heads"):
            tiny(num_heads=heads)
    for patch in ((1, 1), (1, 0, 1)):
        with pytest.raises(ValueError, match=rf"patch_size \({patch[0]}, .*\) given; three sizes over \(t, h, w\)"):
            tiny(patch_size=patch)
    with pytest.raises(UserError, match=r"FSDiT cannot be built with .*patch_size \(1, 1\) given"):
        FSDiT.from_preset("nano", patch_size=(1, 1))


def test_one_text_and_one_image_serve_a_batch() -> None:
    model = tiny()
    randomize(model)
    batch = inputs(model)
    one = {name: value[:1] if name.startswith("encoder") else value for name, value in batch.items()}
    repeated = {name: value.expand(2, *value.shape[1:]) for name, value in one.items()}
    with torch.no_grad():
        assert torch.allclose(model(**one), model(**repeated), atol=1e-6)


@pytest.mark.parametrize("layer_memory", [True, False])
def test_gradient_checkpointing_changes_nothing(layer_memory: bool) -> None:
    model = tiny(layer_memory=layer_memory, num_layers=4)
    randomize(model)
    results = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.enable_gradient_checkpointing()
        batch = inputs(model)
        batch["hidden_states"].requires_grad_()
        model(**batch).square().sum().backward()
        results.append([batch["hidden_states"].grad, *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@torch.no_grad()
def test_weights_kept_in_8_bits_give_what_the_rounded_weights_give() -> None:
    """Diffusers' layerwise casting: each layer is stored in fp8 and brought back for its own forward alone."""
    stored, rounded = tiny(), tiny()
    for model in (stored, rounded):
        randomize(model)
        model.eval()
    exact = rounded(**inputs(rounded))
    stored.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    in_8_bits = {name for name, p in stored.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert {"time_projection.weight", "blocks.0.ffn.0.weight", "head.head.weight"} <= in_8_bits
    for name, parameter in rounded.named_parameters():
        if name in in_8_bits:
            parameter.copy_(parameter.to(torch.float8_e4m3fn).float())
    out = stored(**inputs(stored))
    torch.testing.assert_close(out, rounded(**inputs(rounded)))
    assert 1e-3 < relative(out, exact) < 0.2


def test_bfloat16_stays_close_and_keeps_float32_tables(tmp_path) -> None:
    model = tiny()
    randomize(model)
    model.save_pretrained(tmp_path)
    half = FSDiT.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.blocks[0].modulation.dtype == half.time_embedding[0].weight.dtype == torch.float32
    assert half.blocks[1].router.weight.dtype == torch.float32
    assert half.blocks[0].ffn[0].weight.dtype == torch.bfloat16
    with torch.no_grad():
        exact = model(**inputs(model))
        for other in (half, half.to(torch.bfloat16)):
            out = other(**inputs(model))
            assert out.dtype == torch.bfloat16
            assert relative(out.float(), exact) < 0.03


def test_time_keeps_its_precision_under_autocast() -> None:
    """What the blocks are given of the timestep is the same to the bit inside autocast and out of it."""
    model, given = tiny(), []
    randomize(model)
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: given.extend(inputs))

    def times() -> list[Tensor]:
        given.clear()
        model(**inputs(model))
        return [x for x in given if isinstance(x, Tensor) and x.dtype == torch.float32 and x.shape[1:2] == (6,)]

    outside = times()
    with torch.autocast("cpu", torch.bfloat16):
        inside = times()
    assert len(outside) == len(inside) == 1 and torch.equal(outside[0], inside[0])


def test_the_modulation_is_not_decayed() -> None:
    model = tiny()
    decayed, kept = (group["params"] for group in decay_groups([model], OptimizerConfig(weight_decay=0.1)))
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1 and "modulation" not in name}
    assert {name for name, p in model.named_parameters() if any(p is other for other in decayed)} == matrices
    assert len(decayed) + len(kept) == len(list(model.parameters()))


def test_saved_and_loaded_it_is_the_same(tmp_path) -> None:
    model = tiny(patch_size=(1, 2, 2))
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = FSDiT.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**inputs(model)), loaded(**inputs(model)))


def test_tables_made_while_sampling_serve_in_training() -> None:
    rotary_tables.cache_clear()
    model = tiny()
    with torch.inference_mode():
        model(**inputs(model))
    model(**inputs(model)).sum().backward()
    shown = inputs(model)["hidden_states"]
    assert model.rotary(shown).cosine is model.rotary(shown).cosine  # whoever holds them holds those in use


def test_attention_back_end_can_be_chosen() -> None:
    model = tiny()
    randomize(model)
    with torch.no_grad():
        before = model(**inputs(model))
        model.set_attention_backend("_native_math")
        assert model.blocks[0].self_attn._attention_backend is not None
        assert relative(model(**inputs(model)), before) < 1e-5
