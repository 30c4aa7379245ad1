"""Metrics against scikit-image, and against their formulas written out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn

from fsae.errors import UserError
from fsae.evaluation.metrics import (
    VideoFeatures,
    flicker,
    frame_flicker,
    frame_lpips,
    frame_psnr,
    frame_ssim,
    frechet_distance,
    psnr,
    ssim,
)
from fsae.losses.perceptual import PerceptualLoss


def videos() -> tuple[Tensor, Tensor]:
    """Two clips of a photograph in motion, and noisy copies."""
    picture = torch.from_numpy(data.astronaut()[60:160, 180:260]).permute(2, 0, 1) / 127.5 - 1
    clean = torch.stack(
        [torch.stack([picture[:, 4 * i : 4 * i + 40, t : t + 48] for t in range(3)], 1) for i in (0, 5)]
    )
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    strength = torch.tensor([0.05, 0.3]).view(2, 1, 1, 1, 1)
    return (clean + strength * noise).clamp(-1, 1), clean


def test_psnr_of_samples_and_frames() -> None:
    noisy, clean = videos()
    for sample in range(2):
        x, y = noisy[sample].double().numpy(), clean[sample].double().numpy()
        expected = peak_signal_noise_ratio(y, x, data_range=2)
        np.testing.assert_allclose(psnr(noisy, clean)[sample], expected, rtol=1e-5)
        frames = [peak_signal_noise_ratio(y[:, t], x[:, t], data_range=2) for t in range(3)]
        np.testing.assert_allclose(frame_psnr(noisy, clean)[sample], frames, rtol=1e-5)
    assert math.isinf(psnr(clean, clean)[0])


def test_ssim() -> None:
    noisy, clean = videos()
    for sample in range(2):
        expected = [
            structural_similarity(
                clean[sample, :, t].double().numpy(),
                noisy[sample, :, t].double().numpy(),
                data_range=2,
                channel_axis=0,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
            for t in range(3)
        ]
        np.testing.assert_allclose(frame_ssim(noisy, clean)[sample], expected, rtol=1e-4)
        np.testing.assert_allclose(ssim(noisy, clean)[sample], np.mean(expected), rtol=1e-4)
    np.testing.assert_allclose(ssim(clean, clean), [1, 1], rtol=1e-6)


def test_flicker_is_the_change_of_the_error() -> None:
    noisy, clean = videos()
    x, y = noisy.double().numpy(), clean.double().numpy()
    for sample in range(2):
        steps = [
            np.abs((x[sample, :, t + 1] - x[sample, :, t]) - (y[sample, :, t + 1] - y[sample, :, t])).mean()
            for t in range(2)
        ]
        np.testing.assert_allclose(frame_flicker(noisy, clean)[sample], steps, rtol=1e-5)
        np.testing.assert_allclose(flicker(noisy, clean)[sample], np.mean(steps), rtol=1e-5)
    assert torch.isnan(flicker(noisy[:, :, :1], clean[:, :, :1])).all()


def test_a_standing_error_does_not_flicker_and_a_changing_one_does() -> None:
    _, clean = videos()
    stain = 0.2 * torch.randn(clean[:, :, :1].shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(flicker(clean + stain, clean), torch.zeros(2), atol=1e-6, rtol=0)
    blinking = stain * torch.tensor([1.0, -1.0, 1.0]).view(1, 1, 3, 1, 1)
    torch.testing.assert_close(flicker(clean + blinking, clean), 2 * stain.abs().mean((1, 2, 3, 4)))
    torch.testing.assert_close(psnr(clean + blinking, clean), psnr(clean + stain, clean))


def test_lpips_of_frames_is_the_networks_of_each_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    state = {}
    for number, (index, (out, into, k)) in enumerate(shapes.items()):
        state[f"features.{index}.weight"] = torch.randn(out, into, k, k, generator=generator) / (into * k * k) ** 0.5
        state[f"features.{index}.bias"] = torch.zeros(out)
        state[f"lin{number}.model.1.weight"] = torch.rand(1, out, 1, 1, generator=generator)
    network = PerceptualLoss(state)
    noisy, clean = videos()
    found = frame_lpips(network, noisy, clean)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found[1, 2], network(noisy[1, :, 2][None], clean[1, :, 2][None]))
    torch.testing.assert_close(found.mean(), network(noisy, clean))
    assert (found[1] > found[0]).all() and frame_lpips(network, clean, clean).abs().max() == 0


@pytest.mark.parametrize(("samples", "width"), [(400, 6), (5, 12), (30, 1)])
def test_frechet_distance_by_eigenvalues_of_the_plain_product(samples: int, width: int) -> None:
    rng = np.random.default_rng(samples)
    x = rng.normal(size=(samples, width)) @ rng.normal(size=(width, width))
    y = rng.normal(size=(samples + 3, width)) @ rng.normal(size=(width, width)) + 0.5
    first, second = np.atleast_2d(np.cov(x.T)), np.atleast_2d(np.cov(y.T))
    # The eigenvalues of S1 S2 are real and not negative, up to rounding; the root's trace is the sum of their roots.
    root_trace = np.sqrt(np.linalg.eigvals(first @ second).astype(complex)).real.sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * root_trace
    found = frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(torch.from_numpy(y), torch.from_numpy(x)) == pytest.approx(found)
    assert frechet_distance(torch.from_numpy(x), torch.from_numpy(x)) == pytest.approx(0, abs=1e-8 * np.trace(first))


def test_frechet_distance_of_known_gaussians() -> None:
    """Diagonal covariances: sum (m1 - m2)^2 + (s1 - s2)^2, here with samples that have them exactly."""
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double() * math.sqrt(3 / 4)
    x, y = signs * torch.tensor([1.0, 2.0]), signs * torch.tensor([4.0, 1.0]) + torch.tensor([3.0, 0.0])
    assert frechet_distance(x, y) == pytest.approx(9 + 9 + 1)
    with pytest.raises(UserError, match="give two or more"):
        frechet_distance(x[:1], y)


class TinyI3D(nn.Module):
    """Takes and gives what I3D's TorchScript does."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 5)

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        if rescale:
            x = 2 * x / 255 - 1
        if resize:
            raise RuntimeError("not to be asked for")
        if x.shape[2] < 3 or x.shape[3] != 224 or x.shape[4] != 224:
            raise RuntimeError("too short")
        x = self.mix(x.mean([2, 3, 4]))
        return x if return_features else x.softmax(1)


def test_features_of_clips_by_a_torchscript(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = TinyI3D()
    torch.jit.script(network).save(str(tmp_path / "i3d.pt"))
    features = VideoFeatures(tmp_path / "i3d.pt")
    noisy, clean = videos()
    found = features(noisy)
    assert found.dtype == torch.float64 and found.shape == (2, 5)
    # 40 x 48 becomes 224 x 269 and loses 22 columns on the left, 23 on the right.
    wide = torch.stack([F.interpolate(clip, (224, 269), mode="bilinear") for clip in noisy.transpose(1, 2)])
    means = wide[..., 22:246].mean((1, 3, 4))
    with torch.no_grad():
        torch.testing.assert_close(found, network.mix(means).double(), atol=1e-5, rtol=0)
    assert frechet_distance(found, features(clean)) > 0
    with pytest.raises(UserError, match=r"i3d.pt does not take clips of 2 frames as I3D does \(.*too short"):
        features(noisy[:, :, :2])


def test_what_is_no_i3d_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no program")
    torch.jit.script(nn.Linear(3, 3)).save(str(tmp_path / "linear.pt"))
    with pytest.raises(UserError, match="there is no file"):
        VideoFeatures(tmp_path / "none.pt")
    with pytest.raises(UserError, match="cannot be read as TorchScript"):
        VideoFeatures(tmp_path / "text.pt")
    with pytest.raises(UserError, match="does not take clips"):
        VideoFeatures(tmp_path / "linear.pt")(videos()[0])
