"""FSAE: shapes, causality, parameter counts and the 2-D autoencoder inside it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsae import FSAE
from fsae.errors import UserError
from fsae.shapes import Compression
from fsae.weights.inflation import inflate

TINY: dict[str, Any] = {
    "widths": (4, 4, 8, 32, 32, 32, 32),
    "encoder_depths": (1,) * 7,
    "decoder_depths": (1,) * 7,
    "latent_channels": 16,
    "injection_head_dim": 4,
    "injection_window": 128,
    "injection_reach": 8.0,
}


def tiny(kind: str, seed: int = 0, **overrides: Any) -> FSAE:
    """A tiny model of every layer kind, with no parameter left at zero or one."""
    torch.manual_seed(seed)
    model = FSAE(**{**TINY, "decoder_kind": kind, "first_frame_injection": kind != "causal", **overrides}).double()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    for stage in model.decoder.stages:
        if stage.injection is not None:
            torch.nn.init.normal_(stage.injection.to_out.weight, std=0.3)
    return model.eval()


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- sizes -------------------------------------------------------------------------------------------------------


def conv(inputs: int, outputs: int, taps: int = 27, bias: bool = True) -> int:
    return taps * inputs * outputs + (outputs if bias else 0)


def res_block(c: int) -> int:
    return conv(c, c) + conv(c, c, bias=False) + 2 * c


def evit_block(c: int) -> int:
    attention = conv(c, 3 * c, 1, False) + 25 * 3 * c + 3 * c * 32 + conv(2 * c, c, 1, False) + 2 * c
    local = conv(c, 8 * c, 1) + 27 * 8 * c + 8 * c + conv(4 * c, c, 1, False) + 2 * c
    return attention + local


def paper_encoder() -> int:
    widths, depths = (128, 256, 512, 512, 1024, 1024, 2048), (2, 2, 2, 3, 3, 3, 3)
    stages = enumerate(zip(widths, depths, strict=True))
    blocks = sum(d * (res_block(c) if s < 3 else evit_block(c)) for s, (c, d) in stages)
    down = sum(conv(a, b) for a, b in pairwise(widths))
    return conv(3, 128) + blocks + down + conv(2048, 128)


def paper_decoder(outer: tuple[int, int]) -> int:
    widths = (*outer, 512, 512, 1024, 1024, 2048)
    blocks = sum(3 * (res_block(c) if s < 3 else evit_block(c)) for s, c in enumerate(widths))
    up = sum(conv(b, a) for a, b in pairwise(widths))
    return conv(128, 2048) + blocks + up + 2 * outer[0] + conv(outer[0], 3)


def test_parameter_counts_of_the_paper_sizes() -> None:
    assert paper_encoder() == 494_710_144
    assert paper_decoder((128, 256)) == 513_292_419
    # Four matrices and their biases a stage, and two norms with weight and bias.
    injection = sum(4 * (c * c + c) + 4 * c for c in (512, 512, 1024, 1024, 2048))
    with torch.device("meta"):
        bare = FSAE.from_preset("standard", first_frame_injection=False)
        standard = FSAE.from_preset("standard")
        lite = FSAE.from_preset("lite", first_frame_injection=False)
    assert count(bare.encoder) == paper_encoder()
    assert count(bare.decoder) == paper_decoder((128, 256))
    assert count(standard.decoder) == paper_decoder((128, 256)) + injection == 540_596_355
    assert count(lite.decoder) == paper_decoder((64, 128)) == 500_898_883


@pytest.mark.parametrize("kind", ["causal", "standard", "lite"])
def test_shapes_there_and_back(kind: str) -> None:
    model = tiny(kind)
    for frames, latents in ((1, 1), (5, 2), (17, 5)):
        video = torch.randn(1, 3, frames, 64, 128, dtype=torch.double)
        encoded = model.encode(video)
        assert encoded.shape[1:] == model.latent_shape(frames, 64, 128) == (16, latents, 1, 2)
        assert model.decode(encoded, video[:, :, :1]).shape == video.shape
    assert (model.spatial_compression, model.temporal_compression) == (64, 4)


@pytest.mark.parametrize(("shape", "word"), [((4, 64, 64), "4 frames"), ((1, 64, 96), "96x64"), ((1, 0, 64), "64x0")])
def test_sizes_that_do_not_fit_are_named(shape: tuple[int, int, int], word: str) -> None:
    with pytest.raises(UserError, match=word):
        tiny("causal").encode(torch.zeros(1, 3, *shape))


# --- time --------------------------------------------------------------------------------------------------------


def test_encoder_and_causal_decoder_do_not_see_the_future() -> None:
    model = tiny("causal")
    torch.manual_seed(1)
    video = torch.randn(1, 3, 17, 64, 64, dtype=torch.double)
    changed = video.clone()
    changed[:, :, 9:] = torch.randn_like(changed[:, :, 9:])
    before, after = model.encode(video), model.encode(changed)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.equal(before[:, :, 3:], after[:, :, 3:])
    assert torch.equal(model.decode(before)[:, :, :9], model.decode(after)[:, :, :9])


def test_lite_decoder_sees_no_later_latent_and_standard_does() -> None:
    for kind, blind in (("lite", True), ("standard", False)):
        model = tiny(kind)
        latents = torch.randn(1, 16, 4, 1, 1, dtype=torch.double)
        changed = latents.clone()
        changed[:, :, 3] += 1
        same = torch.equal(model.decode(latents)[:, :, :9], model.decode(changed)[:, :, :9])
        assert same is blind


def test_features_of_the_first_frame_are_those_of_the_clip() -> None:
    model = tiny("standard")
    video = torch.randn(1, 3, 9, 64, 64, dtype=torch.double)
    whole = [feature[:, :, 0] for feature in model.encoder.features(video)[0]]
    features = model.first_frame_features(video[:, :, :1])
    assert [feature is None for feature in features] == [True] * 2 + [False] * 5
    for got, want in zip(features[2:], whole[2:], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    latents = model.encode(video)
    torch.testing.assert_close(model(video), model.decode(latents, video[:, :, :1]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_the_same_with_checkpointing(training: bool) -> None:
    model = tiny("standard").train(training)
    video = torch.randn(1, 3, 5, 64, 64, dtype=torch.double)
    saved: list[int] = []

    def gradients() -> list[Tensor]:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
            loss = model(video).square().mean()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    want, plain = gradients(), sum(saved)
    model.enable_gradient_checkpointing()
    got, checkpointed = gradients(), sum(saved)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert checkpointed < 0.5 * plain
    model.disable_gradient_checkpointing()
    gradients()
    assert sum(saved) == plain


# --- the 2-D autoencoder inside ----------------------------------------------------------------------------------


class ImageAutoencoder:
    """The same autoencoder on images `B 3 H W`, in 2-D functions alone; weights by the names of the video model."""

    def __init__(self, state: dict[str, Tensor], depths: tuple[int, ...]) -> None:
        self.state, self.depths = state, depths

    def conv(self, name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"].sum(2)
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, weight.shape[-1] // 2, groups=groups)

    def norm(self, name: str, x: Tensor) -> Tensor:
        x = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return x * self.state[f"{name}.weight"][:, None, None] + self.state[f"{name}.bias"][:, None, None]

    def block(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.conv1.weight" in self.state:
            return x + self.norm(f"{name}.norm", self.conv(f"{name}.conv2", F.silu(self.conv(f"{name}.conv1", x))))
        x = x + self.linear_attention(f"{name}.attention", x)
        wide = F.silu(self.conv(f"{name}.local.inverted", x))
        value, gate = self.conv(f"{name}.local.depth", wide, groups=wide.shape[1]).chunk(2, 1)
        return x + self.norm(f"{name}.local.norm", self.conv(f"{name}.local.point", value * F.silu(gate)))

    def linear_attention(self, name: str, x: Tensor) -> Tensor:
        """Every pair of pixels, one head after the other."""
        qkv = self.conv(f"{name}.qkv", x)
        near = self.conv(f"{name}.aggregate.0", qkv, groups=qkv.shape[1])
        near = self.conv(f"{name}.aggregate.1", near, groups=qkv.shape[1] // 32)
        heads = []
        for head in torch.cat([qkv, near], 1).flatten(2).split(96, 1):
            q, k, v = F.relu(head[:, :32]), F.relu(head[:, 32:64]), head[:, 64:]
            weights = torch.einsum("bdi,bdj->bij", q, k)
            heads.append(torch.einsum("bij,bdj->bdi", weights / (weights.sum(-1, keepdim=True) + 1e-15), v))
        out = torch.cat(heads, 1).unflatten(2, x.shape[2:])
        return self.norm(f"{name}.norm", self.conv(f"{name}.proj", out))

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", x)
        for s, depth in enumerate(self.depths):
            for b in range(depth):
                x = self.block(f"encoder.stages.{s}.blocks.{b}", x)
            if f"encoder.stages.{s}.down.conv.weight" in self.state:
                main = self.conv(f"encoder.stages.{s}.down.conv", x, stride=2)
                mean = F.pixel_unshuffle(x, 2)
                x = main + mean.unflatten(1, (main.shape[1], -1)).mean(2)
        out = self.conv("encoder.conv_out", x)
        return out + x.unflatten(1, (out.shape[1], -1)).mean(2)

    def decode(self, z: Tensor) -> Tensor:
        main = self.conv("decoder.conv_in", z)
        x = main + z.repeat_interleave(main.shape[1] // z.shape[1], 1)
        for s in reversed(range(len(self.depths))):
            if f"decoder.stages.{s}.up.conv.weight" in self.state:
                main = self.conv(f"decoder.stages.{s}.up.conv", F.interpolate(x, scale_factor=2, mode="nearest"))
                x = main + F.pixel_shuffle(x.repeat_interleave(4 * main.shape[1] // x.shape[1], 1), 2)
            for b in range(self.depths[s]):
                x = self.block(f"decoder.stages.{s}.blocks.{b}", x)
        return self.conv("decoder.conv_out", F.relu(self.norm("decoder.norm_out", x)))


@pytest.mark.parametrize("kind", ["causal", "standard", "lite"])
def test_equals_its_image_autoencoder_on_an_image_and_on_a_static_clip(kind: str) -> None:
    model = tiny(kind, noise=0.0, first_frame_injection=False)
    inflate(model)
    image = torch.randn(1, 3, 128, 64, dtype=torch.double)
    flat = ImageAutoencoder({k: v.detach() for k, v in model.state_dict().items()}, (1,) * 7)
    z = flat.encode(image)
    x = flat.decode(z)
    for frames in (1, 9):
        static = image.unsqueeze(2).expand(-1, -1, frames, -1, -1)
        latents = model.encode(static)
        torch.testing.assert_close(latents, z.unsqueeze(2).expand_as(latents), rtol=1e-12, atol=1e-12)
        video = model.decode(latents)
        torch.testing.assert_close(video, x.unsqueeze(2).expand_as(video), rtol=1e-12, atol=1e-12)


def test_inflation_keeps_images_and_separates_the_frames_of_a_moving_clip() -> None:
    model = tiny("standard", noise=0.0)
    image = torch.randn(1, 3, 1, 64, 64, dtype=torch.double)
    clip = torch.randn(1, 3, 9, 64, 64, dtype=torch.double)
    before, before_clip = model(image), model(clip)
    inflate(model)
    torch.testing.assert_close(model(image), before, rtol=1e-10, atol=1e-10)
    assert (model(clip) - before_clip).abs().max() > 1e-3
    for module in model.modules():
        if getattr(module, "kernel_size", (1,))[0] == 3:
            taps = module.weight.abs().sum((0, 1, 3, 4))
            assert [bool(t > 0) for t in taps] == [tap == module.current_tap for tap in range(3)]


# --- the image autoencoder is diffusers' -------------------------------------------------------------------------


def test_blocks_equal_diffusers_dc_ae() -> None:
    """The residual and the EfficientViT block with the same random weights, fp32."""
    from diffusers.models.autoencoders.autoencoder_dc import EfficientViTBlock
    from diffusers.models.autoencoders.autoencoder_dc import ResBlock as TheirResBlock

    from fsae.layers.blocks import EViTBlock, ResBlock
    from fsae.layers.config import BlockStyle

    torch.manual_seed(0)
    x = torch.randn(2, 64, 12, 10)
    for ours, theirs in (
        (ResBlock(64, BlockStyle()), TheirResBlock(64, 64, norm_type="rms_norm", act_fn="silu")),
        (EViTBlock(64, BlockStyle()), EfficientViTBlock(64, qkv_multiscales=(5,), norm_type="rms_norm")),
    ):
        inflate(ours)
        for parameter in ours.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        mine = {k: v.detach() for k, v in ours.state_dict().items()}
        state = {}
        for key, value in theirs.state_dict().items():
            name, rows = DIFFUSERS_NAMES.get(key, (key, None))
            source = mine[name]
            source = source.sum(2) if source.ndim == 5 else source
            if rows is not None:
                source = source.chunk(3)[rows]
            state[key] = source.reshape(value.shape)
        theirs.load_state_dict(state)
        got = ours(x.unsqueeze(2))[:, :, 0]
        torch.testing.assert_close(got, theirs(x), rtol=1e-5, atol=1e-5)


DIFFUSERS_NAMES: dict[str, tuple[str, int | None]] = {
    "attn.to_q.weight": ("attention.qkv.weight", 0),
    "attn.to_k.weight": ("attention.qkv.weight", 1),
    "attn.to_v.weight": ("attention.qkv.weight", 2),
    "attn.to_qkv_multiscale.0.proj_in.weight": ("attention.aggregate.0.weight", None),
    "attn.to_qkv_multiscale.0.proj_out.weight": ("attention.aggregate.1.weight", None),
    "attn.to_out.weight": ("attention.proj.weight", None),
    "attn.norm_out.weight": ("attention.norm.weight", None),
    "attn.norm_out.bias": ("attention.norm.bias", None),
    "conv_out.conv_inverted.weight": ("local.inverted.weight", None),
    "conv_out.conv_inverted.bias": ("local.inverted.bias", None),
    "conv_out.conv_depth.weight": ("local.depth.weight", None),
    "conv_out.conv_depth.bias": ("local.depth.bias", None),
    "conv_out.conv_point.weight": ("local.point.weight", None),
    "conv_out.norm.weight": ("local.norm.weight", None),
    "conv_out.norm.bias": ("local.norm.bias", None),
}


# --- noise, statistics, files ------------------------------------------------------------------------------------


def test_noise_is_the_generators_and_one_map_for_all_frames() -> None:
    model = tiny("standard")
    latents = torch.randn(1, 16, 2, 1, 1, dtype=torch.double)

    def decode(seed: int) -> Tensor:
        return model.decode(latents, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(decode(0), decode(0))
    assert torch.equal(model.decode(latents), decode(0))
    assert not torch.equal(decode(0), decode(1))
    static = latents[:, :, :1].expand(-1, -1, 3, -1, -1)
    video = model.decode(static)
    torch.testing.assert_close(video, video[:, :, :1].expand_as(video), rtol=0, atol=1e-10)
    silent = tiny("standard", noise=0.0)
    assert torch.equal(silent.decode(latents), silent.decode(latents, generator=torch.Generator().manual_seed(9)))


def test_latents_are_normalised_by_the_configuration() -> None:
    mean, std = torch.randn(16).tolist(), (torch.rand(16) + 0.5).tolist()
    plain, measured = tiny("causal"), tiny("causal", latents_mean=mean, latents_std=std)
    video = torch.randn(1, 3, 5, 64, 64, dtype=torch.double)
    raw, normal = plain.encode(video), measured.encode(video)
    shape = (1, 16, 1, 1, 1)
    want = (raw - raw.new_tensor(mean).view(shape)) / raw.new_tensor(std).view(shape)
    torch.testing.assert_close(normal, want)
    torch.testing.assert_close(measured.decode(normal), plain.decode(raw))


def test_saved_and_loaded_is_the_same_model(tmp_path: Path) -> None:
    model = tiny("lite", latents_mean=[0.5] * 16).float()
    model.save_pretrained(tmp_path)
    loaded = FSAE.from_pretrained(tmp_path)
    saved, read = model.state_dict(), loaded.state_dict()
    assert list(saved) == list(read)
    assert all(torch.equal(saved[name], read[name]) for name in saved)
    video = torch.randn(1, 3, 5, 64, 64)
    torch.testing.assert_close(loaded.encode(video), model.encode(video))


@torch.no_grad()
def test_a_first_frame_of_another_clip_is_refused() -> None:
    model = tiny("standard")
    latents = torch.zeros(2, *model.latent_shape(5, 64, 128), dtype=torch.double)
    for shape in ((2, 3, 1, 128, 64), (1, 3, 1, 64, 128), (2, 1, 1, 64, 128)):
        with pytest.raises(UserError, match=r"first_frame is \(.*latents of 2x1 it is \(2, 3, 1, 64, 128\)"):
            model.decode(latents, torch.zeros(shape, dtype=torch.double))
    fitting = torch.zeros(2, 3, 1, 64, 128, dtype=torch.double)
    assert model.decode(latents, fitting).shape == (2, 3, 5, 64, 128)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"widths": (16, 32)}, "different numbers of stages"),
        ({"decoder_depths": (1, 1)}, "different numbers of stages"),
        ({"latent_channels": 100}, "100 latent channels do not divide the innermost width 128"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        FSAE.from_preset("nano", **options)


def test_only_residual_stages_change_the_frame_rate() -> None:
    depths = {"encoder_depths": (1,) * 4, "decoder_depths": (1,) * 4}
    sizes = {"widths": (32,) * 4, **depths, "latent_channels": 8, "injection_head_dim": 32}
    with pytest.raises(ValueError, match="2 stages change the frame rate.*give 1 or fewer"):
        FSAE(**sizes, residual_stages=1, temporal_stages=2)
    assert FSAE(**sizes, residual_stages=1, temporal_stages=1).compression == Compression(8, 2)
