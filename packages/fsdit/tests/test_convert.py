"""From Wan2.1-I2V: the same function as diffusers' model, every key accounted for, the rest refused by name."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from fsae.errors import UserError
from fsdit import FSDiT
from fsdit.conditioning import first_frame_condition, model_input
from fsdit.wan.convert import WanImport, from_wan, plan_conversion, shapes_of, target_options
from fsdit.wan.transformer import layout_of, open_wan, wan_options

I2V_14B: dict[str, Any] = {
    "in_channels": 36,
    "out_channels": 16,
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
}
TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 176,
    "num_layers": 4,
    "image_dim": 20,
    "added_kv_proj_dim": 64,
}
ORIGINAL_CONFIG = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.30.0",
    "model_type": "i2v",
    "dim": 64,
    "eps": 1e-6,
    "ffn_dim": 176,
    "freq_dim": 32,
    "in_dim": 36,
    "num_heads": 2,
    "num_layers": 4,
    "out_dim": 16,
    "text_len": 512,
}
NEW_ENDS = {f"{layer}.{kind}" for layer in ("patch_embedding", "head.head") for kind in ("weight", "bias")}


def randomize(model: torch.nn.Module) -> None:
    """Give every parameter a value that no special case (zero, one) hides."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.ndim == 1 or "scale_shift" in name
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.2 if flat else 0.7 / math.sqrt(parameter[0].numel())
            parameter.copy_(noise * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0))


@pytest.fixture(scope="module")
def wan() -> WanTransformer3DModel:
    model = WanTransformer3DModel(**TINY)
    randomize(model)
    return model.eval()


@pytest.fixture(scope="module")
def folder(wan: WanTransformer3DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wan") / "transformer"
    wan.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 36, 3, 4, 6, generator=generator),
        "timestep": torch.tensor([3.25, 987.5]),
        "encoder_hidden_states": torch.randn(2, 512, 24, generator=generator),
        "encoder_hidden_states_image": torch.randn(2, 5, 20, generator=generator),
    }


@pytest.fixture(scope="module")
def want(wan: WanTransformer3DModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return wan(**batch).sample


# diffusers' names back to Wan's own, in the order in which the substitutions apply.
BACK = (
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"^proj_out\.", "head.head."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"scale_shift_table$", "modulation"),
    (r"\.norm2\.", ".norm3."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"\.add_([kv])_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
)


def original_name(name: str) -> str:
    for pattern, replacement in BACK:
        name = re.sub(pattern, replacement, name)
    return name


def original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of diffusers' as Wan publishes it."""
    return {original_name(name): tensor for name, tensor in state.items()}


def save_original(state: dict[str, Tensor], folder: Path, shards: int = 1) -> None:
    """A folder as Wan's: config.json, shards and their index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(ORIGINAL_CONFIG))
    names = sorted(state)
    index: dict[str, str] = {}
    for number in range(shards):
        file = f"diffusion_pytorch_model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number::shards]
        save_file({name: state[name].contiguous() for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    listing = {"metadata": {"total_size": 0}, "weight_map": index}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(listing))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def assert_same(a: FSDiT, b: FSDiT) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) for name in left)


# --- the function ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_it_computes_what_diffusers_computes(folder: Path, batch: dict[str, Tensor], want: Tensor) -> None:
    plain, report = from_wan(folder, WanImport(latents="wan", layer_memory=False))
    assert not plain.router_parameters() and not report.dropped and not report.new
    assert relative(plain(**batch), want) < 1e-5
    gated, _ = from_wan(folder, WanImport(latents="wan", memory_gate=True))
    assert len(gated.router_parameters()) == 3 * 3
    assert torch.equal(gated(**batch), plain(**batch))
    for block in gated.blocks[1:]:
        block.router.gate.fill_(1.0)
    open_gate = gated(**batch)
    assert not torch.equal(open_gate, plain(**batch))
    adapting, _ = from_wan(folder, WanImport(latents="wan"))
    assert relative(adapting(**batch), open_gate) < 1e-6


@torch.no_grad()
def test_memory_starts_near_the_model_or_far_from_it(folder: Path, batch: dict[str, Tensor], want: Tensor) -> None:
    adapting, scratch = (
        from_wan(folder, WanImport(latents="wan"))[0],
        from_wan(folder, WanImport(latents="wan", memory_bias=1.0))[0],
    )
    assert 1e-7 < relative(adapting(**batch), want) < 1e-2 < relative(scratch(**batch), want)
    for model, bias in ((adapting, 7.0), (scratch, 1.0)):
        assert (model.config.memory_bias, model.config.memory_gate) == (bias, False)
        for index, block in enumerate(model.blocks[1:], start=1):
            weights = block.router(torch.randn(1, 2, 64))
            assert weights.shape == (1, 2, index + 1)
            assert weights[..., -1].sub(1 / (1 + math.exp(-bias))).abs().max() < 1e-6


@torch.no_grad()
def test_the_condition_is_ordered_as_wans_pipeline_orders_it() -> None:
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    pipeline = WanImageToVideoPipeline(None, None, vae, None, transformer=None)
    noise, condition = pipeline.prepare_latents(
        torch.rand(1, 3, 16, 16), 1, 16, 16, 16, 9, torch.float32, torch.device("cpu")
    )
    ours = first_frame_condition(condition[:, 4:, :1], 3)
    assert torch.equal(ours.mask, condition[:, :4])
    theirs = torch.cat([noise, condition], dim=1)
    stacked = model_input(noise, ours)
    assert stacked.shape == theirs.shape == (1, 36, 3, 2, 2)
    # Wan encodes grey frames behind the first, where FSVideo leaves latents of zero.
    assert torch.equal(stacked[:, :20], theirs[:, :20]) and torch.equal(stacked[:, :, :1], theirs[:, :, :1])


@torch.no_grad()
def test_fsae_latents_keep_all_but_the_ends(folder: Path) -> None:
    model, report = from_wan(folder, WanImport(seed=3))
    config = model.config
    assert (config.latent_channels, config.mask_channels, config.in_channels) == (128, 4, 260)
    assert (config.out_channels, tuple(config.patch_size), config.text_len) == (128, (1, 1, 1), 512)
    assert set(report.dropped) == {"patch_embedding.weight", "patch_embedding.bias", "proj_out.weight", "proj_out.bias"}
    routers = {name for name in model.state_dict() if ".router." in name}
    assert len(routers) == 6 and set(report.new) == NEW_ENDS | routers
    counted = report.parameters("carried") + report.parameters("new")
    assert counted == sum(parameter.numel() for parameter in model.parameters())
    weight = model.patch_embedding.weight
    bound = math.sqrt(6 / (260 + 64))
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not any(t.any() for t in (model.patch_embedding.bias, model.head.head.weight, model.head.head.bias))
    own = from_wan(folder, WanImport(latents="wan"))[0].state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items() if name not in NEW_ENDS)
    out = model(torch.randn(1, 260, 2, 3, 2), torch.tensor([500.0]), torch.randn(1, 512, 24), torch.randn(1, 5, 20))
    assert out.shape == (1, 128, 2, 3, 2)


def test_new_weights_are_the_seeds_and_leave_the_global_generator_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    first, second, other = (from_wan(folder, WanImport(seed=seed))[0] for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert_same(first, second)
    changed = other.state_dict()
    differing = {name for name, tensor in first.state_dict().items() if not torch.equal(tensor, changed[name])}
    assert differing == {"patch_embedding.weight"}


# --- the files ---------------------------------------------------------------------------------------------------


def test_both_namings_and_all_forms_of_a_checkpoint_give_one_model(
    wan: WanTransformer3DModel, folder: Path, tmp_path: Path
) -> None:
    state = wan.state_dict()
    original = original_names(state)
    assert len(original) == len(state) and "blocks.3.cross_attn.v_img.bias" in original
    assert set(original) & set(state) == {"patch_embedding.weight", "patch_embedding.bias"}
    whole = from_wan(folder, WanImport(latents="wan"))[0]
    wan.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    save_original(original, tmp_path / "original")
    save_original(original, tmp_path / "original shards", shards=3)
    save_file({name: tensor.contiguous() for name, tensor in original.items()}, tmp_path / "file.safetensors")
    for source, options in (
        (str(folder.parent), {}),
        (tmp_path / "sharded", {}),
        (tmp_path / "original", {}),
        (tmp_path / "original shards", {}),
        (tmp_path / "file.safetensors", {"num_heads": 2}),
        (folder / "diffusion_pytorch_model.safetensors", {"num_heads": 2}),
        (original, {"num_heads": 2}),
        (dict(state), {"num_heads": 2}),
    ):
        model, _ = from_wan(source, WanImport(latents="wan", **options))
        assert_same(model, whole)
        assert (model.config.num_heads, model.config.text_len, model.config.eps) == (2, 512, 1e-6)


def test_a_name_on_the_hub_brings_the_transformer_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder.parent if name.endswith("-Diffusers") else folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for name in ("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", "Wan-AI/Wan2.1-I2V-14B-720P"):
        assert open_wan(name).config["_class_name"] == "WanTransformer3DModel"
    inside = ["transformer/*.json", "transformer/*.safetensors"]
    assert [patterns for _, patterns in asked] == [inside, ["*.json", "*.safetensors"]]


def test_a_callers_state_dict_stays_the_callers(wan: WanTransformer3DModel) -> None:
    state = {name: tensor.clone() for name, tensor in wan.state_dict().items()}
    model, _ = from_wan(state, WanImport(latents="wan", num_heads=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(state[name], tensor) for name, tensor in wan.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_converted_model_is_saved_and_loaded_as_any(folder: Path, tmp_path: Path) -> None:
    model, _ = from_wan(folder)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    loaded = FSDiT.from_pretrained(tmp_path)
    assert_same(loaded, model)
    assert loaded.config.memory_bias == 7.0 and loaded.config.layer_memory


def test_weights_keep_their_type_unless_another_is_asked_for(
    wan: WanTransformer3DModel, folder: Path, tmp_path: Path
) -> None:
    """Half precision is what FSDiT keeps in half precision; what stays wide comes from the source unrounded."""
    state = wan.state_dict()
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    half["blocks.0.norm2.weight"] = state["blocks.0.norm2.weight"]
    save_file(half, tmp_path / "half.safetensors")
    wide = {"time_embedding", "modulation", "norm3", "router"}
    for source in (tmp_path / "half.safetensors", half):
        model, _ = from_wan(source, WanImport(num_heads=2))
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == (torch.float32 if wide & set(name.split(".")) else torch.bfloat16), name
        assert torch.equal(model.blocks[0].norm3.weight, state["blocks.0.norm2.weight"])
    rounded, _ = from_wan(folder, WanImport(dtype=torch.bfloat16))
    assert torch.equal(rounded.blocks[2].norm3.weight, state["blocks.2.norm2.weight"])
    assert torch.equal(rounded.blocks[2].ffn[2].bias, state["blocks.2.ffn.net.2.bias"].bfloat16())
    assert rounded.patch_embedding.weight.dtype == rounded.head.head.bias.dtype == torch.bfloat16
    rounded.save_pretrained(tmp_path / "rounded")
    assert_same(FSDiT.from_pretrained(tmp_path / "rounded", torch_dtype=torch.bfloat16), rounded)
    assert {p.dtype for p in from_wan(half, WanImport(num_heads=2, dtype=torch.float64))[0].parameters()} == {
        torch.float64
    }
    with pytest.raises(UserError, match="int8"):
        from_wan(folder, WanImport(dtype=torch.int8))


# --- the full size -----------------------------------------------------------------------------------------------


def test_every_key_of_the_full_size_is_accounted_for() -> None:
    with torch.device("meta"):
        theirs = WanTransformer3DModel(**I2V_14B).state_dict()
        preset = shapes_of(FSDiT.from_preset("14b"))
    assert sum(tensor.numel() for tensor in theirs.values()) == 16_394_878_784
    routers = sum(states * 5120 + states for states in range(2, 41))
    for names, latents in ((theirs, "fsae"), (original_names(theirs), "fsae"), (theirs, "wan")):
        source = open_wan(names)
        layout = layout_of(source)
        own = wan_options(source, layout)
        assert (own["num_heads"], own["num_layers"], own["ffn_dim"], own["freq_dim"]) == (40, 40, 13824, 256)
        with torch.device("meta"):
            shapes = shapes_of(FSDiT(**target_options(own, latents) | {"layer_memory": True}))
        plan = plan_conversion(source, shapes, own, layout, latents)
        report = plan.report(source.shapes, shapes)
        assert set(report.carried) | set(report.dropped) == set(names)
        assert not set(report.carried) & set(report.dropped)
        assert set(plan.carried) | set(report.new) == set(shapes) and not set(plan.carried) & set(report.new)
        total = sum(math.prod(shape) for shape in shapes.values())
        new, carried = report.parameters("new"), report.parameters("carried")
        assert new + carried == total
        if latents == "wan":
            assert carried == 16_394_878_784 and new == routers and not report.dropped
            continue
        assert shapes == preset
        assert (carried, total) == (16_393_808_640, 16_399_994_547)
        assert new == routers + 260 * 5120 + 5120 + 5120 * 128 + 128
        assert report.parameters("dropped") == 36 * 4 * 5120 + 5120 + 5120 * 64 + 64
        assert (report.tensors("dropped"), report.tensors("new")) == (4, 4 + 2 * 39)


# --- what does not fit -------------------------------------------------------------------------------------------


def refused(source: Any, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        from_wan(source, WanImport(**options))
    return str(error.value)


def test_keys_that_do_not_fit_are_named(wan: WanTransformer3DModel) -> None:
    state = dict(wan.state_dict())
    key = "blocks.1.attn2.add_v_proj.weight"

    def without(*names: str) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in state.items() if name not in names}

    missing = refused(without(key), num_heads=2)
    assert f"lacks '{key}'" in missing and "(nearest: 'blocks." in missing and "add_v_proj" in missing
    renamed = refused(without(key) | {"blocks.1.attn2.add_v_prog.weight": state[key]}, num_heads=2)
    assert f"lacks '{key}' (nearest: 'blocks.1.attn2.add_v_prog.weight')" in renamed
    unknown = refused(state | {"blocks.1.attn2.add_q_proj.weight": state[key]}, num_heads=2)
    assert "'blocks.1.attn2.add_q_proj.weight'" in unknown and "nearest" in unknown
    misshapen = refused(state | {key: torch.zeros(64, 32)}, num_heads=2)
    assert f"'{key}' as [64, 32]" in misshapen and "[64, 64]" in misshapen
    # The ends are checked as strictly where they are dropped.
    assert "'proj_out.bias'" in refused(without("proj_out.bias"), num_heads=2)
    assert "'patch_embedding.bias' as [3]" in refused(state | {"patch_embedding.bias": torch.zeros(3)}, num_heads=2)
    # Those that tell the sizes.
    assert "lacks 'patch_embedding.weight'" in refused(without("patch_embedding.weight"), num_heads=2)
    flat = refused(state | {"patch_embedding.weight": torch.zeros(64, 36)}, num_heads=2)
    assert "'patch_embedding.weight' as [64, 36], not 5 axes" in flat
    original = original_names(state)
    name = "blocks.2.self_attn.norm_k.weight"
    assert f"lacks '{name}'" in refused({k: v for k, v in original.items() if k != name}, num_heads=2)


def test_quantised_weights_are_refused_before_any_is_read(
    wan: WanTransformer3DModel, folder: Path, tmp_path: Path
) -> None:
    state = {name: tensor.clone() for name, tensor in wan.state_dict().items()}
    key = "blocks.2.ffn.net.2.weight"
    for dtype, word in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")):
        state[key] = state[key].float().to(dtype)
        save_file(state, tmp_path / "quantised.safetensors")
        said = refused(tmp_path / "quantised.safetensors", num_heads=2, dtype=torch.float32)
        assert key in said and word in said and "not quantised" in said
        assert str(dtype) in refused(state, num_heads=2)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "diffusion_pytorch_model.safetensors").symlink_to(
        folder / "diffusion_pytorch_model.safetensors"
    )
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 8}}))
    assert "quantised" in refused(tmp_path / "model")


def test_other_models_are_refused(wan: WanTransformer3DModel, folder: Path, tmp_path: Path) -> None:
    text_to_video = WanTransformer3DModel(**TINY | {"image_dim": None, "added_kv_proj_dim": None, "in_channels": 16})
    text_to_video.save_pretrained(tmp_path / "t2v")
    for source in (tmp_path / "t2v", text_to_video.state_dict()):
        said = refused(source)
        assert "without an image branch" in said
        assert "lacks 'condition_embedder.image_embedder.norm1.weight' (nearest: 'condition_embedder.t" in said
    assert "lacks 'img_emb.proj.0.weight'" in refused(original_names(text_to_video.state_dict()))
    assert "empty" in refused({})
    fsdit = FSDiT.from_preset("nano", num_layers=2)
    assert "no transformer of Wan2.1-I2V's" in refused(fsdit.state_dict())
    fsdit.save_pretrained(tmp_path / "fsdit")
    assert "a saved FSDiT" in refused(tmp_path / "fsdit")
    state = dict(wan.state_dict())
    narrow = state | {"patch_embedding.weight": torch.zeros(64, 32, 1, 2, 2)}
    assert "takes 32 channels" in refused(narrow, num_heads=2)

    def with_config(name: str, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_file(weights, tmp_path / name / "diffusion_pytorch_model.safetensors")
        return tmp_path / name

    theirs = json.loads((folder / "config.json").read_text())
    assert "SkyReels" in refused(with_config("a", theirs | {"_class_name": "SkyReels"}, state))
    assert "pos_embed_seq_len is 514" in refused(with_config("b", theirs | {"pos_embed_seq_len": 514}, state))
    assert "'blocks.0.attn1" not in refused(with_config("c", theirs | {"num_layers": 5}, state))
    assert "'patch_embedding.weight' as [64, " in refused(
        with_config("d", theirs | {"attention_head_dim": 64, "added_kv_proj_dim": 128}, state)
    )
    original = {name: tensor.contiguous() for name, tensor in original_names(state).items()}
    assert "model_type is 'flf2v'" in refused(with_config("e", ORIGINAL_CONFIG | {"model_type": "flf2v"}, original))
    assert "heads of even width" in refused(with_config("f", ORIGINAL_CONFIG | {"num_heads": 5}, original))


def test_broken_and_foreign_files_are_refused(folder: Path, wan: WanTransformer3DModel, tmp_path: Path) -> None:
    assert "no model folder" in refused(tmp_path / "nowhere")
    torch.save(wan.state_dict(), tmp_path / "model.pth")
    assert "pickle" in refused(tmp_path / "model.pth")
    assert "model.pth" in refused(tmp_path)
    save_original(original_names(wan.state_dict()), tmp_path / "wan", shards=3)
    shard = tmp_path / "wan" / "diffusion_pytorch_model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1000])
    assert shard.name in refused(tmp_path / "wan") and "cut short" in refused(tmp_path / "wan")
    shard.unlink()
    assert "there is no weights file" in refused(tmp_path / "wan") and shard.name in refused(tmp_path / "wan")
    shard.write_bytes(content)
    index = tmp_path / "wan" / "diffusion_pytorch_model.safetensors.index.json"
    listing = json.loads(index.read_text())
    del listing["weight_map"]["head.modulation"]
    index.write_text(json.dumps(listing))
    assert "'head.modulation'" in refused(tmp_path / "wan")


def test_options_that_do_not_fit_are_refused(wan: WanTransformer3DModel, folder: Path) -> None:
    assert "fsae, wan" in refused(folder, latents="ltx")
    assert "memory_bias is nan" in refused(folder, memory_bias=math.nan)
    assert "memory_gate" in refused(folder, memory_gate=True, layer_memory=False)
    assert "says 2" in refused(folder, num_heads=4)
    assert "or num_heads" in refused(dict(wan.state_dict()))
