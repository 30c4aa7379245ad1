"""From DC-AE: the same function as diffusers' model, every key accounted for, what does not fit refused by name."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from safetensors.torch import save_file
from torch import Tensor

from fsae import FSAE
from fsae.cli import main
from fsae.errors import CheckpointError, UserError
from fsae.weights.convert import from_dc_ae, plan_conversion

SANA: dict[str, Any] = {
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}
TINY: dict[str, Any] = {
    "encoder_block_out_channels": (4, 8, 16, 32, 32, 64),
    "decoder_block_out_channels": (4, 8, 16, 32, 32, 64),
    "encoder_layers_per_block": (2, 1, 1, 1, 2, 1),
    "decoder_layers_per_block": (1, 2, 1, 2, 1, 1),
    "latent_channels": 8,
}
SIZES: dict[str, Any] = {
    "widths": (4, 8, 16, 32, 32, 64, 128),
    "encoder_depths": (2, 1, 1, 1, 2, 1, 1),
    "decoder_depths": (1, 2, 1, 2, 1, 1, 1),
}
NEW = (
    *("encoder.stages.6.", "encoder.stages.5.down.", "encoder.conv_out."),
    *("decoder.stages.6.", "decoder.stages.5.up.", "decoder.conv_in."),
)


@pytest.fixture(scope="module")
def image_model() -> AutoencoderDC:
    """A tiny DC-AE with no parameter left at zero or one."""
    torch.manual_seed(0)
    model = AutoencoderDC(**SANA, **TINY)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def folder(image_model: AutoencoderDC, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dc-ae")
    image_model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def converted(image_model: AutoencoderDC) -> FSAE:
    return from_dc_ae(image_model.state_dict(), **SIZES)[0].eval()


# diffusers' names back to mit-han-lab's, in the order in which the substitutions apply.
BACK = (
    (r"^encoder\.conv_in\.", "encoder.project_in.conv."),
    (r"^encoder\.conv_out\.", "encoder.project_out.main.op_list.0.conv."),
    (r"^decoder\.conv_in\.", "decoder.project_in.main.conv."),
    (r"^decoder\.norm_out\.", "decoder.project_out.op_list.0."),
    (r"^decoder\.conv_out\.", "decoder.project_out.op_list.2.conv."),
    (r"attn\.norm_out\.", "context_module.main.proj.norm."),
    (r"attn\.to_out\.", "context_module.main.proj.conv."),
    (r"attn\.to_qkv_multiscale\.0\.proj_in\.", "context_module.main.aggreg.0.0."),
    (r"attn\.to_qkv_multiscale\.0\.proj_out\.", "context_module.main.aggreg.0.1."),
    (r"conv_out\.conv_(inverted|depth|point)\.", r"local_module.main.\1_conv.conv."),
    (r"conv_out\.norm\.", "local_module.main.point_conv.norm."),
    (r"(blocks\.\d\.\d)\.(conv[12])\.", r"\1.main.\2.conv."),
    (r"(blocks\.\d\.\d)\.norm\.", r"\1.main.conv2.norm."),
    (r"^(encoder\.down_blocks\.\d\.\d)\.conv\.", r"\1.main.conv."),
    (r"^(decoder\.up_blocks\.\d\.\d)\.conv\.", r"\1.main.conv.conv."),
    (r"(?:down|up)_blocks\.(\d)\.", r"stages.\1.op_list."),
)


def original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of diffusers' as mit-han-lab publishes it."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".to_k." in name or ".to_v." in name:
            continue
        if ".to_q." in name:
            thirds = [state[name.replace(".to_q.", f".to_{letter}.")] for letter in "qkv"]
            tensor = torch.cat(thirds)
            name = name.replace("attn.to_q.", "context_module.main.qkv.conv.")
        for pattern, replacement in BACK:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor[..., None, None] if tensor.ndim == 2 else tensor
    return renamed


def assert_same(a: FSAE, b: FSAE) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) for name in left)


# --- the function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 5])
@torch.no_grad()
def test_encoder_equals_diffusers_up_to_the_new_stage(image_model: AutoencoderDC, converted: FSAE, frames: int) -> None:
    torch.manual_seed(1)
    image = torch.rand(1, 3, 64, 128) * 2 - 1
    seen: list[Tensor] = []
    handle = image_model.encoder.conv_out.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    image_model.encode(image)
    handle.remove()
    features = converted.encoder.features(image.unsqueeze(2).expand(-1, -1, frames, -1, -1))[0][5]
    assert features.shape[2] == 1 + (frames - 1) // 4
    for frame in features.unbind(2):
        assert (frame - seen[0]).abs().max() <= 1e-5 * seen[0].abs().max()


@pytest.mark.parametrize("frames", [1, 5])
@torch.no_grad()
def test_decoder_equals_diffusers_from_the_new_stage_on(
    image_model: AutoencoderDC, converted: FSAE, frames: int
) -> None:
    torch.manual_seed(2)
    inner = torch.randn(1, 64, 2, 4)
    x = inner
    for block in reversed(image_model.decoder.up_blocks):
        x = block(x)
    x = image_model.decoder.norm_out(x.movedim(1, -1)).movedim(-1, 1)
    want = image_model.decoder.conv_out(image_model.decoder.conv_act(x))
    # What the step up from the new stage gives is replaced by the tensor that diffusers' stages had.
    count = 1 + (frames - 1) // 4
    given = inner.unsqueeze(2).expand(-1, -1, count, -1, -1)
    handle = converted.decoder.stages[5].up.register_forward_hook(lambda *_: given)
    video = converted.decode(torch.zeros(1, 128, count, 1, 2))
    handle.remove()
    assert video.shape == (1, 3, frames, 64, 128)
    for frame in video.unbind(2):
        assert (frame - want).abs().max() <= 1e-5 * want.abs().max()


@torch.no_grad()
def test_the_new_stage_moves_space_to_channels_and_back(converted: FSAE) -> None:
    video = torch.randn(1, 3, 5, 64, 128)
    features = converted.encoder.features(video)[0]
    cells = F.pixel_unshuffle(features[5].transpose(1, 2).flatten(0, 1), 2)
    mean = cells.unflatten(1, (128, 2)).mean(2)
    torch.testing.assert_close(features[6].transpose(1, 2).flatten(0, 1), mean)
    seen: dict[str, Tensor] = {}
    stages = converted.decoder.stages
    handles = [
        stages[6].register_forward_hook(lambda _module, _inputs, out: seen.__setitem__("inner", out)),
        stages[5].up.register_forward_hook(lambda _module, _inputs, out: seen.__setitem__("outer", out)),
        stages[6].blocks[0].register_forward_pre_hook(lambda _module, inputs: seen.__setitem__("entered", inputs[0])),
    ]
    converted.decode(torch.randn(1, 128, 2, 1, 2))
    for handle in handles:
        handle.remove()
    assert torch.equal(seen["entered"], seen["inner"])
    copied = seen["inner"].transpose(1, 2).flatten(0, 1).repeat_interleave(2, 1)
    torch.testing.assert_close(seen["outer"].transpose(1, 2).flatten(0, 1), F.pixel_shuffle(copied, 2))


def test_new_weights_are_the_seeds_and_leave_the_global_generator_alone(image_model: AutoencoderDC) -> None:
    state = image_model.state_dict()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = from_dc_ae(state, seed=3, **SIZES)[0], from_dc_ae(state, seed=3, **SIZES)[0]
    assert torch.equal(before, torch.get_rng_state())
    assert_same(first, second)
    other = from_dc_ae(state, seed=4, **SIZES)[0].state_dict()
    differing = {name for name, tensor in first.state_dict().items() if not torch.equal(tensor, other[name])}
    assert differing and all(name.startswith(NEW) for name in differing)
    assert {"encoder.conv_out.weight", "decoder.conv_in.weight"} <= differing


# --- the files ---------------------------------------------------------------------------------------------------


def test_both_namings_and_all_forms_of_a_checkpoint_give_one_model(
    image_model: AutoencoderDC, converted: FSAE, folder: Path, tmp_path: Path
) -> None:
    state = image_model.state_dict()
    original = original_names(state)
    assert not set(original) & set(state)
    save_file({name: tensor.contiguous() for name, tensor in original.items()}, tmp_path / "model.safetensors")
    sharded = tmp_path / "sharded"
    image_model.save_pretrained(sharded, max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for source, sizes in (
        (original, SIZES),
        (tmp_path, SIZES),
        (tmp_path / "model.safetensors", SIZES),
        (str(folder), {}),
        (sharded, {}),
        (folder / "diffusion_pytorch_model.safetensors", SIZES),
    ):
        assert_same(from_dc_ae(source, **sizes)[0], converted)


def test_a_converted_model_is_saved_and_loaded_as_any(converted: FSAE, tmp_path: Path) -> None:
    converted.save_pretrained(tmp_path)
    loaded = FSAE.from_pretrained(tmp_path)
    assert_same(loaded, converted)
    config = loaded.config
    assert (config.decoder_kind, config.first_frame_injection, config.noise) == ("causal", False, 0.0)


def test_half_precision_weights_become_fp32(image_model: AutoencoderDC) -> None:
    state = {name: tensor.to(torch.bfloat16) for name, tensor in image_model.state_dict().items()}
    model = from_dc_ae(state, **SIZES)[0]
    assert model.dtype == torch.float32
    weight = model.encoder.conv_in.weight
    assert torch.equal(weight[:, :, 2], state["encoder.conv_in.weight"].float())
    assert not weight[:, :, :2].any()


def test_decoder_widths_of_their_own_are_taken_from_the_configuration(tmp_path: Path) -> None:
    narrow = TINY | {"decoder_block_out_channels": (2, 4, 8, 32, 32, 64)}
    AutoencoderDC(**SANA, **narrow).save_pretrained(tmp_path)
    model, _ = from_dc_ae(tmp_path, latent_channels=32)
    assert tuple(model.config.decoder_widths) == (2, 4, 8, 32, 32, 64, 128)
    assert model.config.latent_channels == 32


# --- the full size -----------------------------------------------------------------------------------------------


def test_every_key_of_the_full_size_is_accounted_for() -> None:
    with torch.device("meta"):
        theirs = AutoencoderDC(**SANA).state_dict()
        causal = {"decoder_kind": "causal", "first_frame_injection": False, "noise": 0.0}
        model = FSAE.from_preset("standard", **causal)
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert sum(tensor.numel() for tensor in theirs.values()) == 312_250_275
    for names, tensors in ((theirs, (179, 196)), (original_names(theirs), (161, 178))):
        shapes = {name: tuple(tensor.shape) for name, tensor in names.items()}
        assert tuple(sum(name.startswith(part) for name in shapes) for part in ("encoder", "decoder")) == tensors
        report = plan_conversion(shapes, ours, model.config).report(shapes, ours)
        assert not set(report.carried) & set(report.dropped)
        assert set(report.carried) | set(report.dropped) == set(shapes)
        assert set(report.new) == {name for name in ours if name.startswith(NEW)}
        assert report.parameters("carried", "encoder") == 153_027_104 - 294_944 == 152_732_160
        assert report.parameters("carried", "decoder") == 159_223_171 - 295_936 == 158_927_235
        assert report.parameters("dropped", "encoder") == 32 * 1024 * 9 + 32 == 294_944
        assert report.parameters("dropped", "decoder") == 32 * 1024 * 9 + 1024 == 295_936
        # Three blocks, a step of 27 taps between 1024 and 2048 channels, a latent convolution of 27 taps.
        blocks = 216_410_112
        assert report.parameters("new", "encoder") == blocks + 27 * 1024 * 2048 + 2048 + 27 * 2048 * 128 + 128
        assert report.parameters("new", "decoder") == blocks + 27 * 2048 * 1024 + 1024 + 27 * 128 * 2048 + 2048
        assert report.tensors("carried") + 4 == sum(tensors)
    # All of FSAE that is not new is filled: the carried parameters, and zeros in the two other temporal taps.
    filled = sum(math.prod(shape) for name, shape in ours.items() if not name.startswith(NEW))
    taps = sum(
        math.prod(shape) * 2 // 3
        for name, shape in ours.items()
        if len(shape) == 5 and shape[2] == 3 and not name.startswith(NEW)
    )
    assert filled - taps == report.parameters("carried")


# --- what does not fit -------------------------------------------------------------------------------------------


def test_keys_that_do_not_fit_are_named(image_model: AutoencoderDC) -> None:
    state = image_model.state_dict()
    key = "decoder.up_blocks.1.2.conv1.weight"

    def refused(changed: dict[str, Tensor]) -> str:
        with pytest.raises(CheckpointError) as error:
            from_dc_ae(changed, **SIZES)
        return str(error.value)

    missing = refused({name: tensor for name, tensor in state.items() if name != key})
    assert f"lacks '{key}'" in missing and "(nearest: 'decoder.up_blocks.1." in missing
    renamed = {(name if name != key else "decoder.up_blocks.1.2.convl.weight"): value for name, value in state.items()}
    assert f"lacks '{key}' (nearest: 'decoder.up_blocks.1.2.convl.weight')" in refused(renamed)
    unknown = refused(state | {"decoder.up_blocks.1.3.conv1.weight": state[key]})
    assert "'decoder.up_blocks.1.3.conv1.weight'" in unknown and "nearest" in unknown
    misshapen = refused(state | {key: torch.zeros(8, 8, 5, 5)})
    assert f"'{key}' as [8, 8, 5, 5]" in misshapen and "[8, 8, 3, 3]" in misshapen
    latent = refused(state | {"encoder.conv_out.weight": torch.zeros(8, 32, 3, 3)})
    assert "'encoder.conv_out.weight' as [8, 32, 3, 3]" in latent
    original = original_names(state)
    left_out = "encoder.stages.3.op_list.0.context_module.main.qkv.conv.weight"
    assert left_out in refused({name: tensor for name, tensor in original.items() if name != left_out})
    whole = refused(state | {key: torch.zeros(8, 8, 3, 3, dtype=torch.int8)})
    assert key in whole and "int8" in whole


def test_other_things_than_a_dc_ae_are_refused(converted: FSAE, folder: Path, tmp_path: Path) -> None:
    def refused(source: Any, **sizes: Any) -> str:
        with pytest.raises(UserError) as error:
            from_dc_ae(source, **sizes)
        return str(error.value)

    assert "'encoder.conv_in.weight'" in refused(converted.state_dict())
    assert "empty" in refused({})
    assert "no model folder" in refused(tmp_path / "nowhere")
    torch.save({"a": torch.zeros(1)}, tmp_path / "dc_ae.pt")
    assert "pickle" in refused(tmp_path / "dc_ae.pt") and ".safetensors" in refused(tmp_path / "dc_ae.pt")
    assert "dc_ae.pt" in refused(tmp_path)
    (tmp_path / "text.safetensors").write_text("no weights at all, only words")
    assert "no safetensors file" in refused(tmp_path / "text.safetensors")
    converted.save_pretrained(tmp_path / "fsae")
    assert "a saved FSAE" in refused(tmp_path / "fsae")
    pipeline = tmp_path / "pipeline"
    (pipeline / "vae").mkdir(parents=True)
    (pipeline / "vae" / "config.json").write_text("{}")
    assert str(pipeline / "vae") in refused(pipeline)
    for key, value, word in (
        ("upsample_block_type", "pixel_shuffle", "upsample_block_type"),
        ("downsample_block_type", "pixel_unshuffle", "downsample_block_type"),
        ("decoder_act_fns", ["relu", *["silu"] * 5], "decoder_act_fns"),
        ("encoder_layers_per_block", [0, 1, 1, 1, 1, 1], "encoder_layers_per_block"),
        ("encoder_qkv_multiscales", [[]] * 6, "encoder_qkv_multiscales"),
    ):
        other = tmp_path / key
        other.mkdir()
        (other / "model.safetensors").symlink_to(folder / "diffusion_pytorch_model.safetensors")
        (other / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {key: value}))
        assert word in refused(other) and "another architecture" in refused(other)
    (other / "config.json").write_text('{"model_name": "dc-ae-f64c128-in-1.0"}')
    assert "dc-ae-f64c128-in-1.0" in refused(other)


def test_options_that_do_not_fit_are_refused(image_model: AutoencoderDC) -> None:
    state = image_model.state_dict()
    for options, word in (
        ({"width": (1,) * 7}, "nearest: 'widths'"),
        ({"noise": 0.05}, "'noise'"),
        ({"encoder_depths": (1, 1)}, "encoder_depths has 2"),
        ({"latent_channels": 48}, "48 latent channels"),
        ({"widths": (4, 8, 16, 32, 32, 64, 384)}, "384"),
    ):
        with pytest.raises(UserError, match=word):
            from_dc_ae(state, **(SIZES | options))


# --- the command -------------------------------------------------------------------------------------------------


def test_the_commands_help_needs_no_torch() -> None:
    code = "import sys; from fsae.cli import main; sys.exit(main(['convert', '--help']) or 'torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert "--decoder-widths" in shown.stdout


def test_command_converts_and_says_what_it_did(
    folder: Path, converted: FSAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "causal"
    assert main(["convert", str(folder), "-o", str(output), "--seed", "0"]) == 0
    said = capsys.readouterr().out
    assert f"saved {output}" in said
    assert re.search(r"carried over\s+\d+\s+[\d,]+\s+\d+\s+[\d,]+", said)
    assert_same(FSAE.from_pretrained(output), converted)
    assert main(["convert", str(folder), "-o", str(tmp_path / "seeded"), "--seed", "1"]) == 0
    assert not torch.equal(
        FSAE.from_pretrained(tmp_path / "seeded").encoder.conv_out.weight, converted.encoder.conv_out.weight
    )


def test_command_goes_on_to_standard_and_lite(
    image_model: AutoencoderDC, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    causal, standard, lite = (str(tmp_path / name) for name in ("causal", "standard", "lite"))
    from_dc_ae(image_model.state_dict(), **SIZES, injection_head_dim=4)[0].save_pretrained(causal)
    assert main(["convert", causal, "-o", standard, "--to", "standard", "--noise", "0.1"]) == 0
    config = FSAE.from_pretrained(standard).config
    assert (config.decoder_kind, config.noise, config.first_frame_injection) == ("standard", 0.1, True)
    widths = ["2", "8", "16", "32", "32", "64", "128"]
    assert main(["convert", standard, "-o", lite, "--to", "lite", "--decoder-widths", *widths]) == 0
    assert tuple(FSAE.from_pretrained(lite).config.decoder_widths) == tuple(map(int, widths))
    assert main(["convert", causal, "-o", str(tmp_path / "at once"), "--to", "lite"]) == 0
    config = FSAE.from_pretrained(tmp_path / "at once").config
    assert (config.decoder_kind, config.noise) == ("lite", 0.05)
    assert tuple(config.decoder_widths)[:3] == (2, 4, 16)
    capsys.readouterr()
    for arguments, word in (
        ([standard, "--to", "causal"], "standard decoder already"),
        ([lite, "--to", "lite"], "lite decoder already"),
    ):
        assert main(["convert", *arguments, "-o", str(tmp_path / "never")]) == 2
        assert word in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_command_checks_before_it_works(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("here")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    new = str(tmp_path / "new")

    def refused(*arguments: str) -> str:
        assert main(["convert", *arguments]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    with monkeypatch.context() as patch:
        patch.setattr("fsae.weights.convert.from_dc_ae", None)
        assert "is a file" in refused(str(folder), "-o", str(tmp_path / "file"))
        assert "not empty" in refused(str(folder), "-o", str(tmp_path / "full"))
        assert "no folder" in refused(str(folder), "-o", str(tmp_path / "a" / "b"))
        assert "--noise" in refused(str(folder), "-o", new, "--noise", "0.1")
        assert "--noise" in refused(str(folder), "-o", new, "--to", "standard", "--noise", "-1")
        assert "--decoder-widths" in refused(str(folder), "-o", new, "--decoder-widths", "2", "4")
        assert "invalid choice" in refused(str(folder), "-o", new, "--to", "smaller")
    assert "no model folder" in refused(str(tmp_path / "nowhere"), "-o", new)
    # The default injection has heads of 64 channels, which stage 2 of this tiny model is too narrow for.
    assert "head_dim" in refused(str(folder), "-o", new, "--to", "standard")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"

    def full_disk(_: FSAE, folder: str) -> None:
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "config.json").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FSAE, "save_pretrained", full_disk)
    assert "No space left" in refused(str(folder), "-o", new)
    assert not Path(new).exists()
