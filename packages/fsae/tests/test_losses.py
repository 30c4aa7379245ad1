"""Losses against their formulas, written out in double precision."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fsae.errors import CheckpointError, UserError
from fsae.losses.perceptual import PerceptualLoss, temporal_slices
from fsae.losses.reconstruction import l1_loss

ALEXNET = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
VGG16_CHANNELS = [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512]


def state_of(convs: dict[int, tuple[int, int, int]], heads: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for index, (out, into, k) in convs.items():
        state[f"features.{index}.weight"] = torch.randn(out, into, k, k, generator=generator) / (into * k * k) ** 0.5
        state[f"features.{index}.bias"] = torch.randn(out, generator=generator) * 0.1
    for number, channels in enumerate(heads):
        state[f"lin{number}.model.1.weight"] = torch.rand(1, channels, 1, 1, generator=generator)
    return state


@pytest.fixture(scope="module")
def alexnet() -> dict[str, Tensor]:
    return state_of(ALEXNET, [64, 192, 384, 256, 256])


def vgg16() -> dict[str, Tensor]:
    convs, index, into = {}, 0, 3
    for channels in VGG16_CHANNELS:  # torchvision numbers each convolution, ReLU and pool
        if channels:
            convs[index] = (channels, into, 3)
            into = channels
        index += 2 if channels else 1
    return state_of(convs, [64, 128, 256, 512, 512])


def images(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.rand(*shape, generator=generator) * 2 - 1 for _ in range(2))
    return a, b


def distance(taps: list[tuple[Tensor, Tensor]], state: dict[str, Tensor]) -> float:
    """The last step of LPIPS in numpy."""
    total = 0.0
    for number, pair in enumerate(taps):
        x, y = (t.numpy() / np.sqrt((t.numpy() ** 2).sum(1, keepdims=True)) for t in pair)
        weight = state[f"lin{number}.model.1.weight"].double().numpy()
        total += ((x - y) ** 2 * weight).sum(1).mean()
    return total


def scaled(image: Tensor) -> Tensor:
    """[-1, 1] to ImageNet's scale, by way of [0, 1]."""
    mean = torch.tensor([0.485, 0.456, 0.406]).double().view(1, 3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).double().view(1, 3, 1, 1)
    return ((image.double() + 1) / 2 - mean) / deviation


def alexnet_taps(image: Tensor, state: dict[str, Tensor]) -> list[Tensor]:
    def conv(x: Tensor, i: int, **geometry: int) -> Tensor:
        return F.conv2d(
            x, state[f"features.{i}.weight"].double(), state[f"features.{i}.bias"].double(), **geometry
        ).relu()

    a = conv(scaled(image), 0, stride=4, padding=2)
    b = conv(F.max_pool2d(a, 3, 2), 3, padding=2)
    c = conv(F.max_pool2d(b, 3, 2), 6, padding=1)
    d = conv(c, 8, padding=1)
    return [a, b, c, d, conv(d, 10, padding=1)]


def vgg16_taps(image: Tensor, state: dict[str, Tensor]) -> list[Tensor]:
    x, index, taps = scaled(image), 0, []
    for channels in [*VGG16_CHANNELS, 0]:
        if channels:
            weight, bias = (state[f"features.{index}.{name}"].double() for name in ("weight", "bias"))
            x = F.conv2d(x, weight, bias, padding=1).relu()
            index += 2
        else:
            taps.append(x)
            x = F.max_pool2d(x, 2)
            index += 1
    return taps


def blur(x: Tensor) -> Tensor:
    """Reflect two pixels, weigh 1 2 1 in both directions, keep every other position: by shifted sums."""
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")
    x = (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4
    return ((x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4)[:, :, ::2, ::2]


def shift_tolerant_taps(image: Tensor, state: dict[str, Tensor]) -> list[Tensor]:
    def conv(x: Tensor, i: int, padding: int = 1) -> Tensor:
        return F.conv2d(
            x, state[f"features.{i}.weight"].double(), state[f"features.{i}.bias"].double(), padding=padding
        )

    a = blur(conv(scaled(image), 0, 2)).relu()
    b = conv(blur(F.max_pool2d(a, 3, 1)), 3, 2).relu()
    c = conv(blur(F.max_pool2d(b, 3, 1)), 6).relu()
    d = conv(c, 8).relu()
    return [a, b, c, d, conv(d, 10).relu()]


def test_lpips_alexnet(alexnet: dict[str, Tensor]) -> None:
    x, y = images(2, 3, 64, 72)
    expected = distance(list(zip(alexnet_taps(x, alexnet), alexnet_taps(y, alexnet), strict=True)), alexnet)
    loss = PerceptualLoss(alexnet)
    assert loss(x, y).item() == pytest.approx(expected, rel=1e-5)
    assert loss(x, x).item() == 0


def test_lpips_vgg16() -> None:
    state = vgg16()
    assert "features.28.weight" in state
    x, y = images(1, 3, 32, 32)
    expected = distance(list(zip(vgg16_taps(x, state), vgg16_taps(y, state), strict=True)), state)
    assert PerceptualLoss(state)(x, y).item() == pytest.approx(expected, rel=1e-5)


def test_lpips_shift_tolerant(alexnet: dict[str, Tensor]) -> None:
    x, y = images(1, 3, 40, 32)
    taps = zip(shift_tolerant_taps(x, alexnet), shift_tolerant_taps(y, alexnet), strict=True)
    blurred = alexnet | {"net.slice1.1.filt": torch.zeros(64, 1, 3, 3)}
    value = PerceptualLoss(blurred)(x, y).item()
    assert value == pytest.approx(distance(list(taps), alexnet), rel=1e-5)
    assert value != pytest.approx(PerceptualLoss(alexnet)(x, y).item(), rel=1e-2)


def test_lpips_of_a_video_is_the_mean_over_its_frames(alexnet: dict[str, Tensor]) -> None:
    loss = PerceptualLoss(alexnet)
    x, y = images(2, 3, 3, 64, 64)
    frames = [loss(x[:, :, t], y[:, :, t]) for t in range(3)]
    torch.testing.assert_close(loss(x, y), torch.stack(frames).mean())


def test_lpips_gradient_reaches_the_reconstruction_only(alexnet: dict[str, Tensor]) -> None:
    loss = PerceptualLoss(alexnet)
    x, y = (image.requires_grad_() for image in images(1, 3, 64, 64))
    loss(x, y).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0 and y.grad is None
    assert all(p.grad is None for p in loss.parameters())


def test_lpips_weights_may_be_spread_over_files_and_names(tmp_path: Path, alexnet: dict[str, Tensor]) -> None:
    trunk = {k: v for k, v in alexnet.items() if k.startswith("features")} | {"classifier.1.weight": torch.zeros(2)}
    heads = {k.replace(".model", ""): v for k, v in alexnet.items() if k.startswith("lin")}
    torch.save(trunk, tmp_path / "trunk.pth")
    save_file(heads, tmp_path / "heads.safetensors")
    x, y = images(1, 3, 64, 64)
    split = PerceptualLoss.from_files(tmp_path / "trunk.pth", tmp_path / "heads.safetensors")
    assert torch.equal(split(x, y), PerceptualLoss(alexnet)(x, y))


def test_unusable_lpips_weights_are_refused(tmp_path: Path, alexnet: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match="lin2 is missing"):
        PerceptualLoss({k: v for k, v in alexnet.items() if k != "lin2.model.1.weight"})
    with pytest.raises(CheckpointError, match="bias is missing"):
        PerceptualLoss({k: v for k, v in alexnet.items() if k != "features.3.bias"})
    with pytest.raises(CheckpointError, match=r"shape \(191,\)"):
        PerceptualLoss(alexnet | {"features.3.bias": torch.zeros(191)})
    with pytest.raises(CheckpointError, match="has 1 convolutions"):
        PerceptualLoss({"features.0.weight": torch.zeros(8, 3, 3, 3)})
    with pytest.raises(UserError, match="does not exist"):
        PerceptualLoss.from_files(tmp_path / "none.pth")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(CheckpointError, match="plain tensors"):
        PerceptualLoss.from_files(tmp_path / "evil.pth")


def test_files_that_are_no_lpips_weights_are_named(tmp_path: Path, alexnet: dict[str, Tensor]) -> None:
    path = tmp_path / "weights.pth"
    video = b"\0\0\0\x1cftypisom\0\0\2\0isomiso2mp41\0\0\0\x08free"
    for content in (b"", b"hello", b"}", b"(", b"\x80\x02)R.", b"K\x01.", b"\x80\x02K\x01K\x02s.", video):
        path.write_bytes(content)
        with pytest.raises(
            CheckpointError, match=r"weights\.pth cannot be read as plain tensors; give a \.safetensors"
        ):
            PerceptualLoss.from_files(path)
    for held in (torch.zeros(3), [torch.zeros(3)], {"epoch": 3}, {1: torch.zeros(3)}, {"state_dict": torch.zeros(3)}):
        torch.save(held, path)
        with pytest.raises(CheckpointError, match=r"weights\.pth holds no tensors by name; give a \.safetensors"):
            PerceptualLoss.from_files(path)
    torch.save({"epoch": 3, "state_dict": alexnet | {"steps": 7}}, path)
    x, y = images(1, 3, 64, 64)
    assert torch.equal(PerceptualLoss.from_files(path)(x, y), PerceptualLoss(alexnet)(x, y))


def test_l1() -> None:
    x, y = images(2, 3, 1, 4, 5)
    assert l1_loss(x, y).item() == pytest.approx(np.abs(x.double().numpy() - y.double().numpy()).mean(), rel=1e-6)


@pytest.mark.parametrize("frames", [1, 2, 5, 0])
def test_temporal_slices_change_neither_value_nor_gradient(alexnet: dict[str, Tensor], frames: int) -> None:
    loss = PerceptualLoss(alexnet).double()
    x, y = (video.double() for video in images(1, 3, 5, 64, 64))
    whole, sliced = x.clone().requires_grad_(), x.clone().requires_grad_()
    (3 * loss(whole, y)).backward()
    value = temporal_slices(loss, sliced, y, frames)
    torch.testing.assert_close(value, loss(x, y), rtol=1e-12, atol=0)
    (3 * value).backward()
    assert whole.grad is not None and sliced.grad is not None
    torch.testing.assert_close(sliced.grad, whole.grad, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(temporal_slices(loss, x, y, frames), value.detach())  # without a gradient


def held(run: Callable[[], Tensor]) -> int:
    """The bytes that the graph of ``run`` keeps for its backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = run()
    assert value.requires_grad
    return sum(kept.values())


def test_temporal_slices_hold_one_slice_at_a_time(alexnet: dict[str, Tensor]) -> None:
    loss, seen = PerceptualLoss(alexnet), []
    x, y = images(1, 3, 6, 64, 64)
    x.requires_grad_()

    def counted(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a.shape[2], held(lambda: loss(a, b))))
        return loss(a, b)

    whole = held(lambda: loss(x, y))
    temporal_slices(counted, x, y, 4).backward()
    assert [frames for frames, _ in seen] == [4, 2]
    trunk = sum(p.numel() for p in loss.parameters()) * 4
    assert seen[1][1] - trunk < 0.4 * (whole - trunk)
    slope = torch.autograd.grad(temporal_slices(loss, x, y, 2), x, retain_graph=True)
    assert slope[0].shape == x.shape
