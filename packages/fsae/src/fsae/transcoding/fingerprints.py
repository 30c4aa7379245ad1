"""Which latents and which decoded videos belong to which model.

Latents fit every decoder that was trained on their encoder, which stays frozen while decoders are fine-tuned
(paper §2.2.3); so what they carry is the fingerprint of the encoder and of the latents' statistics alone.
"""

from __future__ import annotations

from fsae.model import FSAE
from fsae.storage.fingerprint import weights_fingerprint

_ENCODER_CONFIG = (
    "widths",
    "encoder_depths",
    "latent_channels",
    "residual_stages",
    "temporal_stages",
    "attention_head_dim",
    "norm_eps",
    "norm_affine",
    "latents_mean",
    "latents_std",
)


def encoder_fingerprint(model: FSAE) -> str:
    """What decides the latents: the encoder's configuration and weights, and the statistics they are normalised by."""
    config = {name: model.config[name] for name in _ENCODER_CONFIG}
    return weights_fingerprint(config, model.encoder.state_dict())


def model_fingerprint(model: FSAE) -> str:
    """What decides the decoded video: the whole configuration and all weights."""
    return weights_fingerprint(model.public_config, model.state_dict())
