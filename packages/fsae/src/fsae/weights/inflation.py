"""From images to video (paper §2.2.1), and from causal to non-causal time (paper §2.2.3).

On one image the three taps of a temporal kernel see the same frame, so that only their sum matters and training on
images teaches just that sum. A 2-D kernel therefore goes to the tap that sees the output's own frame, the others start
at zero: the function on an image and on a static clip stays what it was, exactly, and each frame of a moving clip
starts from the image model's view of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fsae.layers.conv import VideoConv3d


def inflate_kernel(kernel: Tensor, taps: int, tap: int) -> Tensor:
    """A 2-D kernel `O I h w` -> `O I taps h w`, all of it at `tap`."""
    video = kernel.new_zeros((*kernel.shape[:2], taps, *kernel.shape[2:]))
    video[:, :, tap] = kernel
    return video


def center_kernel(kernel: Tensor) -> Tensor:
    """A causal kernel `O I 3 h w` over t-2, t-1, t -> one over t-1, t, t+1: (w0 + w1, w2, 0).

    What looked at the present looks at the present, what looked at the past at the nearest past there is, and the
    future counts for nothing yet: equal on static content and close on motion. To keep the taps and change the padding
    alone would move every layer by a frame.
    """
    past, recent, present = kernel.unbind(2)
    return torch.stack([past + recent, present, torch.zeros_like(present)], dim=2)


@torch.no_grad()
def inflate(model: nn.Module) -> None:
    """Move each temporal kernel of `model`, in place, to the tap that sees the output's own frame."""
    for module in model.modules():
        if isinstance(module, VideoConv3d) and module.kernel_size[0] > 1:
            taps = module.kernel_size[0]
            module.weight.copy_(inflate_kernel(module.weight.sum(2), taps, module.current_tap))
