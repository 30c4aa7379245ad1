"""What the nano autoencoder is trained on: pictures, then seeing motion, then whole clips.

The known camera supervises training and nothing else: what is told in training, the encoder itself says afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from clips import NanoClips
from motion import camera_path
from torch import Tensor, nn
from velocity import CODE_CHANNELS, motion_code, velocity

from fsae import FSAE
from fsae.data.order import Cut
from fsae.encoder import Encoder
from fsae.evaluation.metrics import psnr
from fsae.layers.matching import Matching
from fsae.layers.motion import VELOCITY_UNIT, MotionField
from fsae.losses.perceptual import PerceptualLoss
from fsae.losses.reconstruction import l1_loss
from fsae.training.logs import frame_grid
from fsae.training.task import Task

Batch = dict[str, Tensor]


class InTurn:
    """The order of data that is made as it is asked for: one item after the other."""

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, offset) of a step's first sample."""
        return 0, step

    def micro_batch(self, step: int, micro: int) -> list[tuple[int]]:
        """The key of the only item of `step`."""
        return [(step,)]


class CameraClips(torch.utils.data.Dataset[Batch]):
    """Batches of clips with the camera's path: item i is made by world i % n, all of its clips of one size.

    Args:
        worlds: of any sizes.
        counts: clips of a batch of each world.
        every: of how many frames one is made; the path is that of all.
    """

    def __init__(self, worlds: Sequence[NanoClips], counts: Sequence[int], every: int = 1) -> None:
        self.worlds, self.counts, self.every = worlds, counts, every

    def __len__(self) -> int:
        return len(self.worlds) * (min(map(len, self.worlds)) // max(self.counts))

    def __getitem__(self, index: int) -> Batch:
        world, count = self.worlds[index % len(self.worlds)], self.counts[index % len(self.worlds)]
        first = index // len(self.worlds) * count
        plans = [world.plan(i) for i in range(first, first + count)]
        paths = [camera_path(plan.motion, world.frames, world.size) for plan in plans]
        return {
            "video": torch.stack([world.render(plan, self.every) for plan in plans]),
            "path": torch.stack(paths).to(world.device),
        }

    def sample(self, index: int) -> Batch:
        """Item `index`."""
        return self[index]

    def order(self, cut: Cut) -> InTurn:
        """One item after the other, whatever the run's cut."""
        return InTurn()


def one_item(items: list[Batch]) -> Batch:
    """The batch that an item is."""
    (item,) = items
    return item


def without_code(latents: Tensor) -> Tensor:
    """Latents `B c t h w` whose motion channels are zero, as those of a picture are."""
    return torch.cat([torch.zeros_like(latents[:, :CODE_CHANNELS]), latents[:, CODE_CHANNELS:]], dim=1)


@dataclass(frozen=True)
class Weights:
    """Weights of a task's losses.

    Attributes:
        alone: how often a clip is decoded from its latents alone, so that they carry the picture too.
        told: how often the latents' motion channels are told by the camera.
        code: of the motion channels' squared error.
        field: of the decoder's velocity, L1 in units of 8 pixels.
        first: of the first frame's L1, beside its share in the clip's: it is the user's photograph.
        change: of the L1 of differences between neighbour frames.
        perceptual: of LPIPS.
    """

    alone: float = 0.25
    told: float = 0.0
    code: float = 1.0
    field: float = 0.3
    first: float = 0.2
    change: float = 0.5
    perceptual: float = 0.0


class ClipTask(Task):
    """Reconstruct clips and pictures, with the camera's path as a second teacher.

    Args:
        model: an FSAE whose injection samples along the motion.
        weights: of the losses.
        validation: a batch to validate on.
        perceptual: LPIPS, for `weights.perceptual`.
        encoder: "trained"; "frozen", so that the decoder alone is trained; or frozen and "of pictures": it is shown
            every fourth frame as a picture, and the motion is told.
    """

    def __init__(
        self,
        model: FSAE,
        weights: Weights,
        validation: Batch,
        perceptual: PerceptualLoss | None = None,
        encoder: Literal["trained", "frozen", "of pictures"] = "trained",
    ) -> None:
        self.model, self.weights, self.validation = model, weights, validation
        self.perceptual, self.encoder = perceptual, encoder
        self.modules = {"autoencoder": model}
        self.frozen = {} if perceptual is None else {"perceptual": perceptual}
        if encoder != "trained":
            model.encoder.requires_grad_(False)
        self.settings = {
            "model": model.public_config,
            "weights": asdict(weights),
            "encoder": encoder,
        }

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The weighted sum and its parts."""
        video, weights = batch["video"], self.weights
        alone, told = (torch.rand((), generator=generator).item() for _ in range(2))
        latents, first, code = self._encode(batch)
        terms = {"code": (latents[:, :CODE_CHANNELS].float() - code).square().mean()}
        if told < weights.told:
            latents = torch.cat([code.to(latents), latents[:, CODE_CHANNELS:]], dim=1)
        with recorded_velocity(self.model) as velocities:
            made = self.model.decoder(latents, None if alone < weights.alone else first, generator).float()
        total = weights.code * terms["code"]
        terms["l1"], terms["first"] = l1_loss(made, video), l1_loss(made[:, :, :1], video[:, :, :1])
        total = total + terms["l1"] + weights.first * terms["first"]
        if video.shape[2] > 1:
            truth = velocity(batch["path"], video.shape[3:], velocities[0].shape[3:])
            terms["field"] = (velocities[0] - truth)[:, :, 1:].abs().mean() / VELOCITY_UNIT
            terms["change"] = l1_loss(made.diff(dim=2), video.diff(dim=2))
            total = total + weights.field * terms["field"] + weights.change * terms["change"]
        if self.perceptual is not None and alone >= weights.alone:
            terms["perceptual"] = self.perceptual(made[:, :, ::4], video[:, :, ::4])
            total = total + weights.perceptual * terms["perceptual"]
        return {"loss": total, **terms, "psnr": psnr(made.detach().clamp(-1, 1), video).mean()}

    def _encode(self, batch: Batch) -> tuple[Tensor, list[Tensor], Tensor]:
        """Latents, features of frame 0, and the motion channels that the camera tells."""
        video, path = batch["video"], batch["path"]
        code = motion_code(path, video.shape[3:])
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder == "trained"):
            if self.encoder == "of pictures":
                latents, features = latents_of_frames(self.model, video)
                return without_code(latents), features, code
            kept, latents = self.model.encoder.features(video)
            return latents, [feature[:, :, 0] for feature in kept], code

    def validate(self, step: int) -> dict[str, Tensor]:
        """PSNR of clips, of their first frames, and how far off the decoder's velocity is, in pixels a latent."""
        generator = torch.Generator().manual_seed(0)
        video, made, errors = self.validation["video"], [], []
        for i in range(len(video)):
            batch = {name: tensor[i : i + 1] for name, tensor in self.validation.items()}
            latents, first, code = self._encode(batch)
            if self.encoder == "of pictures":
                latents = torch.cat([code.to(latents), latents[:, CODE_CHANNELS:]], dim=1)
            with recorded_velocity(self.model) as velocities:
                made.append(self.model.decoder(latents, first, generator).float().clamp(-1, 1))
            truth = velocity(batch["path"], video.shape[3:], velocities[0].shape[3:])
            errors.append((velocities[0] - truth)[:, :, 1:].norm(dim=1).mean() if video.shape[2] > 1 else truth.sum())
        result = torch.cat(made)
        return {
            "psnr": psnr(result, video).mean(),
            "first_frame_psnr": psnr(result[:, :, :1], video[:, :, :1]).mean(),
            "velocity_error": torch.stack(errors).mean(),
            "reconstruction": frame_grid([video, result]),
        }


@contextmanager
def recorded_velocity(model: FSAE) -> Iterator[list[Tensor]]:
    """The velocities `B 2 t h w` in pixels that the decoder reads while the context lasts."""
    found: list[Tensor] = []
    motion = model.decoder.motion
    assert isinstance(motion, MotionField)
    read = motion.velocity

    def kept(x: Tensor, latents: Tensor) -> Tensor:
        found.append(read(x, latents))
        return found[-1]

    motion.velocity = kept  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del motion.velocity


def latents_of_frames(model: FSAE, video: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Every fourth frame as a picture: latents `B c t h w`, not normalised, and frame 0's features at every stage."""
    frames = video[:, :, ::4]
    features, latents = model.encoder.features(as_pictures(frames))
    t = frames.shape[2]
    return as_clips(latents, t), [as_clips(feature, t)[:, :, 0] for feature in features]


class SeeingTask(Task):
    """The encoder's comparison of frames is to say, in the latents' motion channels, what the camera did.

    Args:
        match: the comparison.
        cell: pixels that two of its cells are wide and high.
        validation: a batch to validate on.
    """

    def __init__(self, match: Matching, cell: int, validation: Batch) -> None:
        self.match, self.cell, self.validation = match, cell, validation
        self.modules = {"match": match}
        self.settings = {"cell": cell}

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Squared within two pixels and linear beyond; and the mean length of the error in pixels a latent."""
        error, _ = self._error(batch)
        loss = nn.functional.smooth_l1_loss(error, torch.zeros_like(error), beta=2 / VELOCITY_UNIT)
        return {"loss": loss, "pixels": _length(error.detach())}

    def validate(self, step: int) -> dict[str, Tensor]:
        """Mean length of the error in pixels a latent, and of the motion itself."""
        error, code = self._error(self.validation)
        return {"velocity_error": _length(error), "velocity": _length(code)}

    def _error(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """How far the motion channels are off, and what they should be, `B 8 t h w` without t = 0."""
        video = batch["video"]
        code = motion_code(batch["path"], video.shape[3:])[:, :, 1:]
        said = self.match(self.match.frames(video, self.cell, 1, begun=False))[:, :CODE_CHANNELS, 1:]
        return said.float() - code, code


def as_pictures(video: Tensor) -> Tensor:
    """Clips `B C t H W` as pictures `B·t C 1 H W`."""
    return video.transpose(1, 2).flatten(0, 1).unsqueeze(2)


def as_clips(pictures: Tensor, frames: int) -> Tensor:
    """The inverse of `as_pictures`."""
    return pictures[:, :, 0].unflatten(0, (-1, frames)).transpose(1, 2)


def _length(code: Tensor) -> Tensor:
    """Mean length in pixels of the vectors in motion channels `B 8 t h w`."""
    return code.unflatten(1, (-1, 2)).norm(dim=2).mean() * VELOCITY_UNIT


@torch.no_grad()
def free_code(encoder: Encoder) -> None:
    """Leave an encoder's motion channels to its comparison of frames, in place: all else in them becomes zero."""
    conv, tap = encoder.conv_out, encoder.conv_out.current_tap
    assert encoder.average == 1 and conv.bias is not None
    conv.weight[:CODE_CHANNELS], conv.bias[:CODE_CHANNELS] = 0, 0
    for channel in range(CODE_CHANNELS):
        conv.weight[channel, channel, tap, 1, 1] = -1  # what the shortcut adds


@torch.no_grad()
def read_code(model: FSAE) -> None:
    """Let a decoder's velocity start as what the latents' motion channels say, in place."""
    motion = model.decoder.motion
    assert motion is not None
    motion.say.weight[:, :CODE_CHANNELS] = torch.eye(CODE_CHANNELS)
