"""Training pairs: a clip's latents and those of its half-size copy (paper §2.4.1), by a frozen autoencoder.

A sample is either a clip (`fsae.data.datasets.VideoFolder`), which the training halves and encodes on the fly, or a
pair that `fsdit cache --pairs true` encoded beforehand: `{"low": C t h w, "high": C t 2h 2w, "caption": str}` with
either `image`, the first frame, or the embeddings (`fsdit.training.data`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from fsae import FSAE
from fsae.errors import UserError
from fsae.training.runs import read_samples
from fsdit.preparation.pairs import check_pair_size, encode_pair
from fsdit.preparation.shards import is_cache
from fsdit.training.data import CachedLatents, Samples, read_cache
from fsupsampler.training.config import RefinerConfig, UpsamplerConfig
from fsupsampler.upsampler import LatentUpsampler


def load_autoencoder(config: UpsamplerConfig | RefinerConfig) -> FSAE:
    """The frozen autoencoder; UserError unless it takes clips of all sizes of the config and of half of them."""
    autoencoder = FSAE.from_pretrained(config.autoencoder).requires_grad_(False)
    for frames, height, width in config.clips.shapes:
        check_pair_size(autoencoder, height, width)
        autoencoder.latent_shape(frames, height, width)
    return autoencoder


def check_statistics(upsampler: LatentUpsampler, autoencoder: FSAE) -> None:
    """UserError unless the upsampler un-normalises latents as the autoencoder normalises them."""
    for name in ("latent_channels", "latents_mean", "latents_std"):
        if not np.array_equal(upsampler.config[name], autoencoder.config[name]):
            raise UserError(f"the upsampler's {name} is not the autoencoder's; give parts that belong together")


def latent_pair(batch: Any, autoencoder: FSAE | None) -> tuple[Tensor, Tensor]:
    """(low, high) latents of a batch, encoded now if it holds only videos."""
    if "low" in batch:
        return batch["low"], batch["high"]
    if autoencoder is None:
        raise UserError("the batch holds videos and no latents; give the autoencoder that encodes them")
    return encode_pair(autoencoder, batch["video"])


def read_pairs(
    config: UpsamplerConfig | RefinerConfig, autoencoder: FSAE, dataset: Any = None, validation: Any = None
) -> Samples:
    """The samples of a training: those given, or what `config.data` names, a cache of pairs or videos."""
    if dataset is None and is_cache(config.data):
        dataset = CachedLatents(config.data)
    if isinstance(dataset, CachedLatents):
        return read_cache(config, dataset, validation, autoencoder, pairs=True)
    return Samples(*read_samples(config, dataset, validation))
