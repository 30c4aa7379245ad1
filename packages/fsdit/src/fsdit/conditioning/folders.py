"""Encoders loaded from the folder of saved ones, or made anew as nano ones; fingerprints to tell them apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from fsae.errors import UserError
from fsdit.conditioning.encoders import Encoders, ImageEncoder, TextEncoder
from fsdit.conditioning.nano import nano_tokenizer, new_image_encoder, new_text_encoder
from fsdit.conditioning.pretrained import folder_fingerprint, load_encoder, load_tokenizer

Module = TypeVar("Module", bound=nn.Module)


def load_encoders(source: str | Path, text_len: int) -> Encoders:
    """The text and image encoder; see `load_text_encoder` and `load_image_encoder`."""
    return Encoders(load_text_encoder(source, text_len), load_image_encoder(source))


def load_text_encoder(source: str | Path, text_len: int) -> TextEncoder:
    """The text encoder of "nano", a new one, or of a folder with text_encoder and tokenizer in it.

    `text_len` are the rows of the text embeddings, the transformer's.

    Raises:
        UserError: there is no such folder.
        CheckpointError: a part of it is missing, broken, or does not fit its class.
    """
    if str(source) == "nano":
        return TextEncoder(new_text_encoder(), nano_tokenizer(), text_len)
    from transformers import UMT5EncoderModel

    folder = _encoders_folder(source)
    return TextEncoder(
        load_encoder(UMT5EncoderModel, folder / "text_encoder"), load_tokenizer(folder / "tokenizer"), text_len
    )


def load_image_encoder(source: str | Path) -> ImageEncoder:
    """The image encoder of "nano" or of a folder with image_encoder in it; errors are those of `load_text_encoder`."""
    if str(source) == "nano":
        return ImageEncoder(new_image_encoder())
    from transformers import CLIPVisionModel

    return ImageEncoder(load_encoder(CLIPVisionModel, _encoders_folder(source) / "image_encoder"))


def text_encoder_fingerprint(source: str | Path) -> str:
    """A hash of what decides the text embeddings: the encoder's configuration and weights, and the tokenizer."""
    folder = _encoders_folder(source, or_nano=False)
    return folder_fingerprint(folder / "text_encoder", folder / "tokenizer")


def image_encoder_fingerprint(source: str | Path) -> str:
    """A hash of what decides the image embeddings: the encoder's configuration and weights."""
    return folder_fingerprint(_encoders_folder(source, or_nano=False) / "image_encoder")


def _encoders_folder(source: str | Path, or_nano: bool = True) -> Path:
    """The folder; `or_nano` says whether "nano" would have been accepted as well."""
    if not Path(source).is_dir():
        what = 'neither "nano" nor a folder; give one of them' if or_nano else "no folder; give that of saved encoders"
        raise UserError(f"encoders {str(source)!r} is {what}")
    return Path(source)


@contextmanager
def loaded(load: Callable[[], Module], device: str | torch.device = "cpu") -> Iterator[Module]:
    """A context in which a model is loaded, in eval mode, on its device; on leaving, its memory is freed.

    Its weights are gone then even where the model is still referred to, so that it can no longer be called.
    """
    module = load().to(device).eval()
    try:
        yield module
    finally:
        module.to("meta")
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
