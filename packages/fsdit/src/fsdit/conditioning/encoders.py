"""UMT5 encodes the prompt, CLIP the first frame; the transformer attends to both (paper §2.3.1).

Shapes: text embeddings `B L text_dim` (L = text_len), image embeddings `B M image_dim` (M patches and the class
token), images `B 3 H W` in [-1, 1].
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clean_prompt(prompt: str) -> str:
    """Wan2.1's cleaning: repair broken Unicode, unescape HTML twice, collapse white space."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


@dataclass(frozen=True)
class TextEncoding:
    """Embeddings `B text_len text_dim`; per prompt, the tokens that were used and those that did not fit."""

    embeddings: Tensor
    tokens: tuple[int, ...]
    dropped: tuple[int, ...]


def pad_text(rows: Sequence[Tensor], text_len: int) -> Tensor:
    """Used rows `L D` of B prompts -> `B text_len D`, zeros behind them."""
    return torch.stack([F.pad(text, (0, 0, 0, text_len - len(text))) for text in rows])


class TextEncoder(nn.Module):
    """Prompts to text embeddings by a transformers encoder (UMT5).

    Args:
        model: called with `input_ids` and `attention_mask`; its `last_hidden_state` is used.
        tokenizer: a transformers tokenizer whose sequences end with `eos_token_id`.
        text_len: rows to return. Shorter prompts are continued with zeros *behind* the encoder; of longer ones the
            first `text_len - 1` tokens and the end token are kept, and the rest is counted in `dropped`.
    """

    model: Any

    def __init__(self, model: nn.Module, tokenizer: Any, text_len: int) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.text_len = text_len

    def tokenize(self, prompt: str) -> tuple[list[int], int]:
        """At most text_len token ids of the cleaned prompt, and how many more there would have been."""
        ids = self.tokenizer(clean_prompt(prompt), verbose=False)["input_ids"]
        dropped = max(0, len(ids) - self.text_len)
        return ([*ids[: self.text_len - 1], ids[-1]], dropped) if dropped else (ids, 0)

    def forward(self, prompts: Sequence[str], multiple: int = 1) -> TextEncoding:
        """Encode `B` prompts; differentiable with respect to the model's weights. A `ValueError` for no prompt, or a
        bare string, each letter of which would be taken for a prompt.

        The model sees them padded to a multiple of `multiple` tokens, so that batches can have few shapes.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"{prompts!r} given; give a list of prompts, a single one as [prompt]")
        ids, dropped = zip(*(self.tokenize(prompt) for prompt in prompts), strict=True)
        lengths = tuple(len(sequence) for sequence in ids)
        device = next(self.model.parameters()).device
        width = min(self.text_len, -(-max(lengths) // multiple) * multiple)
        input_ids = torch.zeros(len(ids), width, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for row, sequence in enumerate(ids):
            input_ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        input_ids, mask = input_ids.to(device), mask.to(device)
        hidden = self.model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        hidden = torch.where(mask.bool().unsqueeze(-1), hidden, 0)
        return TextEncoding(F.pad(hidden, (0, 0, 0, self.text_len - width)), lengths, dropped)


def resize_for_clip(images: Tensor, size: int) -> Tensor:
    """`B 3 H W` -> `B 3 size size` straight, without a crop: bicubic, no antialiasing (Wan2.1); float32.

    Images that have this size already are returned as they are, so that resizing early, for a cache, changes nothing.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images B 3 H W, got {tuple(images.shape)}; of a video, give one frame: [:, :, 0]")
    if images.shape[-2:] == (size, size):
        return images.float()
    return F.interpolate(images.float(), size=(size, size), mode="bicubic", align_corners=False)


class ImageEncoder(nn.Module):
    """Images to CLIP patch features: the state before the last block, with class token, without the final norm.

    `model` is a transformers `CLIPVisionModel`; frames of any size are resized to its square by `resize_for_clip`.
    """

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def pixel_values(self, images: Tensor) -> Tensor:
        """`B 3 H W` in [-1, 1] -> `B 3 image_size image_size`, normalised for CLIP; float32."""
        resized = resize_for_clip(images, self.model.config.image_size)
        mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in (CLIP_MEAN, CLIP_STD))
        return (resized * 0.5 + 0.5 - mean) / std

    def forward(self, images: Tensor) -> Tensor:
        """`B 3 H W` in [-1, 1] -> `B M image_dim`; differentiable."""
        pixels = self.pixel_values(images).to(next(self.model.parameters()).dtype)
        return self.model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]

    def unused_parameters(self) -> list[nn.Parameter]:
        """Weights behind the state that is read: no gradient ever reaches them."""
        tower = getattr(self.model, "vision_model", self.model)
        return [*tower.encoder.layers[-1].parameters(), *tower.post_layernorm.parameters()]


class Encoders(NamedTuple):
    """What makes a context of captions and first frames; the two are kept, read and trained together."""

    text: TextEncoder
    image: ImageEncoder
