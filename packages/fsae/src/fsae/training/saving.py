"""From a checkpoint to a model's folder in diffusers' layout, a file at a time: nothing ever holds the whole model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards

from fsae.storage.checkpoint import save_state
from fsae.storage.files import write_json
from fsae.storage.pieces import StoredTensor, stored_tensors

_SHARD = 10 * 1000**3  # bytes, as diffusers' max_shard_size


def config_file(checkpoint: Path, name: str) -> Path:
    """Where a checkpoint keeps the configuration of its module `name`, if that is a diffusers model."""
    return checkpoint / f"config-{name}.json"


def trained_tensors(checkpoint: Path, name: str, average: bool = True) -> dict[str, StoredTensor]:
    """A module's tensors in a checkpoint; with `average` the averaged ones, where there are such."""
    tensors = stored_tensors(checkpoint, name)
    if average and any(checkpoint.glob("ema.*safetensors")):
        averaged = stored_tensors(checkpoint, "ema")
        tensors |= {key: averaged[f"{name}.{key}"] for key in tensors if f"{name}.{key}" in averaged}
    return tensors


def save_model(config: Path, tensors: dict[str, StoredTensor], folder: Path, shard: int = _SHARD) -> None:
    """Write a model as its `save_pretrained` would.

    Args:
        config: The file that becomes its config.json.
        tensors: Its weights and buffers.
        folder: Where to; it is there, and empty.
        shard: Bytes of one file at most, unless a single tensor is larger. So much is held at a time.

    Raises:
        CheckpointError: a part of a tensor is in no file.
    """
    sizes = {key: torch.empty(tensor.shape, device="meta") for key, tensor in tensors.items()}
    pattern = SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(sizes, filename_pattern=pattern, max_shard_size=shard)
    for file, keys in split.filename_to_tensors.items():
        save_state({key: tensors[key].whole() for key in keys}, folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index, sort_keys=True)
    shutil.copyfile(config, folder / "config.json")
