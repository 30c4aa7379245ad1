"""First-frame injection along the motion: where the content of each frame lay in frame 0, and its features from there.

The paper's injection (§2.2.3) looks for moved content by attention alone, at the stages that run at the latents' frame
rate. A small model cannot afford to find motion that way, and the two stages at higher rates have to invent all motion
between latents. Here the decoder reads a velocity off its own features, one vector a cell and latent, adds velocities
up to displacements from frame 0, linearly inside a latent's frames, and blends in the first frame's features from
there, at every convolutional stage. An option of ours, off in the paper's presets.

Displacements are in pixels of the video, row before column, and fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsae.layers.config import BlockStyle
from fsae.layers.norm import PixelNorm
from fsae.streaming import FrameCache
from fsae.tiling import Window

# Pixels that a velocity of 1 stands for.
VELOCITY_UNIT = 8.0


class MotionField(nn.Module):
    """Features at the latents' rate -> displacements of all their frames.

    For a latent j with velocity v and frames k = 1 ... n, of which the last is the one v is about,

        D_jk(x) = k/n v(x) + D_(j-1)n(x + k/n v(x)),      D of the clip's first frame = 0:

    what stands at x in that frame stood at x + k/n v(x) in the last frame of latent j-1, and at x + D_jk(x) in frame 0.

    The velocity is the sum of one that latents say themselves, for 2 x 2 places each and bilinear between, and of one
    that is read off the features that the inner stages made of them. Both start at zero.

    `frames` is n, those that a latent stands for; `cell`, how many pixels a cell of the features is wide and high.
    """

    def __init__(self, channels: int, latent_channels: int, *, frames: int, cell: int, style: BlockStyle) -> None:
        super().__init__()
        self.frames, self.cell = frames, cell
        self.say = nn.Linear(latent_channels, 2 * 2 * 2)
        self.norm = PixelNorm(channels, style.eps, style.norm_affine)
        self.read = nn.Linear(channels, 2)
        for layer in (self.say, self.read):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def velocity(self, x: Tensor, latents: Tensor) -> Tensor:
        """`B 2 t h w`, pixels from each latent's last frame back to the last of the latent before; see `forward`."""
        said = self.say(latents.movedim(1, -1)).unflatten(-1, (2, 2, 2))  # B t h w row column axis
        said = said.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        said = F.interpolate(said.flatten(0, 1), size=x.shape[3:], mode="bilinear", align_corners=False)
        said = said.unflatten(0, (len(x), -1)).transpose(1, 2)
        made = said + self.read(self.norm(x).movedim(1, -1)).movedim(-1, 1)
        return VELOCITY_UNIT * made.to(torch.promote_types(made.dtype, torch.float32))

    def forward(self, x: Tensor, latents: Tensor, cache: FrameCache | None = None) -> Tensor:
        """Features `B C t h w` of latents `B c t h' w'` -> the displacements of each latent's n frames, `B 2n t h w`.

        Those of the clip's first latent are zero. cache: the state of a stream that both are the next chunk of.
        """
        velocity = self.velocity(x, latents)
        before = None if cache is None or self not in cache else cache[self][:, :, 0]
        displacements = self.added_up(velocity, before)
        if cache is not None:
            cache[self] = displacements[:, -2:, -1:]
        return displacements

    def added_up(self, velocity: Tensor, before: Tensor | None = None) -> Tensor:
        """Velocities `B 2 t h w` -> displacements `B 2n t h w`.

        before: displacement `B 2 h w` of the frame before; None where the first latent is the clip's first frame, whose
            velocity means nothing.
        """
        steps = list(velocity.split(1, dim=2))
        made = []
        if before is None:
            # Zero, and yet made of it: processes that train on pictures together wait for every gradient.
            before = 0 * steps.pop(0)[:, :, 0]
            made.append(before.repeat(1, self.frames, 1, 1))
        shares = torch.arange(1, self.frames + 1, device=velocity.device) / self.frames
        for step in steps:
            moved = step * shares.view(-1, 1, 1)
            moved = moved + sample(before, places_of(moved / self.cell))
            made.append(moved.transpose(1, 2).flatten(1, 2))
            before = moved[:, :, -1]
        return torch.stack(made, dim=2)


class FirstFrameSampling(nn.Module):
    """Blend in the first frame's features from where each cell's content lay:

        x + a inside σ(W_g [x; v]) (v - x),      v = W_v f(place + displacement).

    Inside frame 0 the gate, one a channel, chooses between what was there and what the latents say; a cell further than
    one outside takes nothing. The strengths a start at zero, which makes the layer the identity.

    `size` is how many pixels a cell of the stage is wide and high, `rate` how many of its frames a latent stands for.
    """

    def __init__(self, channels: int, context_channels: int, *, size: int, rate: int) -> None:
        super().__init__()
        self.size, self.rate = size, rate
        self.to_value = nn.Linear(context_channels, channels)
        self.to_gate = nn.Linear(2 * channels, channels)
        self.strength = nn.Parameter(torch.zeros(channels))

    def context(self, first_frame: Tensor) -> Values:
        """The first frame's features `B C' H W` -> what is sampled for every frame, tile and chunk."""
        return Values(self.to_value(first_frame.movedim(1, -1)).movedim(-1, 1))

    def forward(
        self, x: Tensor, first_frame: Tensor | Values, displacements: Tensor, window: Window | None = None
    ) -> Tensor:
        """x `B C T H W` and the whole first frame's features `B C' H W`, or what `context` made of them -> x's shape.

        displacements: `B 2n t h w` as `MotionField` gives them, of the window. window: the part of the frame that x is,
        in cells of this stage; None is all of it.
        """
        values = first_frame if isinstance(first_frame, Values) else self.context(first_frame)
        offset = at_rate(displacements, self.rate)[:, :, -x.shape[2] :] / self.size
        frames = offset.transpose(1, 2).flatten(0, 1)
        frames = F.interpolate(frames, size=x.shape[3:], mode="bilinear", align_corners=False)
        places = places_of(frames.unflatten(0, (len(x), -1)).transpose(1, 2), window)
        found = sample(values.map, places).to(x.dtype)
        both = torch.cat([x, found], dim=1).movedim(1, -1)
        gate = (self.strength * torch.sigmoid(self.to_gate(both))).movedim(-1, 1)
        return x + (gate * inside(places, values.map)).to(x.dtype) * (found - x)


class Values(NamedTuple):
    """The first frame's features as `FirstFrameSampling` adds them, `B C H W`."""

    map: Tensor


def at_rate(displacements: Tensor, rate: int) -> Tensor:
    """`B 2n t h w` -> `B 2 rate·t h w`: means over the frames that one frame of a slower stage stands for."""
    batch, channels, t, height, width = displacements.shape
    line = displacements.view(batch, rate, channels // (2 * rate), 2, t, height, width).mean(2)
    return line.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)


def places_of(offset: Tensor, window: Window | None = None) -> Tensor:
    """Offsets `B 2 T h w` in cells -> the rows and columns they lead to from the window's cells, of the same shape."""
    rows = torch.arange(offset.shape[3], device=offset.device, dtype=torch.float32).view(-1, 1)
    columns = torch.arange(offset.shape[4], device=offset.device, dtype=torch.float32).expand(offset.shape[3], -1)
    cells = torch.stack([rows.expand_as(columns), columns]).view(2, 1, *offset.shape[3:])
    if window is not None:
        cells = cells + torch.tensor([window.top, window.left], device=offset.device).view(2, 1, 1, 1)
    return offset.to(torch.promote_types(offset.dtype, torch.float32)) + cells


def sample(x: Tensor, places: Tensor) -> Tensor:
    """x `B C H W` at rows and columns `B 2 T h w`, bilinear, beyond an edge what is at it: `B C T h w`."""
    height, width = x.shape[2:]
    grid = torch.stack([(2 * places[:, 1] + 1) / width - 1, (2 * places[:, 0] + 1) / height - 1], dim=-1)
    # Frames one under the other, so that x is not copied for each.
    found = F.grid_sample(x.to(grid.dtype), grid.flatten(1, 2), padding_mode="border", align_corners=False)
    return found.unflatten(2, places.shape[2:4])


def inside(places: Tensor, x: Tensor) -> Tensor:
    """1 where places `B 2 T h w` lie in x `B C H W`, falling to 0 within a cell of its edge: `B 1 T h w`."""
    beyond = [
        (-at).clamp(min=0) + (at - (size - 1)).clamp(min=0)
        for at, size in zip(places.unbind(1), x.shape[2:], strict=True)
    ]
    return ((1 - beyond[0]).clamp(min=0) * (1 - beyond[1]).clamp(min=0)).unsqueeze(1)
