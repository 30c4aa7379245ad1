"""What a training starts from: a preset, a saved FSAE, or one that is made of another model (paper §2.2.1, §2.2.3)."""

from __future__ import annotations

import sys

import torch

from fsae.errors import UserError
from fsae.model import FSAE
from fsae.stages.config import AutoencoderConfig
from fsae.storage.foreign import Report
from fsae.weights.convert import from_dc_ae
from fsae.weights.initialization import start_small
from fsae.weights.variants import to_lite, to_standard


def prepared_model(config: AutoencoderConfig) -> FSAE:
    """The model that `config` names, converted, in the memory layout and with the checkpointing it asks for.

    A preset has random weights, which follow from torch's own random state, and starts small; a saved model is taken as
    it is.

    Raises:
        UserError: no such model, an option that it does not know, or a model that is not what the conversion takes.
    """
    model = _converted(config) if config.convert != "none" else _plain(config)
    if config.channels_last:
        model.to(memory_format=torch.channels_last_3d)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def _plain(config: AutoencoderConfig) -> FSAE:
    if config.model in FSAE.presets:
        model = FSAE.from_preset(config.model, **config.model_options)
        start_small(model)
        return model
    if config.model_options:
        names = ", ".join(config.model_options)
        raise UserError(
            f"model_options {names} cannot change the saved model {config.model}; they are for presets and conversions"
        )
    return FSAE.from_preset_or_folder(config.model)


def _converted(config: AutoencoderConfig) -> FSAE:
    options = config.model_options
    if config.convert == "dc-ae":
        model, report = from_dc_ae(config.model, seed=config.loop.seed, progress=True, **options)
    else:
        given = FSAE.from_pretrained(config.model)
        if config.convert == "standard":
            model = to_standard(given, **{"seed": config.loop.seed, **options})
        elif unknown := set(options) - {"decoder_widths"}:
            raise UserError(f"model_options {', '.join(unknown)}: a Lite decoder is made with decoder_widths alone")
        else:
            model = to_lite(given, **options)
        report = Report.compare(given, model)
    print(report, file=sys.stderr)
    return model
