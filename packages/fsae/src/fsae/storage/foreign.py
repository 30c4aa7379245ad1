"""Checkpoints of other models on their way into ours: opened by their headers, read tensor by tensor, reported on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fsae.errors import CheckpointError
from fsae.storage.checkpoint import Shapes, folder_shapes, local_folder, tensor_shapes
from fsae.storage.files import read_json

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types that weights are carried over in, by their names in safetensors' headers; others are quantised."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that is open: its names and shapes now, its tensors one by one.

    Attributes:
        label: what errors call it.
        shapes: of all its tensors.
        dtypes: of all its tensors, floats as in `FLOATS`.
        read: a tensor by its name.
        config: what its config.json says; empty where there is none.
    """

    label: str
    shapes: Shapes
    dtypes: Mapping[str, str]
    read: Callable[[str], Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)

    def float_dtype(self) -> torch.dtype:
        """The type of most of its parameters; CheckpointError if a tensor is not float32 or the like."""
        counts: Counter[str] = Counter()
        for name, dtype in self.dtypes.items():
            if dtype not in FLOATS:
                raise CheckpointError(
                    f"{self.label} holds {name!r} as {dtype}; give the checkpoint with float weights "
                    "(fp32, bf16 or fp16), not quantised"
                )
            counts[dtype] += prod(self.shapes[name])
        return FLOATS[max(counts, key=lambda dtype: counts[dtype])]


def open_source(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    model: str = "the model",
    components: tuple[str, ...] = (),
    single: str | None = None,
    subfolder: str | None = None,
) -> Source:
    """Open a folder, a .safetensors file, a name on the Hub or a state dict; only headers are read.

    Args:
        source: as said.
        model: what it is to be, for errors: "its autoencoder".
        components: names that such a model has in the folder of a pipeline.
        single: a file that holds all weights, in folders that are not diffusers'.
        subfolder: of the folder or of the repository on the Hub, where the model lies in one.

    Raises:
        CheckpointError: there is nothing of that name, or a file is missing, cut short or no safetensors file.
    """
    if isinstance(source, Mapping):
        shapes = {name: tuple(tensor.shape) for name, tensor in source.items()}
        codes = {dtype: code for code, dtype in FLOATS.items()}
        dtypes = {name: codes.get(tensor.dtype, str(tensor.dtype)) for name, tensor in source.items()}
        return Source("the state dict", shapes, dtypes, source.__getitem__)
    if os.path.isfile(source):
        _refuse_pickle(Path(source))
        shapes = tensor_shapes(source)
        return _open_files(os.fspath(source), shapes, dict.fromkeys(shapes, Path(source)), {})
    folder = local_folder(source, subfolder, {}) / (subfolder or "")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if single is not None and (folder / single).is_file():
        shapes = tensor_shapes(folder / single)
        return _open_files(str(folder), shapes, dict.fromkeys(shapes, folder / single), config)
    if not any(folder.glob("diffusion_pytorch_model*.safetensors*")):
        raise CheckpointError(_nothing_in(folder, model, components, single))
    leading, shapes = folder_shapes(folder, None)
    shards = read_json(leading)["weight_map"] if leading.suffix == ".json" else dict.fromkeys(shapes, leading.name)
    return _open_files(str(folder), shapes, {name: folder / shard for name, shard in shards.items()}, config)


def _open_files(label: str, shapes: Shapes, files: Mapping[str, Path], config: Mapping[str, Any]) -> Source:
    def read(name: str) -> Tensor:
        with safe_open(files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    return Source(label, shapes, _dtypes(files.values()), read, config)


def _dtypes(files: Iterable[Path]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in dict.fromkeys(files):
        with safe_open(path, framework="np") as file:
            found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found


def _nothing_in(folder: Path, model: str, components: tuple[str, ...], single: str | None) -> str:
    hint = "give a folder with diffusion_pytorch_model.safetensors" + (f" or {single}" if single else "")
    for name in components:
        if (folder / name / "config.json").is_file():
            return f"{folder} is a pipeline's folder; give {model}, {folder / name}"
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickles:
        return f"{folder} holds its weights in {pickles[0]}, which is no safetensors file; {hint}"
    return f"{folder} holds no weights; {hint}"


def _refuse_pickle(path: Path) -> None:
    """torch.save writes a zip archive, or, long ago, a bare pickle."""
    with open(path, "rb") as file:
        start = file.read(2)
    if start in (b"PK", b"\x80\x02", b"\x80\x04"):
        raise CheckpointError(
            f"{path} is a pickle, which can run code as it is read; give the model's .safetensors file or its folder"
        )


@dataclass(frozen=True)
class Report:
    """What a conversion did: the parameters of each tensor, by the name it has where it is.

    Attributes:
        carried: what the given model or checkpoint holds and the result has, by the given one's names.
        dropped: what the given one holds and the result has not, by the given one's names.
        new: what only the result has, by its own names.
        parts: prefixes of names; each has its own columns in the table. Without any, all names share one pair.
    """

    carried: Mapping[str, int]
    dropped: Mapping[str, int]
    new: Mapping[str, int]
    parts: tuple[str, ...] = ("encoder", "decoder")

    @classmethod
    def compare(cls, given: nn.Module, result: nn.Module) -> Report:
        """Two models that name their tensors alike; of a sliced tensor a part is carried over and a part dropped."""
        before = {name: tensor.numel() for name, tensor in given.state_dict().items()}
        after = {name: tensor.numel() for name, tensor in result.state_dict().items()}
        carried = {name: min(count, after[name]) for name, count in before.items() if name in after}
        left = {name: count - carried.get(name, 0) for name, count in before.items()}
        return cls(
            carried=carried,
            dropped={name: count for name, count in left.items() if count},
            new={name: count for name, count in after.items() if name not in before},
        )

    def parameters(self, kind: str, part: str = "") -> int:
        """Parameters that are "carried", "dropped" or "new", in all or in one part."""
        return sum(count for name, count in getattr(self, kind).items() if name.startswith(part))

    def tensors(self, kind: str, part: str = "") -> int:
        """Tensors, as `parameters` has it."""
        return sum(name.startswith(part) for name in getattr(self, kind))

    def __str__(self) -> str:
        parts = self.parts or ("",)
        lines = ["".join([f"{'':12}", *(f"{f'{part} tensors':>18}{'parameters':>16}" for part in parts)])]
        for kind, label in (("carried", "carried over"), ("dropped", "dropped"), ("new", "new")):
            cells = (f"{self.tensors(kind, part):>18,}{self.parameters(kind, part):>16,}" for part in parts)
            lines.append("".join([f"{label:12}", *cells]))
        return "\n".join(lines)
