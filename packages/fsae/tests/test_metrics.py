"""Metrics against scikit-image."""

from __future__ import annotations

import math

import numpy as np
import torch
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from fsae.metrics import frame_psnr, psnr, ssim


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
        expected = np.mean(
            [
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
        )
        np.testing.assert_allclose(ssim(noisy, clean)[sample], expected, rtol=1e-4)
    np.testing.assert_allclose(ssim(clean, clean), [1, 1], rtol=1e-6)
