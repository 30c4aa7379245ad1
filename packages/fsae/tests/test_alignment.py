"""The Video VF loss, against sums written out and a teacher that is a real, tiny DINOv2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from fsae.errors import CheckpointError, UserError
from fsae.losses.alignment import (
    Dinov2Teacher,
    TrunkTeacher,
    VideoVFLoss,
    adaptive_weight,
    resized,
    teacher_features,
)
from fsae.losses.perceptual import PerceptualLoss


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(channels: int = 4, teacher_channels: int = 6, **options: float) -> VideoVFLoss:
    torch.manual_seed(0)
    return VideoVFLoss(channels, teacher_channels, **options).double()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56, mlp_ratio=2)
    Dinov2Model(config).save_pretrained(folder)
    return folder


def stretched(module: VideoVFLoss, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """W z on the teacher's grid, positions in a row, frame by frame."""
    mapped = torch.einsum("dc,bcthw->bdthw", module.projection.weight, latents)
    frames = [F.interpolate(mapped[:, :, t], size, mode="bilinear") for t in range(latents.shape[2])]
    return torch.stack(frames, dim=2).flatten(2)


def test_the_sums_of_the_paper() -> None:
    module, latents, features = loss(), randn(2, 4, 2, 2, 3), randn(2, 6, 2, 3, 2, seed=1)
    terms = module(latents, features)
    z, f = stretched(module, latents, (3, 2)), features.flatten(2)
    count = z.shape[2]

    def cos(a: Tensor, b: Tensor) -> float:
        return (a @ b / (a @ a).sqrt() / (b @ b).sqrt()).item()

    cosine = distance = 0.0
    for i in range(2):
        for p in range(count):
            cosine += max(0.0, 1 - 0.5 - cos(z[i, :, p], f[i, :, p])) / count / 2
            for q in range(count):
                apart = abs(cos(z[i, :, p], z[i, :, q]) - cos(f[i, :, p], f[i, :, q]))
                distance += max(0.0, apart - 0.25) / count**2 / 2
    assert terms.cosine.item() == pytest.approx(cosine, rel=1e-10) and cosine > 0
    assert terms.distance.item() == pytest.approx(distance, rel=1e-10) and distance > 0
    assert terms.total.item() == pytest.approx(cosine + distance, rel=1e-10)


def test_margins_are_subtracted_inside() -> None:
    latents, features = randn(1, 4, 1, 2, 2), randn(1, 6, 1, 2, 2, seed=1)
    tight = loss(cosine_margin=0.0, distance_margin=0.0)(latents, features)
    assert loss(cosine_margin=2.0, distance_margin=2.0)(latents, features).total.item() == 0
    assert tight.cosine > loss()(latents, features).cosine and tight.distance > loss()(latents, features).distance


def test_aligned_features_cost_nothing_even_without_margins() -> None:
    module = loss(cosine_margin=0.0, distance_margin=0.0)
    latents = randn(2, 4, 3, 4, 4)
    exact = torch.einsum("dc,bcthw->bdthw", module.projection.weight, latents)
    scales = randn(2, 1, 3, 4, 4, seed=3).abs() + 0.1  # the cosine does not see lengths
    terms = module(latents, exact.detach() * scales)
    assert terms.total.item() == pytest.approx(0, abs=1e-12)
    assert module(latents, exact.detach().roll(1, 2)).total > 0.1


def test_gradients_reach_latents_and_projection_only() -> None:
    module, latents, features = loss(), randn(1, 4, 2, 2, 2), randn(1, 6, 2, 3, 3, seed=1)
    module(latents.requires_grad_(), features).total.backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    weight = module.projection.weight.grad
    assert weight is not None and weight.abs().sum() > 0
    assert [name for name, _ in module.named_parameters()] == ["projection.weight"]


def test_too_many_positions_are_sampled_by_the_generator() -> None:
    latents, features = randn(1, 4, 2, 4, 4), randn(1, 6, 2, 4, 4, seed=1)
    some, whole = loss(positions=20), loss()

    def drawn(seed: int) -> float:
        return some(latents, features, torch.Generator().manual_seed(seed)).distance.item()

    assert drawn(0) == drawn(0) != drawn(1)
    mean = torch.tensor([drawn(seed) for seed in range(40)]).mean().item()
    assert mean == pytest.approx(whole(latents, features).distance.item(), rel=0.1)
    assert some(latents, features).cosine == whole(latents, features).cosine
    assert loss(positions=32)(latents, features).distance == whole(latents, features).distance


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 latents in time, but 3"):
        loss()(randn(1, 4, 2, 2, 2), randn(1, 6, 3, 2, 2))


def test_the_first_frame_is_kept_and_fours_are_averaged() -> None:
    class Colours:
        channels = 3

        def __call__(self, pictures: Tensor) -> Tensor:
            return pictures.mean((2, 3), keepdim=True).expand(-1, -1, 2, 2)

    video = randn(2, 3, 9, 4, 4)
    means = video.mean((3, 4))
    expected = torch.stack([means[:, :, 0], means[:, :, 1:5].mean(2), means[:, :, 5:].mean(2)], dim=2)
    torch.testing.assert_close(
        teacher_features(Colours(), video, 4), expected[..., None, None].expand(-1, -1, -1, 2, 2)
    )
    assert teacher_features(Colours(), video[:, :, :1], 4).shape == (2, 3, 1, 2, 2)


def test_dinov2_gives_its_patches_of_the_normalised_picture(dinov2: Path) -> None:
    teacher = Dinov2Teacher(dinov2)
    assert teacher.channels == 16 and not any(p.requires_grad for p in teacher.parameters())
    pictures = randn(2, 3, 64, 96).float().clamp(-1, 1)
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    small = F.interpolate(pictures, (224, 224), mode="bilinear")
    model = Dinov2Model.from_pretrained(dinov2).eval()
    with torch.no_grad():
        tokens = model(((small + 1) / 2 - mean) / deviation).last_hidden_state[:, 1:]
        features = teacher(pictures)
    assert features.shape == (2, 16, 16, 16)
    torch.testing.assert_close(features[1, :, 3, 5], tokens[1, 3 * 16 + 5], rtol=1e-4, atol=1e-5)
    video = pictures.unsqueeze(2).expand(-1, -1, 5, -1, -1)
    pooled = teacher_features(teacher, video.requires_grad_(), 4)
    assert pooled.shape == (2, 16, 2, 16, 16) and not pooled.requires_grad
    torch.testing.assert_close(pooled[:, :, 1], features, rtol=1e-4, atol=1e-5)


def test_the_trunk_of_lpips_can_teach() -> None:
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    state = {f"features.{i}.weight": torch.randn(o, c, k, k) for i, (o, c, k) in shapes.items()}
    state |= {f"features.{i}.bias": torch.zeros(o) for i, (o, _, _) in shapes.items()}
    state |= {f"lin{n}.1.weight": torch.ones(1, o, 1, 1) for n, (o, _, _) in enumerate(shapes.values())}
    perceptual = PerceptualLoss(state)
    teacher = TrunkTeacher(perceptual)
    pictures = randn(1, 3, 224, 224).float()
    assert teacher(pictures).shape == (1, teacher.channels, 13, 13) == (1, 256, 13, 13)
    torch.testing.assert_close(teacher(pictures), perceptual.features(pictures)[4])
    assert teacher(pictures[..., :64]).shape == (1, 256, 13, 13)


def test_unusable_teachers_are_refused(tmp_path: Path, dinov2: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        Dinov2Teacher(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(CheckpointError, match="'clip'; a dinov2"):
        Dinov2Teacher(tmp_path)
    (tmp_path / "config.json").write_text((dinov2 / "config.json").read_text())
    with pytest.raises(CheckpointError, match="cannot be read"):
        Dinov2Teacher(tmp_path)
    state = load_file(dinov2 / "model.safetensors")
    state.pop("layernorm.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks layernorm.weight"):
        Dinov2Teacher(tmp_path)


def test_pictures_are_made_smaller_without_aliases() -> None:
    stripes = torch.ones(1, 3, 448, 448)
    stripes[..., ::2] = -1
    assert resized(stripes).abs().max() < 0.2
    assert resized(stripes[..., :112, :112]).shape == (1, 3, 224, 224)


def test_the_adaptive_weight_is_the_ratio_of_gradients() -> None:
    weight = randn(3, 2).requires_grad_()
    x = randn(2, seed=1)
    first, second = (weight @ x).square().sum(), (weight @ x).abs().sum()
    slopes = [torch.autograd.grad(value, weight, retain_graph=True)[0].norm() for value in (first, second)]
    ratio = adaptive_weight(first, second, weight)
    torch.testing.assert_close(ratio, slopes[0] / (slopes[1] + 1e-4))
    assert not ratio.requires_grad
    torch.testing.assert_close(adaptive_weight(1e9 * first, 0 * second, weight), torch.tensor(1e8, dtype=torch.float64))
