"""A pipeline's folder read part by part, strictly: a file that is missing, cut short or foreign is an error
that names it.

The folder is diffusers' layout: model_index.json and one subfolder a component. Our own models check
themselves (`fsae.checkpoint`); this file does the same for the encoders, tokenizer and mask that come from
libraries, which would replace missing tensors by random ones and go on. Classes are never imported because a
file names them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CLIPVisionModel, PreTrainedModel, PreTrainedTokenizerBase, UMT5EncoderModel

from fsae.checkpoint import tensor_shapes
from fsae.errors import CheckpointError
from fsae.model import FSAE
from fsdit.model import FSDiT
from fsupsampler.refiner import DynamicMask
from fsupsampler.upsampler import LatentUpsampler
from fsvideo_pipeline.settings import read_json

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


def load_component(name: str, folder: Path, index: dict[str, Any], dtype: torch.dtype, variant: str | None) -> Any:
    """One component of the pipeline in `folder`, whose model_index.json is `index`.

    Raises:
        CheckpointError: the index does not list it, or its files are missing, cut short or do not fit.
    """
    entry = index.get(name)
    if not (isinstance(entry, list) and len(entry) == 2):
        raise CheckpointError(f"{folder / 'model_index.json'} lists no {name}; the model is incomplete, copy it again")
    if not (folder / name).is_dir():
        raise CheckpointError(f"there is no {folder / name}; the model is incomplete, copy it again")
    if name in MODELS:
        return MODELS[name].from_pretrained(folder, subfolder=name, torch_dtype=dtype, variant=variant)
    if name in ENCODERS:
        return load_encoder(ENCODERS[name], folder / name, dtype, variant)
    return load_tokenizer(folder / name, str(entry[1])) if name == "tokenizer" else load_mask(folder / name)


def load_encoder(
    cls: type[PreTrainedModel], folder: Path, dtype: torch.dtype, variant: str | None = None
) -> PreTrainedModel:
    """A transformers model, every tensor of it from the files.

    Raises:
        CheckpointError: config or weights are missing or cut short, or a key is missing, unknown or
            misshapen.
    """
    read_json(folder / "config.json")
    for file in _weight_files(folder, variant):
        tensor_shapes(file)
    with _quiet_transformers():
        model, report = cls.from_pretrained(
            folder,
            dtype=dtype,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # so that they are reported below, in our words
            output_loading_info=True,
        )
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[f"{kind}_keys"])
        if keys:
            raise CheckpointError(
                f"the weights in {folder} do not fit {cls.__name__}: {keys[0]!r} is {kind}, as are "
                f"{len(keys) - 1} others; give the weights and the config that belong together"
            )
    return model.eval()


def load_tokenizer(folder: Path, class_name: str) -> PreTrainedTokenizerBase:
    """A transformers tokenizer of the named class.

    Raises:
        CheckpointError: transformers has no tokenizer of that name, or its files are missing or damaged.
    """
    cls: Any = getattr(transformers, class_name, object)
    if not issubclass(cls, PreTrainedTokenizerBase):
        index = folder.parent / "model_index.json"
        raise CheckpointError(f"{index} names the tokenizer {class_name!r}, which transformers does not have")
    read_json(folder / "tokenizer_config.json")
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    # Each tokenizer meets missing and broken vocabularies with exceptions of its own.
    except Exception as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be read ({error}); copy it again") from error


def load_mask(folder: Path) -> DynamicMask:
    """The refiner's mask rule.

    Raises:
        CheckpointError: its configuration is missing or damaged.
    """
    return DynamicMask.from_config(read_json(folder / DynamicMask.config_name))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its table of keys that do not fit and its progress bars: one sentence says it."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """transformers' file names: one file, or an index and the shards that it names."""
    middle = f".{variant}" if variant else ""
    index = folder / f"model.safetensors.index{middle}.json"
    if not index.is_file():
        return [folder / f"model{middle}.safetensors"]
    return [folder / Path(name).name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
