"""The adversarial loss (paper §2.2.1, stages 2 and 3): a 3-D multi-scale discriminator, non-saturating, with R1.

With D the scores of one scale (a map of logits over time and space), x a clip and x̂ its reconstruction,

    L_G = mean softplus(-D(x̂))
    L_D = mean softplus(-D(x)) + mean softplus(D(x̂)) + (gamma / 2) E ||∇_x sum D(x)||² / N,

each scale a discriminator of its own, and the losses their mean over the scales. The last term is R1 [Mescheder et al.
2018] of N logits: a logit sees a part of the clip, so that this does not depend on the clip's size, where the gradient
of the mean logit vanishes as clips grow. It is taken lazily, every sixteenth update at sixteen times its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2
"""Of the leaky rectifiers."""


class ScaleDiscriminator(nn.Module):
    """Scores at one scale: `B 3 T H W` -> logits `B 1 T/4 H/8 W/8`, sides rounded up, so that one frame does as well.

    Without norms: R1 needs the gradient of each sample by itself.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = (3, width, 2 * width, 4 * width, 8 * width, 1)
        strides: tuple[tuple[int, int, int], ...] = ((2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 1, 1), (1, 1, 1))
        self.convs = nn.ModuleList(
            nn.Conv3d(before, after, 3, stride, padding=1)
            for (before, after), stride in zip(pairwise(channels), strides, strict=True)
        )

    def forward(self, video: Tensor) -> Tensor:
        x = self.convs[0](video)
        for conv in self.convs[1:]:
            x = conv(F.leaky_relu(x, SLOPE))
        return x


class Discriminator(nn.Module):
    """Several of them, each on frames half as large as the one before: `B 3 T H W` in [-1, 1] -> a list of logits.

    Frames may be as small as 3 x 3 pixels for three scales. A width of 64 channels in the first layer gives 4.66
    million parameters a scale.
    """

    def __init__(self, width: int = 64, scales: int = 3) -> None:
        super().__init__()
        self.width = width
        self.scales = nn.ModuleList(ScaleDiscriminator(width) for _ in range(scales))

    def forward(self, video: Tensor) -> list[Tensor]:
        scores = []
        for number, scale in enumerate(self.scales):
            if number:
                video = F.avg_pool3d(video, (1, 2, 2), ceil_mode=True)
            scores.append(scale(video))
        return scores


def generator_loss(fake: Sequence[Tensor]) -> Tensor:
    """What the autoencoder pays: `fake` are the discriminator's logits of its reconstruction, one tensor a scale."""
    return torch.stack([F.softplus(-score.float()).mean() for score in fake]).mean()


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """What the discriminator pays, less R1: logits of clips and of reconstructions, one tensor a scale each."""
    terms = [F.softplus(-r.float()).mean() + F.softplus(f.float()).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(terms).mean()


def r1_penalty(discriminator: Discriminator, video: Tensor) -> Tensor:
    """E ||∇_x sum D(x)||² / N on clips `B 3 T H W`, the mean over scales, in fp32; differentiable by D's parameters.

    The caller weighs it: gamma / 2, times the number of updates it stands for.
    """
    with torch.autocast(video.device.type, enabled=False):
        x = video.detach().to(torch.promote_types(video.dtype, torch.float32)).requires_grad_()
        norms = []
        for score in discriminator(x):
            # The sum over samples has each sample's own gradient: no layer mixes them.
            (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
            norms.append(slope.square().flatten(1).sum(1).mean() / score[0].numel())
        return torch.stack(norms).mean()
