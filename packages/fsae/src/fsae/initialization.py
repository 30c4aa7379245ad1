"""How an FSAE starts when no image autoencoder's weights are at hand.

The blocks have no norm at their entrance: with every branch at full strength the activations of a decoder stage grow to
ten times their share of the picture, one optimiser step at a usual rate then shifts them all together, the last norm
sees one direction, and the model stays at each picture's mean colour. Small branches keep every stage near its
shortcuts, where training starts at once.
"""

from __future__ import annotations

import torch
from torch import nn

from fsae.layers.attention import FirstFrameAttention, LiteMLA
from fsae.layers.blocks import GLUMBConv, ResBlock
from fsae.layers.resample import Upsample

BRANCH_GAIN = 0.1


@torch.no_grad()
def start_small(model: nn.Module) -> None:
    """Set the branches of a freshly built `model` small, in place, and open the first-frame injection.

    Branch norms (where they are affine) start at 0.1, the up-convolutions at zero, and W_o of the injection at unit
    gain: the reverse of a fine-tuning, whose injection must start as the identity.
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
