"""The frozen autoencoder of both trainings, with the checks that clips and upsampler fit it."""

from __future__ import annotations

import numpy as np

from fsae import FSAE
from fsae.errors import UserError
from fsdit.preparation.pairs import check_pair_size
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
