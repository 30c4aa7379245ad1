"""Prompt embeddings on disk, so that the text encoder, the largest model, is loaded for new prompts alone.

An entry's key is a hash of what decides it: the cleaned prompt, text_len, and the encoder's and tokenizer's
fingerprint. It holds the used rows, `L D`. Many entries share a file:

    prompts-NAME.safetensors  "rows" N D of all its entries, "ends" where each ends in them, "keys" and "hashes" in
                              bytes, and "dropped", the tokens that did not fit

Several processes may share a folder: files appear whole, and two processes that make the same entry write the same
values. Folders with a file for each entry, KE/KEY.safetensors, as they were made before, are still read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from fsae.errors import UserError
from fsae.storage.files import atomic_path
from fsae.storage.fingerprint import tensor_fingerprint
from fsdit.conditioning.encoders import TextEncoder, TextEncoding, clean_prompt, pad_text
from fsdit.conditioning.folders import loaded

_BATCH, _MULTIPLE = 16, 16  # prompts in a batch; tokens of which its length is a multiple
_IN_A_FILE = 512  # prompts


class PromptRows(NamedTuple):
    """A prompt's embedding without its padding, `L D`, and how many of its tokens did not fit."""

    rows: Tensor
    dropped: int


class PromptCache:
    """The embeddings of `text_len` rows of prompts, by the encoder with a `text_encoder_fingerprint`, in a folder."""

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str, text_len: int) -> None:
        self.folder, self.fingerprint, self.text_len = Path(folder), fingerprint, text_len
        # The first eight bytes of all keys, sorted, and where each entry is: the number of its file and its row.
        self._shards: list[Path] = []
        self._keys, self._places = np.zeros(0, np.uint64), np.zeros((0, 2), np.int32)
        self._find_shards()

    def key(self, prompt: str) -> str:
        """64 hexadecimal digits that stand for the prompt's embedding."""
        return hashlib.sha256(json.dumps([clean_prompt(prompt), self.text_len, self.fingerprint]).encode()).hexdigest()

    def get(self, prompt: str) -> PromptRows | None:
        """The entry; None if there is none or it is damaged."""
        key = bytes.fromhex(self.key(prompt))
        number = np.frombuffer(key[:8], ">u8")[0]
        first, stop = (np.searchsorted(self._keys, number, side) for side in ("left", "right"))
        for shard, row in self._places[first:stop].tolist():
            if (entry := _read(self._shards[shard], row, key)) is not None:
                return entry
        return _read_single(self.folder / key.hex()[:2] / f"{key.hex()}.safetensors")

    def fill(self, prompts: Iterable[str], load: Callable[[], TextEncoder], device: str | torch.device = "cpu") -> int:
        """Make the entries that are missing or damaged; returns how many. UserError if one cannot be written.

        Prompts are encoded in batches of one size, each padded to one of few lengths by its own length alone, so that
        an entry does not depend on those made with it. If an entry is missing, `load` gives the encoder, which has the
        cache's fingerprint and text_len; it is freed again.
        """
        self._find_shards()
        seen: set[bytes] = set()

        def missing() -> Iterator[str]:
            for prompt in prompts:
                key = bytes.fromhex(self.key(prompt))
                if key not in seen:
                    seen.add(key)
                    if self.get(prompt) is None:
                        yield prompt

        made, todo = 0, missing()
        if (first := next(todo, None)) is not None:
            bar = tqdm(desc="encoding prompts", unit=" prompts", delay=2)
            with bar, loaded(load, device) as encoder, torch.inference_mode():
                todo = chain([first], todo)
                while some := list(islice(todo, _IN_A_FILE)):
                    self._write(_encoded(some, encoder))
                    bar.update(len(some))
                    made += len(some)
        self._find_shards()
        return made

    def encode(
        self, prompts: Sequence[str], load: Callable[[], TextEncoder], device: str | torch.device = "cpu"
    ) -> TextEncoding:
        """The embeddings `B text_len D` of B prompts on the CPU, as the encoder gives them; arguments as `fill`."""
        self.fill(prompts, load, device)
        entries = [self.require(prompt) for prompt in prompts]
        embeddings = pad_text([entry.rows for entry in entries], self.text_len)
        lengths = tuple(len(entry.rows) for entry in entries)
        return TextEncoding(embeddings, lengths, tuple(entry.dropped for entry in entries))

    def require(self, prompt: str) -> PromptRows:
        """The entry; UserError if there is none, or it is damaged."""
        entry = self.get(prompt)
        if entry is None:
            raise UserError(
                f"the embedding of the prompt {prompt[:60]!r} is missing or damaged in {self.folder}; run again, which "
                "makes it anew"
            )
        return entry

    def _find_shards(self) -> None:
        """Take in the keys of files that are new, by this process or another."""
        keys, places = [self._keys], [self._places]
        for path in sorted(set(self.folder.glob("prompts-*.safetensors")) - set(self._shards)):
            try:
                with safe_open(path, framework="numpy") as file:
                    table = np.ascontiguousarray(file.get_tensor("keys")[:, :8])
            except (SafetensorError, OSError):
                continue  # what was in it is missing, and made anew
            keys.append(table.view(">u8")[:, 0].astype(np.uint64))
            rows = np.arange(len(table), dtype=np.int32)
            places.append(np.stack([np.full_like(rows, len(self._shards)), rows], 1))
            self._shards.append(path)
        order = np.argsort(joined := np.concatenate(keys), kind="stable")
        self._keys, self._places = joined[order], np.concatenate(places)[order]

    def _write(self, entries: Mapping[str, PromptRows]) -> None:
        rows = [entry.rows for entry in entries.values()]
        keys = [self.key(prompt) for prompt in entries]
        columns = {"keys": keys, "hashes": [tensor_fingerprint(part) for part in rows]}
        tensors = {name: torch.tensor([list(bytes.fromhex(h)) for h in of]).byte() for name, of in columns.items()}
        tensors |= {"rows": torch.cat(rows), "ends": torch.tensor([len(part) for part in rows]).cumsum(0)}
        tensors["dropped"] = torch.tensor([entry.dropped for entry in entries.values()])
        path = self.folder / f"prompts-{hashlib.sha256(''.join(keys).encode()).hexdigest()[:32]}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                save_file(tensors, temporary)
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot write {path} ({error}); make room, or give another place") from error


def _read(path: Path, row: int, key: bytes) -> PromptRows | None:
    """An entry of a file of many, if it is that of the key and whole."""
    try:
        with safe_open(path, framework="pt") as file:
            about = [bytes(file.get_slice(name)[row].tolist()) for name in ("keys", "hashes")]
            ends = [0, *file.get_slice("ends")[max(0, row - 1) : row + 1].tolist()][-2:]
            rows = file.get_slice("rows")[ends[0] : ends[1]].clone()  # the file may be replaced while it is in use
            dropped = int(file.get_slice("dropped")[row])
        return PromptRows(rows, dropped) if about == [key, bytes.fromhex(tensor_fingerprint(rows))] else None
    except (SafetensorError, OSError, IndexError):
        return None


def _read_single(path: Path) -> PromptRows | None:
    """The entry in a file of its own."""
    try:
        with safe_open(path, framework="pt") as file:
            rows = file.get_tensor("text").clone()
            about = json.loads((file.metadata() or {})["entry"])
        whole = about["sha256"] == tensor_fingerprint(rows) and about["key"] == path.stem
        return PromptRows(rows, int(about["dropped"])) if whole else None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


def _encoded(prompts: Sequence[str], encoder: TextEncoder) -> dict[str, PromptRows]:
    """Of each prompt its entry; those of like lengths are encoded together."""
    lengths = [-(-len(encoder.tokenize(prompt)[0]) // _MULTIPLE) for prompt in prompts]
    entries: dict[str, PromptRows] = {}
    for _, group in groupby(sorted(range(len(prompts)), key=lengths.__getitem__), key=lengths.__getitem__):
        while batch := [prompts[number] for number in islice(group, _BATCH)]:
            encoding = encoder([*batch, *batch[:1] * (_BATCH - len(batch))], _MULTIPLE)
            rows = [text[:used].cpu() for text, used in zip(encoding.embeddings, encoding.tokens, strict=True)]
            entries |= dict(zip(batch, map(PromptRows, rows, encoding.dropped), strict=False))
    return entries
