"""Checkpoints: safetensors, loaded strictly and saved whole.

diffusers merely warns when a checkpoint lacks a tensor or brings one that no module wants, and the model then
computes with noise. Here a missing, unknown or misshapen key, a missing shard and a file cut short are
errors, found from the files' headers before any weight is read. Pickles are never read.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from accelerate import init_empty_weights
from diffusers import ConfigMixin, ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fsae.errors import CheckpointError, UserError
from fsae.storage.files import atomic_path, read_json, usual_mode

Shapes = Mapping[str, tuple[int, ...]]

_CONFIG_NAME = "config.json"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


class StrictModelMixin(ModelMixin, ConfigMixin):
    """A diffusers model whose checkpoints must fit exactly.

    Subclasses decorate `__init__` with `register_to_config` and may list named configurations in `presets`.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    weights_source: Mapping[str, Any] | str | None = None
    """Of a model that is to be split: where its weights come from then (`fsae.training.runs.model_to_train`)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A DiffusionPipeline that loads a component looks its base class up, by name, in the component's own module.
        vars(sys.modules[cls.__module__]).setdefault("ModelMixin", ModelMixin)

    @property
    def public_config(self) -> dict[str, Any]:
        """What the model was built with: its configuration without diffusers' own entries."""
        return {name: value for name, value in self.config.items() if not name.startswith("_")}

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """Build the model from a named configuration, with random weights; `overrides` replace single values. UserError
        if there is no such preset, or an override that the configuration does not know."""
        if name not in cls.presets:
            raise UserError(
                f"{cls.__name__} has no preset {name!r}{nearest(name, cls.presets)}; "
                f"choose one of {', '.join(cls.presets)}"
            )
        known = cls._get_init_keys(cls) - {"self"}
        for key in overrides:
            if key not in known:
                raise UserError(
                    f"{cls.__name__} has no option {key!r}{nearest(key, known)}; leave it out or correct it"
                )
        return cls._built({**cls.presets[name], **overrides}, f"{cls.__name__} cannot be built with {overrides}")

    @classmethod
    def _built(cls, config: Mapping[str, Any], what: str) -> Self:
        """The model of a configuration; one whose values do not fit together is the user's to mend."""
        try:
            return cls(**config)
        except (TypeError, ValueError, KeyError, IndexError, ArithmeticError, RuntimeError) as error:
            raise UserError(f"{what} ({type(error).__name__}: {error}); correct the values") from error

    @classmethod
    def from_preset_or_folder(cls, model: str, **overrides: Any) -> Self:
        """What a training's option names: a preset, built with `overrides`, or the folder of a saved model; UserError
        if it is neither, or as `from_preset` and `from_pretrained`."""
        if cls._is_preset(model):
            return cls.from_preset(model, **overrides)
        return cls.from_pretrained(model)

    @classmethod
    def outline(cls, model: str, **overrides: Any) -> Self:
        """`from_preset_or_folder` on the meta device, to refuse what does not fit a large model before it is built.

        A saved model's files are checked, but no weight is drawn or read.
        """
        if cls._is_preset(model):
            with torch.device("meta"):
                return cls.from_preset(model, **overrides)
        _check_folder(cls, Path(model), None)
        with torch.device("meta"):
            outline: Self = cls.from_config(read_json(Path(model, _CONFIG_NAME)))
        return outline

    @classmethod
    def _is_preset(cls, model: str) -> bool:
        """Whether `model` names a preset; what is no folder either is refused."""
        if model not in cls.presets and not Path(model).is_dir():
            names = ", ".join(cls.presets)
            raise UserError(f"model {model!r} is neither a preset ({names}) nor a folder; give one of them")
        return model in cls.presets

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load from a folder (or a Hub repository) after checking that its files fit this class exactly.

        The loading itself is diffusers' own, so `torch_dtype`, `variant`, `device_map`, `low_cpu_mem_usage`,
        `quantization_config` and the like work as known. Of a checkpoint that was saved quantised only the
        files' wholeness is checked, as its keys are the quantiser's.

        Raises:
            CheckpointError: a file is missing or cut short, or a key is missing, unknown or misshapen; the
                first one is named with its nearest match.
        """
        folder = local_folder(pretrained_model_name_or_path, subfolder, kwargs)
        _check_folder(cls, folder / (subfolder or ""), kwargs.get("variant"))
        kwargs["use_safetensors"] = True
        return super().from_pretrained(folder, subfolder=subfolder, **kwargs)

    def to_json_string(self) -> str:
        """The configuration as its file holds it: without the place it was loaded from, which is nobody else's."""
        values = json.loads(super().to_json_string())
        values.pop("_name_or_path", None)
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        variant: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save config and safetensors shards; each file appears whole, and shards of an earlier save go.

        Only the main process writes. `max_shard_size` and `push_to_hub` are diffusers' own.

        Raises:
            UserError: `save_directory` is a file, or `safe_serialization=False` asks for a pickle.
        """
        if not kwargs.pop("safe_serialization", True):
            raise UserError("weights are saved as safetensors only; leave safe_serialization out")
        if not is_main_process:
            return
        target = Path(save_directory)
        if target.exists() and not target.is_dir():
            raise UserError(f"cannot save a model at {target}: it is a file; give a folder")
        target.mkdir(parents=True, exist_ok=True)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", target.resolve().name)
        # Inside the target, so that the renames never cross file systems.
        with tempfile.TemporaryDirectory(dir=target, prefix=".tmp-") as temporary:
            super().save_pretrained(temporary, variant=variant, **kwargs)
            _move_in(Path(temporary), target, variant)


def load_state(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a safetensors file into `module`, in place; values take its dtypes and devices. CheckpointError if its
    tensors are not exactly those of `module`, or as `tensor_shapes`."""
    check_fit(_shapes_of(module), tensor_shapes(path), type(module).__name__, Path(path))
    module.load_state_dict(load_file(path), strict=True)


def save_state(
    state: nn.Module | Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Save a module's state, or a dictionary of tensors, as one safetensors file, atomically; `metadata` in its header.

    Tensors that share memory (tied weights) are written once for each name.
    """
    tensors = state.state_dict() if isinstance(state, nn.Module) else state
    seen: set[int] = set()
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        packed = tensor.detach().contiguous()
        whole[name] = packed.clone() if storage in seen else packed
        seen.add(storage)
    with atomic_path(path) as temporary:
        save_file(whole, temporary, metadata={"format": "pt", **metadata})


def tensor_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header; CheckpointError if it is missing, cut short or no such
    file."""
    if not os.path.isfile(path):
        raise CheckpointError(f"there is no weights file {path}; the checkpoint is incomplete, copy it again")
    with open(path, "rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise CheckpointError(f"{path} is only git's pointer to the weights; run 'git lfs pull' there")
    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"the weights file {path} is cut short or no safetensors file ({error}); copy it again"
        ) from None


def local_folder(path: str | os.PathLike[str], subfolder: str | None, options: Mapping[str, Any]) -> Path:
    """The folder itself, or the Hub repository of that name, downloaded; only what a load needs."""
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path) or not _HUB_NAME.fullmatch(os.fspath(path)):
        raise CheckpointError(f"there is no model folder {path}; check its name")
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder}/" if subfolder else ""
    try:
        chosen = {key: options[key] for key in _HUB_OPTIONS if options.get(key) is not None}
        patterns = [prefix + "*.json", prefix + "*.safetensors"]
        return Path(snapshot_download(os.fspath(path), allow_patterns=patterns, **chosen))
    # The Hub's client raises its own, requests', and the operating system's errors; for the user all mean one
    # thing.
    except Exception as error:
        raise CheckpointError(
            f"there is no model folder {path}, nor could it be had from the Hub ({type(error).__name__}); "
            "check the name"
        ) from error


def _check_folder(cls: type[StrictModelMixin], folder: Path, variant: str | None) -> None:
    config = read_json(folder / _CONFIG_NAME)
    kind = config.get("_class_name", cls.__name__)
    if kind not in [base.__name__ for base in cls.__mro__]:
        raise CheckpointError(f"{folder} holds a saved {kind}, where {cls.__name__} is read; give the folder of such")
    file, found = folder_shapes(folder, variant)
    if config.get("quantization_config") is not None:
        return
    try:
        with init_empty_weights():
            expected = _shapes_of(cls.from_config(config))
    except (TypeError, ValueError, KeyError, IndexError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder / _CONFIG_NAME} describes no {cls.__name__} ({type(error).__name__}: {error}); copy it again"
        ) from error
    check_fit(expected, found, cls.__name__, file)


def folder_shapes(folder: Path, variant: str | None) -> tuple[Path, dict[str, tuple[int, ...]]]:
    """The file that leads to the weights, and all names and shapes; every shard is looked at."""
    index = folder / _with_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    if not index.is_file():
        single = folder / _with_variant(SAFETENSORS_WEIGHTS_NAME, variant)
        return single, tensor_shapes(single)
    weight_map: dict[str, str] = read_json(index).get("weight_map", {})
    for shard in weight_map.values():
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names the shard {shard!r}, no plain file name; do not trust it")
    shards = {name: tensor_shapes(folder / name) for name in sorted(set(weight_map.values()))}
    for key, shard in weight_map.items():
        if key not in shards[shard]:
            raise CheckpointError(f"{index} places {key!r} in {shard}, which lacks it; copy it again")
    for shard, shapes in shards.items():
        for key in shapes:
            if weight_map.get(key) != shard:
                raise CheckpointError(f"{index} does not list {key!r}, which {shard} holds; copy it again")
    return index, {key: shards[shard][key] for key, shard in weight_map.items()}


def _with_variant(name: str, variant: str | None) -> str:
    """diffusers' file names: model.fp16.safetensors, model.safetensors.index.fp16.json."""
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}.{variant}.{suffix}" if variant else name


def _shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def check_fit(expected: Shapes, found: Shapes, model: str, file: str | os.PathLike[str]) -> None:
    """Raise for the first key, in the model's order, that is missing, misshapen, or unknown."""
    missing = [key for key in expected if key not in found]
    unknown = [key for key in found if key not in expected]
    misshapen = [key for key in expected if key in found and expected[key] != found[key]]
    if not (missing or unknown or misshapen):
        return
    if missing:
        problem = f"lacks {missing[0]!r}{nearest(missing[0], unknown or found)}"
    elif unknown:
        problem = f"holds {unknown[0]!r}, which the model does not know{nearest(unknown[0], expected)}"
    else:
        key = misshapen[0]
        problem = f"holds {key!r} as {list(found[key])}, where the model has {list(expected[key])}"
    raise CheckpointError(
        f"{file} does not fit {model}: it {problem}; in all {len(missing)} missing, "
        f"{len(unknown)} unknown and {len(misshapen)} misshapen keys; "
        "give the weights and the config that belong together"
    )


def nearest(key: str, names: Any) -> str:
    """The name that `key` may have meant, in brackets for an error's text; empty where there are no names."""
    close = difflib.get_close_matches(key, list(names), n=1, cutoff=0.0)
    return f" (nearest: {close[0]!r})" if close else ""


def _move_in(source: Path, target: Path, variant: str | None) -> None:
    """Rename new files into place, the config last, then remove what an earlier save of this variant left."""
    new = sorted(source.iterdir(), key=lambda path: (path.suffix != ".safetensors", path.name == _CONFIG_NAME))
    mode = usual_mode(target)
    for path in new:
        path.chmod(mode)
        os.replace(path, target / path.name)
    index = _with_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    stem, suffix = _with_variant(SAFETENSORS_WEIGHTS_NAME, variant).rsplit(".", 1)
    ours = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.{suffix}|{re.escape(index)}")
    names = {path.name for path in new}
    for path in target.iterdir():
        if ours.fullmatch(path.name) and path.name not in names:
            path.unlink()
