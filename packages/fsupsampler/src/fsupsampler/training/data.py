"""Training pairs: a clip's latents and those of its half-size copy (paper §2.4.1).

A sample is either a clip (`fsae.data.datasets.VideoFolder`), which the training halves and encodes on the
fly, or `{"low": C t h w, "high": C t 2h 2w, "caption": str, "image": 3 S S}` encoded beforehand.
"""

from __future__ import annotations

from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fsae import FSAE
from fsae.errors import UserError
from fsdit.training.data import CachedClips, encode_clips


class LatentPair(TypedDict):
    """An encoded sample."""

    low: Tensor
    high: Tensor
    caption: str
    image: Tensor


def halve(video: Tensor) -> Tensor:
    """`... H W` -> `... H/2 W/2`, bicubic with antialiasing, clamped to [-1, 1]."""
    height, width = video.shape[-2:]
    frames = video.reshape(-1, 1, height, width)
    small = F.interpolate(frames, size=(height // 2, width // 2), mode="bicubic", antialias=True)
    return small.clamp(-1, 1).view(*video.shape[:-2], height // 2, width // 2)


@torch.no_grad()
def encode_pair(autoencoder: FSAE, video: Tensor) -> tuple[Tensor, Tensor]:
    """Video `B 3 T H W` -> latents of its half-size copy, `B C t h w`, and its own, `B C t 2h 2w`."""
    return autoencoder.encode(halve(video)).float(), autoencoder.encode(video).float()


def latent_pair(batch: Any, autoencoder: FSAE | None) -> tuple[Tensor, Tensor]:
    """(low, high) latents of a batch, encoded now if it holds only videos."""
    if "low" in batch:
        return batch["low"], batch["high"]
    if autoencoder is None:
        raise UserError("the batch holds videos and no latents; give the autoencoder that encodes them")
    return encode_pair(autoencoder, batch["video"])


class CachedPairs(Dataset[LatentPair]):
    """Encoded pairs of one size in memory.

    Args:
        low: the half-size clips.
        high: the same clips whole, in the same order.
    """

    def __init__(self, low: CachedClips, high: CachedClips) -> None:
        whole, half = high.latents.shape, low.latents.shape
        if (*whole[:3], whole[3] // 2, whole[4] // 2) != tuple(half):
            raise ValueError(
                f"high latents {tuple(whole)} need low ones of half the height and width, not {tuple(half)}"
            )
        self.low, self.high = low, high

    def __len__(self) -> int:
        return len(self.high)

    def __getitem__(self, index: int) -> LatentPair:
        clip = self.high[index]
        return {
            "low": self.low[index]["latents"],
            "high": clip["latents"],
            "caption": clip["caption"],
            "image": clip["image"],
        }


class HalvedClips(Dataset[Any]):
    """The clips of another dataset at half their size."""

    def __init__(self, clips: Any) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Any:
        clip = self.clips[index]
        return {**clip, "video": halve(clip["video"])}


def encode_pairs(dataset: Any, autoencoder: FSAE, image_size: int, batch_size: int = 1) -> CachedPairs:
    """Encode every clip of a map-style dataset once at both sizes.

    Args:
        dataset: items `{"video": 3 T H W, "caption": str}`, all of one size, H and W multiples of 128.
        autoencoder: on the device that encodes.
        image_size: S, the image encoder's `image_size`.
        batch_size: clips encoded together.
    """
    low = encode_clips(HalvedClips(dataset), autoencoder, image_size, batch_size)
    return CachedPairs(low, encode_clips(dataset, autoencoder, image_size, batch_size))
