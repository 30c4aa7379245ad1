"""Motion told to the autoencoder: where each cell of a latent lay in frame 0, known from the camera's path.

A small encoder does not learn to see motion in the clips that a laptop can show it in an hour. In the nano world the
camera is known, so what moved where is written into the first channels of the latents; the decoder learns to read it,
and later the transformer to write it.
"""

from __future__ import annotations

from typing import Any

import torch
from clips import NanoClips
from motion import camera_path
from torch import Tensor

from fsae import FSAE
from fsae.losses.reconstruction import l1_loss
from fsae.metrics import psnr
from fsae.training.autoencoder import AutoencoderTask, frame_grid
from fsae.training.config import OptimizerConfig

CODE_CHANNELS = 16
"""Channels of a latent that say where its cell was in frame 0: 2 instants x 2 x 2 places x (row, column)."""

CODE_UNIT, OFFSET_UNIT = 8.0, 32.0
"""Pixels that 1 stands for in these channels, about their deviation, and in the offsets of the nano preset."""

OFFSET_RATE = 4e-3
"""Learning rate of the offsets' read-out, a linear map of normalised features: far above that of the convolutions."""


def displacement(path: Tensor, instants: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """How far off in frame 0 the content lies, in pixels: `B I R C 2` for path `B T 2 3`.

    Instants are in frames and may lie between two; rows and columns are pixels from the frame's middle.
    """
    instants = instants.clamp(min=0)
    before = instants.floor().long().clamp(max=path.shape[1] - 1)
    after = (before + 1).clamp(max=path.shape[1] - 1)
    matrix = torch.lerp(path[:, before], path[:, after], (instants - before)[:, None, None])[:, :, None, None]
    y, x = rows.view(-1, 1), columns.view(1, -1)
    column = matrix[..., 0, 0] * x + matrix[..., 0, 1] * y + matrix[..., 0, 2] - x
    row = matrix[..., 1, 0] * x + matrix[..., 1, 1] * y + matrix[..., 1, 2] - y
    return torch.stack([row, column], dim=-1)


def centres(count: int, size: int) -> Tensor:
    """The middles of `count` equal parts of `size` pixels, from the frame's middle."""
    return (torch.arange(count) + 0.5) * (size / count) - size / 2


def motion_code(path: Tensor, t: int, height: int, width: int) -> Tensor:
    """The known camera as the latents' motion channels, `B 16 t h w`: for each latent its first and last frame."""
    h, w = height // 64, width // 64
    instants = (4.0 * torch.arange(t)[:, None] - torch.tensor([3.0, 0.0])).flatten()
    field = displacement(path, instants, centres(2 * h, height), centres(2 * w, width))
    field = field.view(len(path), t, 2, h, 2, w, 2, 2) / CODE_UNIT  # B t instant h y w x axis
    return field.permute(0, 2, 4, 6, 7, 1, 3, 5).reshape(len(path), CODE_CHANNELS, t, h, w)


def told_latents(model: FSAE, video: Tensor, path: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Latents `B c t h w`, not normalised, of every fourth frame as an image, the motion channels told by the camera.

    Returns:
        The latents, and the features of frame 0 at every stage, each `B C h w`.
    """
    batch, t = len(video), 1 + (video.shape[2] - 1) // 4
    images = video[:, :, ::4].transpose(1, 2).flatten(0, 1).unsqueeze(2)
    features, latents = model.encoder.features(images)
    latents = latents[:, :, 0].unflatten(0, (batch, t)).transpose(1, 2)
    code = motion_code(path, t, *video.shape[3:]).to(latents)
    code = torch.cat([latents[:, :CODE_CHANNELS, :1], code[:, :, 1:]], dim=2)
    first = [feature[:, :, 0].unflatten(0, (batch, t))[:, 0] for feature in features]
    return torch.cat([code, latents[:, CODE_CHANNELS:]], dim=1), first


class MotionTask(AutoencoderTask):
    """Reconstruct clips from told latents; beside it the offsets of the first-frame injection are told as well.

    A cell of the decoder that stands for frames 4j-3 ... 4j looks back at frame 0; its heads are spread over these
    frames, the first one told where the cell was at 4j-3 and the last one where it was at 4j. Batches hold `video` and
    `path` `B T 2 3`.

    Args:
        model: an FSAE with offsets.
        weight: of the offsets' L1, in OFFSET_UNITs.
        first: of the first frame's L1, beside its share in the clip's: it is the user's photograph.
        validation: items to validate on.
    """

    def __init__(self, model: FSAE, weight: float, first: float, validation: list[dict[str, Any]]) -> None:
        super().__init__(model)
        self.weight, self.first, self.clips = weight, first, validation
        self.settings = {**self.settings, "offset_weight": weight, "first_frame_weight": first}
        self.offsets: list[Tensor] = []
        for stage in model.decoder.stages:
            if stage.injection is not None:
                stage.injection.to_offset.register_forward_hook(lambda _module, _inputs, out: self.offsets.append(out))

    def reconstruct(self, video: Tensor, path: Tensor, generator: torch.Generator) -> Tensor:
        """The clip from its told latents."""
        self.offsets.clear()
        latents, first = told_latents(self.model, video, path)
        return self.model.decoder(latents, first, generator)

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """L1 of pixels + weight x L1 of offsets; the error of the two finest stages' offsets in pixels beside it."""
        video, path = batch["video"], batch["path"]
        reconstruction = self.reconstruct(video, path, generator)
        l1, first = l1_loss(reconstruction, video), l1_loss(reconstruction[:, :, :1], video[:, :, :1])
        error = torch.stack([self._offset_error(found, path, *video.shape[3:]) for found in self.offsets])
        self.offsets.clear()
        return {
            "loss": l1 + self.first * first + self.weight * error.mean(),
            "l1": l1,
            "first_frame_psnr": psnr(reconstruction[:, :, :1].detach().clamp(-1, 1), video[:, :, :1]).mean(),
            "psnr": psnr(reconstruction.detach().clamp(-1, 1), video).mean(),
            "offset_pixels": error.detach()[-2:].mean() * OFFSET_UNIT,
        }

    def parameter_groups(self, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
        """The offsets' read-outs apart, at their own rate."""
        apart = [p for name, p in self.model.named_parameters() if "to_offset" in name]
        groups = super().parameter_groups(optimizer)
        for group in groups:
            group["params"] = [p for p in group["params"] if all(p is not other for other in apart)]
        return [*groups, {"params": apart, "weight_decay": 0.0, "lr": OFFSET_RATE}]

    @staticmethod
    def _offset_error(found: Tensor, path: Tensor, height: int, width: int) -> Tensor:
        """Mean distance of offsets `B t h w 2·heads` to the truth."""
        _, t, h, w = found.shape[:4]
        heads = found.shape[4] // 2
        share = torch.linspace(0, 1, heads) if heads > 1 else torch.full((1,), 0.5)
        instants = (4 * torch.arange(t)[:, None] - 3 + 3 * share).flatten()
        truth = displacement(path, instants, centres(h, height), centres(w, width)) / OFFSET_UNIT
        truth = truth.unflatten(1, (t, heads)).permute(0, 1, 3, 4, 2, 5).flatten(-2)
        return (found.float() - truth.to(found.device)).abs().mean()

    def validate(self, step: int) -> dict[str, Tensor]:
        """Mean PSNR of the validation clips; frames of theirs over their reconstructions."""
        generator = torch.Generator().manual_seed(0)
        rows, results = [], []
        for clip in self.clips:
            video, path = clip["video"].unsqueeze(0), clip["path"].unsqueeze(0)
            rows.append(video)
            results.append(self.reconstruct(video, path, generator).float().clamp(-1, 1))
        given, made = torch.cat(rows), torch.cat(results)
        first = psnr(made[:, :, :1], given[:, :, :1]).mean()
        return {
            "psnr": psnr(made, given).mean(),
            "first_frame_psnr": first,
            "reconstruction": frame_grid([given, made]),
        }


class TrackedClips(torch.utils.data.Dataset[dict[str, Any]]):
    """Clips with the camera's path, which tells where each pixel was in frame 0."""

    def __init__(self, clips: NanoClips) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        plan = self.clips.plan(index)
        return {
            "video": self.clips.render(plan),
            "path": camera_path(plan.motion, self.clips.frames, self.clips.size),
        }
