"""A cache of encoded clips on disk.

    cache.json               what it was made of and by (`Header`)
    empty.safetensors        "text", the embedding of the empty prompt
    shard-00000.safetensors  "latents.N" c t h w and "image.N" M D' of the samples N, "text.KEY" L D of their captions;
                             of pairs "low.N" c t h/2 w/2 as well; without encoders only "frame.N" 3 S S beside them
    shard-00000.json         the shard's size and hash, its samples, and files that could not be read

A shard's .json is written last: where there is one, the shard is finished. Of a text embedding only the used rows are
kept, once a shard for each caption. Every file is written whole or not at all. The same settings give the same bytes,
in whatever order, by however many processes, and however often these were stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fsae.errors import CheckpointError, UserError
from fsae.storage.columns import Table
from fsae.storage.files import atomic_path, read_json, write_json

VERSION = 1
_HEADER, _EMPTY = "cache.json", "empty.safetensors"

# What another cache may differ in, and what to give so that it does not.
PARTS = {
    "autoencoder": "autoencoder",
    "text_encoder": "text encoder",
    "image_encoder": "image encoder",
    "data": "data",
    "buckets": "buckets",
    "clips": "sources or clip settings",
    "text_len": "text_len",
    "pairs": "setting of pairs",
    "image_size": "image_size",
    "latents": "precision of the latents",
    "clips_per_file": "clips_per_file",
    "shard_size": "shard_size",
    "seed": "seed",
    "samples": "number of samples",
    "version": "version of this format",
}


@dataclass(frozen=True)
class Header:
    """What a cache was made of and by.

    Attributes:
        autoencoder: `fsae.transcoding.fingerprints.encoder_fingerprint` of the autoencoder.
        text_encoder: `fsdit.conditioning.pretrained.folder_fingerprint` of the text encoder and its tokenizer; empty
            where captions and first frames are kept in place of embeddings.
        image_encoder: The same of the image encoder.
        clips: The fields of ClipsConfig.
        buckets: Of each, frames, size, batch_size, share and the sources' weights.
        data: Hash of the list of samples.
        samples: Their number, unreadable ones included.
        shard_size: Samples in a shard.
        clips_per_file: Clips of each file.
        latents: "fp16" or "fp32".
        text_len: The most rows of a text embedding.
        seed: Of the places where clips start.
        pairs: Whether each clip has the latents of its half-size copy.
        image_size: Side of the first frames; 0 where there are embeddings.
        version: Of this format.
    """

    autoencoder: str
    text_encoder: str
    image_encoder: str
    clips: dict[str, Any]
    buckets: list[dict[str, Any]]
    data: str
    samples: int
    shard_size: int
    clips_per_file: int
    latents: str
    text_len: int
    seed: int
    pairs: bool = False
    image_size: int = 0
    version: int = VERSION

    def names(self, number: int, text: str) -> dict[str, str]:
        """What a sample holds, and by which name its shard has it; arguments as in `SampleRecord`."""
        whole = f"latents.{number}"
        latents = {"low": f"low.{number}", "high": whole} if self.pairs else {"latents": whole}
        if not self.text_encoder:
            return {**latents, "image": f"frame.{number}"}
        return {**latents, "text": f"text.{text}", "image_embedding": f"image.{number}"}

    @property
    def shards(self) -> int:
        """Their number."""
        return -(-self.samples // self.shard_size)

    def differences(self, other: Header) -> list[str]:
        """What another header differs in, in words."""
        own, its = (json.loads(json.dumps(asdict(header))) for header in (self, other))
        return [words for name, words in PARTS.items() if own[name] != its[name]]


@dataclass(frozen=True)
class SampleRecord:
    """What is known of a cached clip.

    Attributes:
        number: N of its tensors' names.
        bucket: Of the header's buckets.
        source: Of the header's sources.
        path: The file, or tar and member.
        start: When the clip's first frame begins in the file, in seconds.
        end: When its last frame begins.
        caption: As the source gives it.
        text: KEY of its embedding's name; empty without encoders.
        shape: (c, t, h, w) of the latents, of pairs the high ones.
    """

    number: int
    bucket: int
    source: int
    path: str
    start: float
    end: float
    caption: str
    text: str
    shape: tuple[int, int, int, int]


_COLUMNS = {"number": np.int64, "bucket": np.int32, "source": np.int32, "path": str, "start": float, "end": float}
_COLUMNS |= {"caption": str, "text": str, "shape": np.int32}


class SampleRecords(Sequence[SampleRecord]):
    """The samples of shards as columns, each a `SampleRecord` when it is asked for.

    Args:
        shards: Their samples.
    """

    def __init__(self, shards: Iterable[Sequence[SampleRecord]]) -> None:
        empty = Table.of([], _COLUMNS)
        empty.numbers["shape"] = empty.numbers["shape"].reshape(0, 4)
        tables = [Table.of([tuple(vars(sample).values()) for sample in samples], _COLUMNS) for samples in shards]
        self.columns = Table.join([empty, *(table for table in tables if len(table))])

    def __len__(self) -> int:
        return len(self.columns)

    def __getitem__(self, index: int) -> SampleRecord:  # type: ignore[override]
        values = {name: self.columns.value(name, range(len(self))[index]) for name in _COLUMNS}
        return SampleRecord(**{**values, "shape": tuple(values["shape"])})


@dataclass(frozen=True)
class Shard:
    """What shard-00000.json says: the size in bytes and SHA-256 of the tensors' file, its samples, and for each file
    that could not be read its name and why."""

    size: int
    sha256: str
    samples: list[SampleRecord]
    skipped: list[tuple[str, str]]


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard's tensors."""
    return folder / f"shard-{number:05}.safetensors"


# --- writing


def check_place(folder: Path) -> None:
    """UserError if a folder holds other things than a cache; hidden files are not looked at."""
    if (folder / _HEADER).exists() or not folder.is_dir():
        return
    other = next((path.name for path in sorted(folder.iterdir()) if not path.name.startswith(".")), None)
    # Another process may have begun the cache in the meantime, of which the header is the first file.
    if other is not None and not (folder / _HEADER).exists():
        raise UserError(f"{folder} is no cache but holds {other}; give a new or empty folder for the cache")


def begin(folder: Path, header: Header) -> None:
    """Write the header; UserError if the folder holds a cache with another one, or cannot be written."""
    if (folder / _HEADER).exists():
        different = read_header(folder).differences(header)
        if different:
            raise UserError(
                f"{folder} is a cache that differs in its {' and '.join(different)}; give what it was made with, or "
                "another output for a new cache"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / _HEADER, asdict(header))


def write_empty(folder: Path, text: Tensor) -> None:
    """Write the embedding of the empty prompt, `L D`."""
    _write_tensors(folder / _EMPTY, {"text": text})


def write_shard(
    folder: Path,
    number: int,
    tensors: Mapping[str, Tensor],
    samples: list[SampleRecord],
    skipped: list[tuple[str, str]],
) -> None:
    """Write a shard, and then that it is finished."""
    path = shard_path(folder, number)
    _write_tensors(path, tensors)
    _write_json(path.with_suffix(".json"), asdict(Shard(path.stat().st_size, _sha256(path), samples, skipped)))


def finished_shard(folder: Path, number: int, verify: bool = False) -> Shard | None:
    """What a shard holds; None if it is not there or not whole, by its size, with `verify` by its hash."""
    try:
        shard = read_shard(folder, number)
    except UserError:
        return None
    return None if verify and _sha256(shard_path(folder, number)) != shard.sha256 else shard


def remove_remains(folder: Path, number: int) -> None:
    """Remove what a killed process left of the files of one shard."""
    for path in folder.glob(f".{shard_path(folder, number).stem}.tmp-*"):
        path.unlink(missing_ok=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with atomic_path(path) as temporary:
        try:
            # One key of metadata: several would come in an order that changes from run to run.
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"format": "pt"})
        except (SafetensorError, OSError) as error:
            raise _no_room(path, error) from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        write_json(path, content)
    except OSError as error:
        raise _no_room(path, error) from error


def _no_room(path: Path, error: Exception) -> UserError:
    return UserError(f"cannot write {path} ({error}); make room and run again: what is finished stays")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading


def is_cache(folder: str) -> bool:
    """Whether this is the folder of a cache, finished or not."""
    return Path(folder, _HEADER).is_file()


def read_header(folder: Path) -> Header:
    """What cache.json says; CheckpointError if there is none, or it is damaged, UserError if it is of another
    version."""
    if not (folder / _HEADER).is_file():
        raise CheckpointError(f"{folder} is no cache of clips: it has no {_HEADER}; give a folder 'fsdit cache' made")
    content = read_json(folder / _HEADER)
    if content.get("version") != VERSION:
        raise UserError(f"{folder} is a cache of version {content.get('version')}, not {VERSION}; make it anew")
    try:
        return Header(**content)
    except TypeError as error:
        raise CheckpointError(f"{folder / _HEADER} is damaged ({error}); make the cache anew") from None


def read_shard(folder: Path, number: int) -> Shard:
    """What a shard holds; CheckpointError if it, or its list, is not finished, missing, cut short or damaged."""
    path = shard_path(folder, number)
    again = "run the same 'fsdit cache' again, which makes it anew"
    if not path.with_suffix(".json").is_file():
        raise CheckpointError(f"{folder} is not finished: it lacks {path.stem}; run the same 'fsdit cache' again")
    content = read_json(path.with_suffix(".json"))
    try:
        samples = [SampleRecord(**{**row, "shape": tuple(row["shape"])}) for row in content["samples"]]
        skipped = [(str(name), str(reason)) for name, reason in content["skipped"]]
        shard = Shard(int(content["size"]), str(content["sha256"]), samples, skipped)
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path.with_suffix('.json')} is damaged ({error!r}); remove it, and {again}") from None
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {again}")
    if (size := path.stat().st_size) != shard.size:
        raise CheckpointError(f"{path} is cut short or changed: it has {size} bytes, not {shard.size}; {again}")
    return shard


def read_empty(folder: Path) -> Tensor:
    """The embedding of the empty prompt, `L D`."""
    try:
        with safe_open(folder / _EMPTY, framework="pt") as file:
            text: Tensor = file.get_tensor("text")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{folder / _EMPTY} cannot be read ({error}); run the same 'fsdit cache' again, which makes it anew"
        ) from None
    return text.to(torch.float32)
