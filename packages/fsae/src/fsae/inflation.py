"""From images to video (paper §2.2.1): each temporal kernel starts as a 2-D kernel on the frame at its output's time.

On one image the three taps of a kernel see the same frame, so that only their sum matters and training on images
teaches just that sum. `inflate` moves it to one tap and leaves the others at zero: the function on an image and on a
static clip stays what it was, exactly, and each frame of a moving clip starts from the image model's view of it.
"""

from __future__ import annotations

import torch
from torch import nn

from fsae.layers.conv import VideoConv3d


@torch.no_grad()
def inflate(model: nn.Module) -> None:
    """Move each temporal kernel of `model`, in place, to the tap that sees the output's own frame."""
    for module in model.modules():
        if isinstance(module, VideoConv3d) and module.kernel_size[0] > 1:
            kernel = module.weight.sum(2)
            module.weight.zero_()
            module.weight[:, :, module.current_tap] = kernel
