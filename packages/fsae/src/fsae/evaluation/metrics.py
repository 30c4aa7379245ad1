"""How close a reconstruction is to its video. Videos are `B C T H W` in [-1, 1]; clamp before measuring.

Per clip `B`: `psnr`, `ssim`, `flicker`. Per frame `B T`, the curves: `frame_psnr`, `frame_ssim`, `frame_lpips`,
`frame_flicker`. Of two sets of clips: `frechet_distance` of the features of `VideoFeatures`, the FVD of the paper's
Table 2.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsae.errors import UserError
from fsae.losses.perceptual import PerceptualLoss

_PEAK = 2.0  # width of [-1, 1]
_I3D_SIDE = 224


def psnr(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each sample in dB: `B ...` -> `B`; infinite for equal samples."""
    return _decibels((reconstruction.float() - video.float()).square().flatten(1).mean(1))


def frame_psnr(reconstruction: Tensor, video: Tensor) -> Tensor:
    """PSNR of each frame in dB: `B C T H W` -> `B T`."""
    return _decibels((reconstruction.float() - video.float()).square().mean((1, 3, 4)))


def ssim(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Structural similarity of each sample, `B`: the mean of `frame_ssim` over its frames."""
    return frame_ssim(reconstruction, video).mean(1)


def frame_ssim(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Structural similarity of each frame, `B C T H W` -> `B T`: the mean over channels and positions.

    Wang et al. 2004: Gaussian window of 11 x 11 and deviation 1.5, K1 = 0.01, K2 = 0.03, population
    variances, only positions where the window lies inside the frame. Frames must be at least 11 pixels high
    and wide.
    """
    # Frame by frame: a dozen maps of a frame's size are held, not of a clip's.
    frames = [_image_ssim(reconstruction[:, :, t], video[:, :, t]) for t in range(video.shape[2])]
    return torch.stack(frames, dim=1)


def frame_lpips(network: PerceptualLoss, reconstruction: Tensor, video: Tensor) -> Tensor:
    """LPIPS of each frame, `B 3 T H W` -> `B T`, by a network whose weights come from files."""
    batch, _, frames = video.shape[:3]
    distances = [
        network(reconstruction[b : b + 1, :, t].float(), video[b : b + 1, :, t].float())
        for b in range(batch)
        for t in range(frames)
    ]
    return torch.stack(distances).view(batch, frames)


def flicker(reconstruction: Tensor, video: Tensor) -> Tensor:
    """How much the error changes from frame to frame, `B C T H W` -> `B`: the mean of `frame_flicker`.

    An error that stays where it is, however large, does not flicker; motion of the video itself does not count. Not a
    number for a single frame.
    """
    return frame_flicker(reconstruction, video).mean(1)


def frame_flicker(reconstruction: Tensor, video: Tensor) -> Tensor:
    """The temporal-difference error from each frame to the next, `B C T H W` -> `B T-1`.

    Of the reconstruction x' and the video x,  mean |(x'_{t+1} - x'_t) - (x_{t+1} - x_t)|  over channels and positions,
    in the units of the video, whose range is 2.
    """
    error = reconstruction.float() - video.float()
    return error.diff(dim=2).abs().mean((1, 3, 4))


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """Fréchet distance of the Gaussians with the means and covariances of two sets of features, each `N D`.

        d = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)),      S unbiased,

    in double precision; the root's trace is that of the symmetric (S1^(1/2) S2 S1^(1/2))^(1/2), which has no negative
    or complex eigenvalues to be argued away. Fewer samples than dimensions are allowed, and bias the distance.

    Raises:
        UserError: fewer than two samples in a set: there is no covariance.
    """
    if min(len(features), len(others)) < 2:
        raise UserError(
            f"a Fréchet distance of {len(features)} and {len(others)} samples has no covariance; give two or more"
        )
    x, y = features.double().cpu(), others.double().cpu()
    first, second = torch.atleast_2d(torch.cov(x.T)), torch.atleast_2d(torch.cov(y.T))
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    crossed = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    distance = (x.mean(0) - y.mean(0)).square().sum() + first.trace() + second.trace() - 2 * crossed
    # Rounding can leave equal sets a little below zero, where no distance lies.
    return max(float(distance), 0.0)


class VideoFeatures:
    """Features of clips by the I3D network of the Fréchet video distance, a TorchScript file.

    The file is the one commonly passed around as `i3d_torchscript.pt`, or any TorchScript whose `forward(video,
    rescale, resize, return_features)` takes `B 3 T 224 224` in [-1, 1] and returns `B D`; UserError if it is none.
    Frames are scaled until their shorter side is 224 (bilinear) and cropped around the centre.

    What `torch.jit.load` reads is a program of TorchScript's own operators together with its weights; unlike a pickle
    it does not run Python while it is read, yet it is a program: give a file that you trust.
    """

    def __init__(self, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"there is no file {path}; give the I3D network as TorchScript (i3d_torchscript.pt)")
        try:
            self.network: nn.Module = torch.jit.load(self.path, map_location=device).eval()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{path} cannot be read as TorchScript ({reason}); give i3d_torchscript.pt, whole"
            ) from None

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        """Clips `B 3 T H W` in [-1, 1] -> features `B D`, in double precision on the CPU; UserError if the network
        refuses the clips, as I3D does where they have fewer than about ten frames, or answers with something else."""
        try:
            features = self.network(_i3d_frames(video), rescale=False, resize=False, return_features=True)
        # A script that raises, and an operator that does.
        except (torch.jit.Error, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise UserError(
                f"{self.path} does not take clips of {video.shape[2]} frames as I3D does ({reason}); "
                "give i3d_torchscript.pt, or longer clips"
            ) from None
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(video):
            raise UserError(f"{self.path} does not return one vector a clip; give i3d_torchscript.pt")
        return features.double().cpu()


def _i3d_frames(video: Tensor) -> Tensor:
    """`B 3 T H W` -> `B 3 T 224 224`."""
    batch, frames = video.shape[0], video.shape[2]
    height, width = video.shape[3:]
    scale = _I3D_SIDE / min(height, width)
    size = (max(_I3D_SIDE, round(height * scale)), max(_I3D_SIDE, round(width * scale)))
    images = video.float().transpose(1, 2).flatten(0, 1)
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - _I3D_SIDE) // 2, (size[1] - _I3D_SIDE) // 2
    images = images[:, :, top : top + _I3D_SIDE, left : left + _I3D_SIDE]
    return images.unflatten(0, (batch, frames)).transpose(1, 2).contiguous()


def _image_ssim(reconstruction: Tensor, image: Tensor) -> Tensor:
    """`B C H W` -> `B`."""
    x, y = (v.float().flatten(0, 1).unsqueeze(1) for v in (reconstruction, image))
    offsets = torch.arange(-5, 6, dtype=x.dtype, device=x.device)
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(plane: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(plane, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    mean_x, mean_y = blur(x), blur(y)
    variance_x = blur(x * x) - mean_x.square()
    variance_y = blur(y * y) - mean_y.square()
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).view(image.shape[0], -1).mean(1)


def _decibels(squared_error: Tensor) -> Tensor:
    return 10 * torch.log10(_PEAK**2 / squared_error)
