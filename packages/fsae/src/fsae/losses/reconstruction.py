"""The reconstruction loss: plain L1 (paper §2.2.2; there is no KL term anywhere)."""

from __future__ import annotations

from torch import Tensor


def l1_loss(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Mean absolute difference of two videos `B 3 T H W`, a scalar."""
    return (reconstruction - video).abs().mean()
