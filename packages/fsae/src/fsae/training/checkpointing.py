"""Checkpoints of a run: one folder a step, complete or absent.

    checkpoint-00001000/
        <module>.safetensors     weights of each trained module
        ema.safetensors          averaged weights (only with ema_decay above 0)
        optimizer.safetensors    "<moment>/<module>.<parameter>"; in place of these, of a sharded run, the pieces that
                                 each process holds: optimizer.00000.safetensors ... (`fsae.storage.pieces`)
        config-<module>.json     configuration of each trained module that is a diffusers model
        random-00000.*           random state of each process (or of those that share samples): .safetensors and .json
        state.json               step, data position, settings, loss scaler

A folder is written under a temporary name and renamed once everything is in it; older ones go only after
that.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fsae.errors import CheckpointError, UserError
from fsae.storage.checkpoint import save_state
from fsae.storage.files import publish_folder, read_json, write_json

GO_ON_FROM_OLDER = "remove its folder to go on from an older checkpoint"
_NAME = re.compile(r"checkpoint-(\d{8,})")


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` lives."""
    return output_dir / f"checkpoint-{step:08d}"


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints in the order of their steps."""
    found = [p for p in output_dir.glob("checkpoint-*") if _NAME.fullmatch(p.name) and (p / "state.json").is_file()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.rsplit("-", 1)[1])


def remove_partial(output_dir: Path) -> None:
    """Clear away what a killed run left half-written."""
    for folder in output_dir.glob(".checkpoint-*.partial"):
        shutil.rmtree(folder, ignore_errors=True)


def publish(temporary: Path, final: Path, keep: int) -> None:
    """Give a finished checkpoint its name, then drop all but the newest `keep`."""
    publish_folder(temporary, final)
    for old in checkpoints(final.parent)[:-keep]:
        shutil.rmtree(old)


class Attempt:
    """Calls what may fail for want of room, and does nothing more after the first failure, which it keeps.

    A process that failed must go on to the next collective call, where all processes learn of the failure; one that
    left early would have the others wait for it forever.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __call__(self, function: Callable[..., object], *arguments: Any) -> None:
        if self.error is None:
            try:
                function(*arguments)
            except (OSError, SafetensorError, UserError) as error:
                self.error = error


# --- random state


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of Python's, NumPy's and torch's global generators as tensors and JSON values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    values = {
        "python": [version, gauss],
        "numpy": [str(name), int(position), int(has_gauss), float(cached)],
    }
    return tensors, values


def restore_random_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """The inverse of `random_state`."""
    version, gauss = values["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    name, position, has_gauss, cached = values["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def save_random_state(folder: Path, rank: int) -> None:
    """Write this process's random state."""
    tensors, values = random_state()
    save_state(tensors, folder / f"random-{rank:05d}.safetensors")
    write_json(folder / f"random-{rank:05d}.json", values, sort_keys=True)


def load_random_state(folder: Path, rank: int) -> None:
    """Set this process's generators to their state at the checkpoint."""
    values = read_json(folder / f"random-{rank:05d}.json", GO_ON_FROM_OLDER)
    restore_random_state(load_tensors(folder / f"random-{rank:05d}.safetensors"), values)


# --- files


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file or say which file is missing or broken."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {GO_ON_FROM_OLDER}") from error


def check_settings(
    folder: Path, stored: Mapping[str, Any], current: Mapping[str, Any], added: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """UserError, which names them, if a checkpoint's settings differ from the run's: they would give other weights.

    added: of settings that earlier versions did not store, what they did, by dotted name.
    """
    old, new = _flat(stored), _flat(json.loads(json.dumps(current)))
    old = {name: value for name, value in added.items() if name in new} | old
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k, _ABSENT) != new.get(k, _ABSENT))
    if changed:
        listed = "; ".join(_change(k, old.get(k, _ABSENT), new.get(k, _ABSENT)) for k in changed[:5])
        more = f" (and {len(changed) - 5} more)" if len(changed) > 5 else ""
        raise UserError(
            f"{folder} was made under other settings: {listed}{more}; "
            "give the old settings back to go on, or choose another output_dir to start anew"
        )


_ABSENT = "absent"
_HASH = re.compile(r"[0-9a-f]{64}")


def _change(name: str, old: object, new: object) -> str:
    """How a setting differs, in words; those that are hashes say nothing to a reader."""
    hashed = [isinstance(value, str) and _HASH.fullmatch(value) is not None for value in (old, new)]
    if all(hashed):
        return f"another {name.rpartition('.')[2].replace('_', ' ')}"
    was, now = ("given" if h else value for h, value in zip(hashed, (old, new), strict=True))
    return f"{name} was {was}, is now {now}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in _deciding(values).items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _deciding(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same settings; of an optimiser that is AdamW, without Muon's, which leave the weights alone.

    A checkpoint that does not say which optimiser made it is of AdamW: there was no other.
    """
    if not {"learning_rate", "betas"} <= values.keys():
        return values
    values = {"kind": "adamw", **values}
    idle = ("matrix_learning_rate", "momentum") if values["kind"] == "adamw" else ()
    return {key: value for key, value in values.items() if key not in idle}


def save_batch(path: Path, batches: list[Any], report: Mapping[str, Any]) -> None:
    """Keep batches for inspection: tensors in `path`, all else and `report` in a .json beside it."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = dict(report)

    def visit(name: str, item: Any) -> None:
        if isinstance(item, Tensor):
            tensors[name] = item
        elif isinstance(item, Mapping):
            for key, value in item.items():
                visit(f"{name}.{key}", value)
        elif isinstance(item, (list, tuple)) and any(isinstance(v, (Tensor, Mapping)) for v in item):
            for number, value in enumerate(item):
                visit(f"{name}.{number}", value)
        else:
            values[name] = item

    for micro, batch in enumerate(batches):
        visit(f"micro{micro}", batch)
    save_state(tensors, path)
    write_json(path.with_suffix(".json"), values, default=repr)
