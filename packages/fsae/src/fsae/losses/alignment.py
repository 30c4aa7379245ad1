"""The Video VF loss (paper §2.2.2, eq. 2-4): latents that a vision foundation model would recognise.

A frozen teacher sees the clip frame by frame. Its features are averaged over the four frames that a latent stands for
(the first frame is a latent by itself), the latents are mapped to its channels by a learned W and stretched to its
grid; then, with z_p and f_p the two at position p of t x h' x w',

    v-mcos = mean_p ReLU(1 - m1 - cos(z_p, f_p))
    v-mdms = mean_pq ReLU(|cos(z_p, z_q) - cos(f_p, f_q)| - m2)
    L      = alpha (v-mcos + v-mdms).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsae.errors import CheckpointError, UserError
from fsae.losses.perceptual import PerceptualLoss
from fsae.storage.files import read_json

TEACHER_SIZE = 224
"""Pixels a side of the pictures that teachers see, whatever the clip's size and shape: 16 x 16 patches of 14."""


class Teacher(Protocol):
    """A frozen network: pictures `N 3 H W` in [-1, 1] -> features `N C' h' w'`."""

    channels: int

    def __call__(self, pictures: Tensor) -> Tensor: ...


class Dinov2Teacher(nn.Module):
    """DINOv2 in transformers' form: the normalised patch tokens of its last layer, on 224 x 224 pixels.

    `folder` is a saved `Dinov2Model`, such as that of facebook/dinov2-large; UserError if it is none, or transformers
    is not installed.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.model = _read_dinov2(folder).float().eval().requires_grad_(False)
        self.channels: int = self.model.config.hidden_size
        self.grid: int = TEACHER_SIZE // self.model.config.patch_size
        # ImageNet's mean and deviation, for pictures in [-1, 1] instead of [0, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """`N 3 H W` in [-1, 1] -> `N C' 16 16` (with patches of 14 pixels)."""
        small = resized(pictures)
        tokens = self.model((small - self.shift) / self.scale).last_hidden_state[:, -(self.grid**2) :]
        return tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid))


class TrunkTeacher(nn.Module):
    """The deepest features of LPIPS's classifier: a teacher of a few million parameters, for small machines."""

    def __init__(self, perceptual: PerceptualLoss) -> None:
        super().__init__()
        self.perceptual = perceptual
        self.channels: int = perceptual.trunk.stages[-1][-1].channels

    def forward(self, pictures: Tensor) -> Tensor:
        """`N 3 H W` in [-1, 1] -> `N C' h' w'`."""
        return self.perceptual.features(resized(pictures))[-1]


def _read_dinov2(folder: str | Path) -> Any:
    """The model of a folder, complete and from safetensors."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError("DINOv2 needs transformers, which is not installed; pip install 'fsae[align]'")
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json; give the folder of a DINOv2 as transformers saves it")
    kind = read_json(Path(folder) / "config.json").get("model_type")
    if kind != "dinov2":
        raise CheckpointError(f"{folder} holds a model of the type {kind!r}; a dinov2 is wanted as the teacher")
    from transformers import Dinov2Model

    try:
        model, found = Dinov2Model.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except OSError as error:
        raise CheckpointError(f"the DINOv2 in {folder} cannot be read ({error}); copy it again") from None
    if found["missing_keys"]:
        raise CheckpointError(f"the DINOv2 in {folder} lacks {', '.join(sorted(found['missing_keys']))}; copy it again")
    return model


def resized(pictures: Tensor) -> Tensor:
    """Bilinear to what teachers see, with antialiasing where it makes them smaller."""
    size = (TEACHER_SIZE, TEACHER_SIZE)
    return F.interpolate(pictures.float(), size, mode="bilinear", align_corners=False, antialias=True)


@torch.no_grad()
def teacher_features(teacher: Teacher, video: Tensor, period: int) -> Tensor:
    """A teacher's features of a video `B 3 T H W`, at the latents' rate: `B C' t h' w'`, t = 1 + (T - 1) / period.

    Frame 0 keeps its own features, each further latent has the mean of its `period` frames. One latent at a time, so
    that the memory does not grow with the clip.
    """
    batch = video.shape[0]
    pooled = [teacher(video[:, :, 0])]
    for start in range(1, video.shape[2], period):
        frames = video[:, :, start : start + period].transpose(1, 2).flatten(0, 1)
        pooled.append(teacher(frames).unflatten(0, (batch, -1)).mean(1))
    return torch.stack(pooled, dim=2).detach()


class AlignmentTerms(NamedTuple):
    """The two parts of eq. 4, scalars, before alpha."""

    cosine: Tensor
    distance: Tensor

    @property
    def total(self) -> Tensor:
        """v-mcos + v-mdms."""
        return self.cosine + self.distance


class VideoVFLoss(nn.Module):
    """Eq. 2 and 3, with the learned map W from the latents' channels to the teacher's.

    Args:
        latent_channels: c.
        teacher_channels: c'.
        cosine_margin: m1.
        distance_margin: m2.
        positions: of more positions than this in a clip, a random choice of this many is compared pair by pair.
    """

    def __init__(
        self,
        latent_channels: int,
        teacher_channels: int,
        cosine_margin: float = 0.5,
        distance_margin: float = 0.25,
        positions: int = 4096,
    ) -> None:
        super().__init__()
        self.projection = nn.Linear(latent_channels, teacher_channels, bias=False)
        self.cosine_margin, self.distance_margin, self.positions = cosine_margin, distance_margin, positions

    def forward(self, latents: Tensor, features: Tensor, generator: torch.Generator | None = None) -> AlignmentTerms:
        """latents `B c t h w`, not normalised; features `B c' t h' w'`, as `teacher_features` makes them.

        generator: a CPU generator that chooses positions where there are too many; torch's own if None.
        """
        if latents.shape[2] != features.shape[2]:
            raise ValueError(f"{latents.shape[2]} latents in time, but {features.shape[2]} of the teacher's features")
        with torch.autocast(latents.device.type, enabled=False):
            wide = torch.promote_types(latents.dtype, torch.float32)
            z = self._stretched(latents.to(wide), features.shape[-2:])
            z, f = (F.normalize(x.flatten(2).transpose(1, 2), dim=-1) for x in (z, features.to(wide)))
            cosine = F.relu(1 - self.cosine_margin - (z * f).sum(-1)).mean()
            if z.shape[1] > self.positions:
                chosen = torch.randperm(z.shape[1], generator=generator)[: self.positions].to(z.device)
                z, f = z[:, chosen], f[:, chosen]
            apart = (z @ z.transpose(1, 2) - f @ f.transpose(1, 2)).abs()
            return AlignmentTerms(cosine, F.relu(apart - self.distance_margin).mean())

    def _stretched(self, latents: Tensor, size: torch.Size) -> Tensor:
        """W z, bilinear on the teacher's grid: `B c t h w` -> `B c' t h' w'`."""
        batch, _, t = latents.shape[:3]
        mapped = self.projection(latents.permute(0, 2, 3, 4, 1)).permute(0, 1, 4, 2, 3).flatten(0, 1)
        mapped = F.interpolate(mapped, tuple(size), mode="bilinear", align_corners=False)
        return mapped.unflatten(0, (batch, t)).transpose(1, 2)


def adaptive_weight(reconstruction_loss: Tensor, alignment_loss: Tensor, weight: Tensor) -> Tensor:
    """VA-VAE's balance ||∂L_rec/∂weight|| / (||∂L_vf/∂weight|| + 1e-4), at most 1e8, without a gradient.

    `weight` is that of the encoder's last convolution, where both losses have passed everything they share.
    """
    wanted = torch.autograd.grad(reconstruction_loss, weight, retain_graph=True)[0].norm()
    found = torch.autograd.grad(alignment_loss, weight, retain_graph=True)[0].norm()
    return (wanted / (found + 1e-4)).clamp(max=1e8).detach()
