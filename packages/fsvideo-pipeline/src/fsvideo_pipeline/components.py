"""A pipeline's folder read part by part, strictly: a missing, cut short or foreign file is an error that names it.

The folder is diffusers' layout: model_index.json and one subfolder a component. Our own models check themselves
(`fsae.storage.checkpoint`), the encoders and the tokenizer are checked by `fsdit.conditioning.pretrained`. Classes are
never imported because a file names them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionModel, PreTrainedModel, UMT5EncoderModel

from fsae.errors import CheckpointError
from fsae.model import FSAE
from fsae.storage.files import read_json
from fsdit.conditioning.pretrained import load_encoder, load_tokenizer
from fsdit.model import FSDiT
from fsupsampler.refiner import DynamicMask
from fsupsampler.upsampler import LatentUpsampler

MODELS: dict[str, type[Any]] = {
    "autoencoder": FSAE,
    "transformer": FSDiT,
    "upsampler": LatentUpsampler,
    "refiner": FSDiT,
}
ENCODERS: dict[str, type[PreTrainedModel]] = {
    "text_encoder": UMT5EncoderModel,
    "image_encoder": CLIPVisionModel,
}
NAMES = (*MODELS, *ENCODERS, "tokenizer", "mask")


def check_component(name: str, folder: Path, index: dict[str, Any]) -> None:
    """CheckpointError unless the pipeline in `folder`, whose model_index.json is `index`, has this component."""
    entry = index.get(name)
    if not (isinstance(entry, list) and len(entry) == 2):
        raise CheckpointError(f"{folder / 'model_index.json'} lists no {name}; the model is incomplete, copy it again")
    if not (folder / name).is_dir():
        raise CheckpointError(f"there is no {folder / name}; the model is incomplete, copy it again")


def load_component(name: str, folder: Path, index: dict[str, Any], dtype: torch.dtype, variant: str | None) -> Any:
    """A component that `check_component` found; CheckpointError if its files are missing, cut short or do not fit."""
    if name in MODELS:
        return MODELS[name].from_pretrained(folder, subfolder=name, torch_dtype=dtype, variant=variant)
    if name in ENCODERS:
        return load_encoder(ENCODERS[name], folder / name, dtype, variant)
    return load_tokenizer(folder / name, str(index[name][1])) if name == "tokenizer" else load_mask(folder / name)


def load_mask(folder: Path) -> DynamicMask:
    """The refiner's mask rule; CheckpointError if its configuration is missing or damaged."""
    return DynamicMask.from_config(read_json(folder / DynamicMask.config_name))
