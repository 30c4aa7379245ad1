"""What steers the transformer: prompt, image and known latents (paper §2.3.1; Wan2.1's encoders).

Shapes: text embeddings ``B L text_dim`` (L = text_len), image embeddings ``B M image_dim`` (M patches and the class
token), images ``B 3 H W`` in [-1, 1], latents ``B C t h w``, masks ``B mask_channels t h w``.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsae.errors import UserError
from fsdit.encoders import folder_fingerprint, load_encoder, load_tokenizer

Module = TypeVar("Module", bound=nn.Module)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Context:
    """What cross-attention sees: text ``B L D``, image ``B M D'`` and, for guidance, the negative text ``B L D``."""

    text: Tensor
    image: Tensor | None = None
    negative: Tensor | None = None


@dataclass(frozen=True)
class Condition:
    """Known latents ``B C t h w``, zero where nothing is known, and the trust in them, ``B mask_channels t h w``."""

    latents: Tensor
    mask: Tensor


def first_frame_condition(first_latent: Tensor, t: int, mask_channels: int = 4) -> Condition:
    """The image-to-video condition: the first latent is known, the others are zero and masked out.

    Args:
        first_latent: ``B C 1 h w``.
        t: latent frames of the clip.
        mask_channels: all carry the same value; four, as in Wan2.1, one for each video frame of a latent.
    """
    if first_latent.ndim != 5 or first_latent.shape[2] != 1 or t < 1:
        raise ValueError(f"expected a first latent B C 1 h w and t >= 1, got {tuple(first_latent.shape)} and t = {t}")
    batch, _, _, h, w = first_latent.shape
    latents = F.pad(first_latent, (0, 0, 0, 0, 0, t - 1))
    mask = first_latent.new_zeros(batch, mask_channels, t, h, w)
    mask[:, :, 0] = 1
    return Condition(latents, mask)


def nothing_known(latents: Tensor, mask_channels: int = 4) -> Condition:
    """The condition of clips ``B C t h w`` that are made of the prompt alone: zeros, and no trust in them."""
    batch, _, *grid = latents.shape
    return Condition(torch.zeros_like(latents), latents.new_zeros(batch, mask_channels, *grid))


def training_condition(latents: Tensor, mask_channels: int = 4) -> Condition:
    """The condition that clean clips ``B C t h w`` are learned under: their first latent is known.

    Of a single frame nothing is: its first latent is all of it, so that the model would be shown what it is to find.
    """
    if latents.shape[2] == 1:
        return nothing_known(latents, mask_channels)
    return first_frame_condition(latents[:, :, :1], latents.shape[2], mask_channels)


def hidden(features: Tensor) -> Tensor:
    """Zeros in the place of image features ``B M image_dim``; what made them gets gradients, which are zero.

    Several processes wait for the gradient of every trained weight.
    """
    return features.masked_fill(torch.ones_like(features, dtype=torch.bool), 0)


def model_input(noisy: Tensor, condition: Condition) -> Tensor:
    """noise ‖ mask ‖ condition on the channel axis: ``B (C + mask_channels + C) t h w``.

    Raises:
        ValueError: they differ in batch, length or size.
    """
    for given in (condition.mask, condition.latents):
        if (len(given), *given.shape[2:]) != (len(noisy), *noisy.shape[2:]):
            raise ValueError(f"latents {tuple(noisy.shape)} with a condition {tuple(given.shape)}; only C may differ")
    mask, known = condition.mask.to(noisy), condition.latents.to(noisy)
    return torch.cat((noisy, mask, known), dim=1)


def clean_prompt(prompt: str) -> str:
    """Wan2.1's cleaning: repair broken Unicode, unescape HTML twice, collapse white space."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


@dataclass(frozen=True)
class TextEncoding:
    """Embeddings ``B text_len text_dim``; per prompt, the tokens that were used and those that did not fit."""

    embeddings: Tensor
    tokens: tuple[int, ...]
    dropped: tuple[int, ...]


def pad_text(rows: Sequence[Tensor], text_len: int) -> Tensor:
    """Used rows ``L D`` of B prompts -> ``B text_len D``, zeros behind them."""
    return torch.stack([F.pad(text, (0, 0, 0, text_len - len(text))) for text in rows])


class TextEncoder(nn.Module):
    """Prompts to text embeddings by a transformers encoder (UMT5).

    Args:
        model: called with ``input_ids`` and ``attention_mask``; its ``last_hidden_state`` is used.
        tokenizer: a transformers tokenizer whose sequences end with ``eos_token_id``.
        text_len: rows to return. Shorter prompts are continued with zeros *behind* the encoder; of longer ones the
            first ``text_len - 1`` tokens and the end token are kept, and the rest is counted in ``dropped``.
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

    def forward(self, prompts: Sequence[str]) -> TextEncoding:
        """Encode ``B`` prompts; differentiable with respect to the model's weights.

        Raises:
            ValueError: no prompt, or one that stands in no list, whose letters would be taken for prompts.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"{prompts!r} given; give a list of prompts, a single one as [prompt]")
        ids, dropped = zip(*(self.tokenize(prompt) for prompt in prompts), strict=True)
        lengths = tuple(len(sequence) for sequence in ids)
        device = next(self.model.parameters()).device
        input_ids = torch.zeros(len(ids), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for row, sequence in enumerate(ids):
            input_ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        input_ids, mask = input_ids.to(device), mask.to(device)
        hidden = self.model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        hidden = torch.where(mask.bool().unsqueeze(-1), hidden, 0)
        return TextEncoding(F.pad(hidden, (0, 0, 0, self.text_len - max(lengths))), lengths, dropped)


def resize_for_clip(images: Tensor, size: int) -> Tensor:
    """``B 3 H W`` -> ``B 3 size size`` straight, without a crop: bicubic, no antialiasing (Wan2.1); float32.

    Images that have this size already are returned as they are, so that resizing early, for a cache, changes nothing.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images B 3 H W, got {tuple(images.shape)}; of a video, give one frame: [:, :, 0]")
    if images.shape[-2:] == (size, size):
        return images.float()
    return F.interpolate(images.float(), size=(size, size), mode="bicubic", align_corners=False)


class ImageEncoder(nn.Module):
    """Images to CLIP patch features: the state before the last block, with class token, without the final norm.

    Frames of any size are taken to the tower's square by `resize_for_clip`.

    Args:
        model: a transformers ``CLIPVisionModel``.
    """

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def pixel_values(self, images: Tensor) -> Tensor:
        """``B 3 H W`` in [-1, 1] -> ``B 3 image_size image_size``, normalised for CLIP; float32."""
        resized = resize_for_clip(images, self.model.config.image_size)
        mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in (CLIP_MEAN, CLIP_STD))
        return (resized * 0.5 + 0.5 - mean) / std

    def forward(self, images: Tensor) -> Tensor:
        """``B 3 H W`` in [-1, 1] -> ``B M image_dim``; differentiable."""
        pixels = self.pixel_values(images).to(next(self.model.parameters()).dtype)
        return self.model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]

    def unused_parameters(self) -> list[nn.Parameter]:
        """Weights behind the state that is read: no gradient ever reaches them."""
        tower = getattr(self.model, "vision_model", self.model)
        return [*tower.encoder.layers[-1].parameters(), *tower.post_layernorm.parameters()]


def nano_tokenizer() -> Any:
    """ByT5's tokenizer: one token a byte, no vocabulary file."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


def nano_text_encoder() -> Any:
    """A UMT5 encoder of 0.4 M parameters over bytes, randomly initialised; width 128, trained with the transformer."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(nano_tokenizer()),
            d_model=128,
            d_kv=32,
            num_heads=4,
            num_layers=2,
            d_ff=256,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def nano_image_encoder() -> Any:
    """A CLIP vision tower of 0.7 M parameters, randomly initialised: 64x64 pixels to 17 tokens of width 128."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=64,
            patch_size=16,
        )
    )


def load_encoders(source: str | Path, text_len: int) -> tuple[TextEncoder, ImageEncoder]:
    """The text and image encoder; see `load_text_encoder` and `load_image_encoder`."""
    return load_text_encoder(source, text_len), load_image_encoder(source)


def load_text_encoder(source: str | Path, text_len: int) -> TextEncoder:
    """The text encoder with its tokenizer.

    Args:
        source: "nano" for a new nano encoder, or a folder with text_encoder and tokenizer in it.
        text_len: rows of the text embeddings, the transformer's ``config.text_len``.

    Raises:
        UserError: there is no such folder.
        CheckpointError: a part of it is missing, broken, or does not fit its class.
    """
    if str(source) == "nano":
        return TextEncoder(nano_text_encoder(), nano_tokenizer(), text_len)
    from transformers import UMT5EncoderModel

    folder = _encoders_folder(source)
    return TextEncoder(
        load_encoder(UMT5EncoderModel, folder / "text_encoder"), load_tokenizer(folder / "tokenizer"), text_len
    )


def load_image_encoder(source: str | Path) -> ImageEncoder:
    """The image encoder; ``source`` is "nano" or a folder with image_encoder in it, errors as `load_text_encoder`."""
    if str(source) == "nano":
        return ImageEncoder(nano_image_encoder())
    from transformers import CLIPVisionModel

    return ImageEncoder(load_encoder(CLIPVisionModel, _encoders_folder(source) / "image_encoder"))


def text_encoder_fingerprint(source: str | Path) -> str:
    """What decides the text embeddings: the encoder's configuration and weights, and the tokenizer; quickly."""
    folder = _encoders_folder(source, or_nano=False)
    return folder_fingerprint(folder / "text_encoder", folder / "tokenizer")


def image_encoder_fingerprint(source: str | Path) -> str:
    """What decides the image embeddings; quickly."""
    return folder_fingerprint(_encoders_folder(source, or_nano=False) / "image_encoder")


def _encoders_folder(source: str | Path, or_nano: bool = True) -> Path:
    """The folder; ``or_nano`` says whether "nano" would have been accepted as well."""
    if not Path(source).is_dir():
        what = 'neither "nano" nor a folder; give one of them' if or_nano else "no folder; give that of saved encoders"
        raise UserError(f"encoders {str(source)!r} is {what}")
    return Path(source)


@contextmanager
def loaded(load: Callable[[], Module], device: str | torch.device = "cpu") -> Iterator[Module]:
    """A model for as long as it is used: loaded, in eval mode, on its device; then its weights are given back.

    They are given back whoever still holds the model, which computes nothing from then on.
    """
    module = load().to(device).eval()
    try:
        yield module
    finally:
        module.to("meta")
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
