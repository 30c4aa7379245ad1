"""How true a reconstruction is. Videos are ``B C T H W`` in [-1, 1]; clamp before measuring."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PEAK = 2.0  # width of [-1, 1]


def psnr(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each sample in dB: ``B ...`` -> ``B``; infinite for equal samples."""
    return _decibels((reconstruction.float() - video.float()).square().flatten(1).mean(1))


def frame_psnr(reconstruction: Tensor, video: Tensor) -> Tensor:
    """PSNR of each frame in dB: ``B C T H W`` -> ``B T``."""
    return _decibels((reconstruction.float() - video.float()).square().mean((1, 3, 4)))


def ssim(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Structural similarity of each sample, ``B``: the mean over frames, channels and positions.

    Wang et al. 2004: Gaussian window of 11 x 11 and deviation 1.5, K1 = 0.01, K2 = 0.03, population
    variances, only positions where the window lies inside the frame. Frames must be at least 11 pixels high
    and wide.
    """
    x, y = (v.float().transpose(1, 2).flatten(0, 2).unsqueeze(1) for v in (reconstruction, video))
    offsets = torch.arange(-5, 6, dtype=x.dtype, device=x.device)
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    mean_x, mean_y = blur(x), blur(y)
    variance_x = blur(x * x) - mean_x.square()
    variance_y = blur(y * y) - mean_y.square()
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).view(video.shape[0], -1).mean(1)


def _decibels(squared_error: Tensor) -> Tensor:
    return 10 * torch.log10(_PEAK**2 / squared_error)
