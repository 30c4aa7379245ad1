"""Encoders and tokenizers of transformers, loaded strictly.

A file that is missing, cut short or of another model is an error that names it. transformers itself would replace
missing tensors by random ones and go on, import a tokenizer's code from its folder, and download the attention that a
configuration names. Here a folder is data: what it names is looked up in the lists below, and nothing of it is run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fsae.errors import CheckpointError
from fsae.storage.checkpoint import tensor_shapes
from fsae.storage.files import read_json
from fsae.storage.fingerprint import weights_fingerprint

# Keys of a configuration that say where and by which version it was written, and decide no output.
_FLEETING = ("_name_or_path", "transformers_version")

# Bytes (nano), UMT5's, Qwen2.5-VL's, and those that are described by their tokenizer.json alone.
TOKENIZERS = (
    "ByT5Tokenizer",
    "T5Tokenizer",
    "T5TokenizerFast",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
)
# What runs from the installed packages; any other name can be a repository's, whose code would be fetched.
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
_ATTENTION_KEYS = ("_attn_implementation", "attn_implementation")


def load_encoder(cls: Any, folder: Path, dtype: torch.dtype | None = None, variant: str | None = None) -> Any:
    """A transformers model of class `cls`, every tensor of it from a folder's files, in their own dtype or in `dtype`.

    Raises:
        CheckpointError: config or weights are missing or cut short, the config is of another model or names attention
            that is not in `ATTENTION`, or a key is missing, unknown or misshapen.
    """
    config = read_json(folder / "config.json")
    kind, wanted = config.get("model_type"), cls.config_class.model_type
    if kind not in (None, wanted):  # transformers would build the model anyhow, at its own full size
        raise CheckpointError(f"{folder} holds a {kind!r} model, where {wanted!r} is read; give the folder of that one")
    for name in _named_attention(config):
        if name not in ATTENTION:
            raise CheckpointError(
                f"{folder / 'config.json'} names the attention {name!r}; accepted are {', '.join(ATTENTION)}: "
                "put one of them there, or take the name out"
            )
    for file in _weight_files(folder, variant):
        tensor_shapes(file)
    try:
        with _quiet_transformers():
            model, report = cls.from_pretrained(
                folder,
                dtype="auto" if dtype is None else dtype,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # so that they are reported below, in our words
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be read as a {cls.__name__} ({_first_line(error)}); copy it again"
        ) from error
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[f"{kind}_keys"])
        if keys:
            raise CheckpointError(
                f"the weights in {folder} do not fit {cls.__name__}: {keys[0]!r} is {kind}, as are "
                f"{len(keys) - 1} others; give the weights and the config that belong together"
            )
    return model.eval()


def load_tokenizer(folder: Path, class_name: str | None = None) -> Any:
    """A transformers tokenizer, of the class that a pipeline's index names; code that lies in the folder is never run.

    Raises:
        CheckpointError: its class is not in `TOKENIZERS`, it names code of its own, or a file is missing or damaged.
    """
    import transformers

    if class_name is not None:
        _check_tokenizer(class_name, folder.parent)
    config = read_json(folder / "tokenizer_config.json")
    if "auto_map" in config:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'} names code of its own, auto_map {config['auto_map']!r}, which is "
            f"never run; accepted are the tokenizers {', '.join(TOKENIZERS)}: give a model with one of them"
        )
    _check_tokenizer(config.get("tokenizer_class"), folder / "tokenizer_config.json")
    cls = transformers.AutoTokenizer if class_name is None else getattr(transformers, class_name)
    try:
        return cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Each tokenizer meets missing and broken vocabularies with exceptions of its own.
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read ({_first_line(error)}); copy it again"
        ) from error


def folder_fingerprint(folder: Path, *others: Path) -> str:
    """A hash of what decides an encoder's output, made of its files; of each tensor only some values are read.

    `others` are folders whose files belong to it as they are, such as the tokenizer's. CheckpointError if config,
    weights or a folder are missing or cut short.
    """
    config = {k: v for k, v in read_json(folder / "config.json").items() if k not in _FLEETING}
    files = _weight_files(folder, None)
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        tensor_shapes(file)
        with safe_open(file, framework="pt") as tensors:  # mapped, so that only the values that are looked at are read
            weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    precisions = sorted({str(tensor.dtype) for tensor in weights.values()})
    digest = hashlib.sha256(weights_fingerprint({"config": config, "dtypes": precisions}, weights).encode())
    for other in others:
        if not other.is_dir():
            raise CheckpointError(f"there is no folder {other}; the model is incomplete, copy it again")
        for path in sorted(path for path in other.rglob("*") if path.is_file()):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(other).as_posix()} {len(content)} ".encode())
            digest.update(content)
    return digest.hexdigest()


def _check_tokenizer(name: object, source: Path) -> None:
    if name not in TOKENIZERS:
        raise CheckpointError(
            f"{source} names the tokenizer {name!r}; accepted are {', '.join(TOKENIZERS)}: "
            "give a model with one of them"
        )


def _named_attention(config: Mapping[str, Any]) -> Iterator[object]:
    """Every name of an attention in a configuration, nested ones and those by part included."""
    for key, value in config.items():
        if key in _ATTENTION_KEYS:
            yield from value.values() if isinstance(value, Mapping) else [value] * (value is not None)
        elif isinstance(value, Mapping):
            yield from _named_attention(value)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars, and no table of keys that do not fit: our own error says it in one sentence."""
    from transformers import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """transformers' file names: one file, or an index and the shards that it names."""
    middle = f".{variant}" if variant else ""
    index = folder / f"model.safetensors.index{middle}.json"
    if not index.is_file():
        return [folder / f"model{middle}.safetensors"]
    return [folder / Path(name).name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
