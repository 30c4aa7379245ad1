"""Training samples of the transformer.

A sample is either a clip, ``{"video": 3 T H W in [-1, 1], "caption": str}`` (`fsae.data.datasets.VideoFolder`), which
the training encodes on the fly, or what is left of it once the frozen autoencoder has done its part:
``{"latents": C t h w, "caption": str, "image": 3 S S}`` with the first frame at the image encoder's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fsae import FSAE
from fsdit.conditioning import resize_for_clip


class LatentClip(TypedDict):
    """An encoded sample."""

    latents: Tensor
    caption: str
    image: Tensor


class CachedClips(Dataset[LatentClip]):
    """Encoded clips of one size in memory.

    Args:
        latents: ``M C t h w``, normalised.
        captions: M.
        images: ``M 3 S S``, first frames as `resize_for_clip` leaves them.
    """

    def __init__(self, latents: Tensor, captions: Sequence[str], images: Tensor) -> None:
        if not len(latents) == len(captions) == len(images):
            raise ValueError(f"{len(latents)} latents, {len(captions)} captions and {len(images)} images given")
        self.latents = latents
        self.captions = list(captions)
        self.images = images

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> LatentClip:
        return {
            "latents": self.latents[index].float(),
            "caption": self.captions[index],
            "image": self.images[index].float(),
        }


@torch.no_grad()
def encode_clips(dataset: Any, autoencoder: FSAE, image_size: int, batch_size: int = 1) -> CachedClips:
    """Encode every clip of a map-style dataset once, on the autoencoder's device; images are kept in half precision.

    Args:
        dataset: items ``{"video": 3 T H W, "caption": str}``, all of one size.
        autoencoder: gives the latents.
        image_size: S, the image encoder's ``image_size``.
        batch_size: clips encoded together.
    """
    device = next(autoencoder.parameters()).device
    latents, captions, images = [], [], []
    for batch in tqdm(DataLoader(dataset, batch_size=batch_size), desc="encoding clips", unit="batch"):
        video = batch["video"].to(device)
        latents.append(autoencoder.encode(video).float().cpu())
        images.append(resize_for_clip(video[:, :, 0], image_size).half().cpu())
        captions.extend(batch["caption"])
    return CachedClips(torch.cat(latents), captions, torch.cat(images))
