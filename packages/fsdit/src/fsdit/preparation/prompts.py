"""Prompt embeddings on disk, so that the text encoder, the largest model, is loaded for new prompts alone.

An entry's name is a hash of what decides it: the cleaned prompt, text_len, and the encoder's and tokenizer's
fingerprint. It holds the used rows, `L D`. Several processes may share a folder: entries appear whole, and
two processes that make the same entry write the same values.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

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


class PromptRows(NamedTuple):
    """A prompt's embedding without its padding, `L D`, and how many of its tokens did not fit."""

    rows: Tensor
    dropped: int


class PromptCache:
    """The embeddings of `text_len` rows of prompts, by the encoder with a `text_encoder_fingerprint`, in a folder."""

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str, text_len: int) -> None:
        self.folder, self.fingerprint, self.text_len = Path(folder), fingerprint, text_len

    def key(self, prompt: str) -> str:
        """64 hexadecimal digits that stand for the prompt's embedding."""
        return hashlib.sha256(json.dumps([clean_prompt(prompt), self.text_len, self.fingerprint]).encode()).hexdigest()

    def path(self, prompt: str) -> Path:
        """The entry's file."""
        key = self.key(prompt)
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, prompt: str) -> PromptRows | None:
        """The entry; None if there is none or it is damaged."""
        path = self.path(prompt)
        try:
            with safe_open(path, framework="pt") as file:
                rows = file.get_tensor("text").clone()  # the file may be replaced while the tensor is in use
                about = json.loads((file.metadata() or {})["entry"])
            if about["sha256"] != tensor_fingerprint(rows) or about["key"] != path.stem:
                return None
            return PromptRows(rows, int(about["dropped"]))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return None

    def fill(self, prompts: Sequence[str], load: Callable[[], TextEncoder], device: str | torch.device = "cpu") -> int:
        """Make the entries that are missing or damaged; returns how many. UserError if one cannot be written.

        Each prompt is encoded by itself, so that an entry does not depend on those made with it. If an entry is
        missing, `load` gives the encoder, which has the cache's fingerprint and text_len; it is freed again.
        """
        missing = [prompt for prompt in {self.key(p): p for p in prompts}.values() if self.get(prompt) is None]
        if missing:
            with loaded(load, device) as encoder, torch.inference_mode():
                for prompt in tqdm(missing, desc="encoding prompts", unit="prompt", delay=2):
                    encoding = encoder([prompt])
                    self._put(prompt, encoding.embeddings[0, : encoding.tokens[0]].cpu(), encoding.dropped[0])
        return len(missing)

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

    def _put(self, prompt: str, rows: Tensor, dropped: int) -> None:
        path = self.path(prompt)
        about = {
            "key": path.stem,
            "sha256": tensor_fingerprint(rows),
            "dropped": dropped,
            "prompt": clean_prompt(prompt),
            "text_len": self.text_len,
            "encoder": self.fingerprint,
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                save_file({"text": rows.contiguous()}, temporary, metadata={"entry": json.dumps(about)})
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot write {path} ({error}); make room, or give another place") from error
