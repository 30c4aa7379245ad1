"""How an FSAE starts that has no weights to load, or none for its innermost stage.

From scratch, branches start small. The blocks have no norm at their entrance: with every branch at full strength the
activations of a decoder stage grow to ten times their share of the picture. One optimiser step at a usual rate then
shifts them all together, the last norm sees one direction, and the model stays at each picture's mean colour. Small
branches keep every stage near its shortcuts, where training starts at once.

Around a pretrained image autoencoder, the stage that it lacks starts as nothing but shortcuts. The model is then the
pretrained one around a bottleneck that moves space to channels.
"""

from __future__ import annotations

import torch
from torch import nn

from fsae.layers.attention import FirstFrameAttention, LiteMLA
from fsae.layers.blocks import GLUMBConv, ResBlock
from fsae.layers.conv import VideoConv3d
from fsae.layers.motion import FirstFrameSampling
from fsae.layers.norm import PixelNorm
from fsae.layers.resample import Downsample, Upsample
from fsae.model import FSAE

BRANCH_GAIN = 0.1


@torch.no_grad()
def start_small(model: nn.Module) -> None:
    """Set the branches of a freshly built `model` small, in place, and open the first-frame injection.

    Branch norms (where they are affine) start at 0.1, the up-convolutions at zero, W_o of the injection at unit gain,
    and a sampling injection as the features themselves: the reverse of a fine-tuning, whose injection must start as the
    identity.
    """
    for module in model.modules():
        if isinstance(module, (ResBlock, GLUMBConv, LiteMLA)) and module.norm.weight is not None:
            nn.init.constant_(module.norm.weight, BRANCH_GAIN)
        elif isinstance(module, Upsample):
            nn.init.zeros_(module.conv.weight)
            if module.conv.bias is not None:
                nn.init.zeros_(module.conv.bias)
        elif isinstance(module, FirstFrameAttention):
            nn.init.normal_(module.to_out.weight, std=module.to_out.in_features**-0.5)
        elif isinstance(module, FirstFrameSampling):
            nn.init.eye_(module.to_value.weight)
            nn.init.ones_(module.strength)


@torch.no_grad()
def start_innermost_as_shortcuts(model: FSAE) -> None:
    """Make the innermost stage of `model` the identity and the steps to and from it their shortcuts alone, in place.

    The last norm of each branch of its blocks starts at zero (weight and bias), and so do the convolutions of the step
    down to it and the step up from it: what is left averages channels down there and copies them back. Each of these
    has a gradient from the first step, as what it multiplies is not zero.
    """
    for stack in (model.encoder, model.decoder):
        for module in stack.stages[-1].modules():
            if isinstance(module, (ResBlock, GLUMBConv, LiteMLA)):
                _zero(module.norm)
    down, up = model.encoder.stages[-2].down, model.decoder.stages[-2].up
    assert isinstance(down, Downsample) and isinstance(up, Upsample)  # every stage but the innermost has them
    _zero(down.conv)
    _zero(up.conv)


def _zero(layer: PixelNorm | VideoConv3d) -> None:
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            nn.init.zeros_(parameter)
