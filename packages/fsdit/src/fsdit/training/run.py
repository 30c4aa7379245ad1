"""A training run of the transformer, from its configuration to the saved folders (paper §2.3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsae import FSAE
from fsae.data.config import SIDE, STRIDE
from fsae.errors import UserError
from fsae.storage.files import check_folder
from fsae.training.loop import TrainingResult, train
from fsae.training.runs import is_main_process, read_samples, report_end, save_parts
from fsae.transcoding.fingerprints import encoder_fingerprint
from fsdit.conditioning.encoders import ImageEncoder, TextEncoder, pad_text
from fsdit.conditioning.folders import load_encoders
from fsdit.model import FSDiT
from fsdit.training.config import TransformerConfig
from fsdit.training.data import CachedLatents, report_missing_captions
from fsdit.training.task import FlowMatchingTask, check_widths


def train_transformer(config: TransformerConfig, dataset: Any = None, validation: Any = None) -> list[Path]:
    """Train an FSDiT and save it in `output_dir/transformer`, with the encoders beside it if they were trained.

    What does not fit is refused before the transformer is built.

    Args:
        config: The training.
        dataset: Samples to train on (`fsdit.training.data`); those that `config` describes if None.
        validation: Held-out samples; those that `config` describes if None.

    Returns:
        The saved folders; none if a signal stopped the run, which then can be resumed.
    """
    loop = config.loop
    check_folder(loop.output_dir)
    outline = _outline(config)
    autoencoder = _autoencoder(config)
    clips = _read_clips(config, outline, autoencoder, dataset, validation)
    torch.manual_seed(loop.seed)
    text_encoder, image_encoder = _encoders(config, outline, clips)
    check_widths(outline, text_encoder, image_encoder, autoencoder)
    transformer = FSDiT.from_preset_or_folder(config.model, **config.model_options)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    task = FlowMatchingTask(
        transformer, text_encoder, image_encoder, config, autoencoder, clips.batch, clips.empty_text
    )
    result = train(task, clips.samples, loop, clips.collate)
    if not report_end(result, loop.max_steps, clips.samples, clips.held_out):
        return []
    return _save(result, text_encoder)


@dataclass(frozen=True)
class _Clips:
    """What to train on, what is held out, and the batch of it to validate on (None if the run never does).

    If there is an embedding of the empty prompt, `L D`, the samples hold embeddings and no encoder is needed.
    """

    samples: Any
    held_out: Any
    batch: Mapping[str, Any] | None
    collate: Callable[[list[Any]], Any] | None = None
    empty_text: Tensor | None = None


def _read_clips(
    config: TransformerConfig, outline: FSDiT, autoencoder: FSAE | None, dataset: Any, validation: Any
) -> _Clips:
    """The clips that `config` describes, or those given."""
    if dataset is None and config.cache:
        dataset = CachedLatents(config.cache)
    if isinstance(dataset, CachedLatents):
        return _read_cache(config, outline, autoencoder, dataset, validation)
    if dataset is None:
        _check_clips(config, autoencoder)
    clips = _Clips(*read_samples(config, dataset, validation))
    if dataset is None and is_main_process():
        report_missing_captions(clips.samples.entries)
    return clips


def _check_clips(config: TransformerConfig, autoencoder: FSAE | None) -> None:
    """Whether clips can come from files, and the autoencoder can take them."""
    if not config.data:
        raise UserError("neither data nor cache is given; give a folder or list of clips, or caches of such")
    if autoencoder is None:
        raise UserError("autoencoder is not given, but the clips of data are encoded as they come; give its folder")
    for shape in config.clips.shapes:
        autoencoder.latent_shape(*shape)


def _read_cache(
    config: TransformerConfig, outline: FSDiT, autoencoder: FSAE | None, cache: CachedLatents, held_out: Any
) -> _Clips:
    """What a cache holds, once it is known to fit the model and the autoencoder."""
    if held_out is None:
        held_out = CachedLatents(config.validation_data) if config.validation_data else cache
    encoder = None if autoencoder is None else encoder_fingerprint(autoencoder)
    for part in (cache, held_out):
        part.check_fits(outline.config)
        if encoder is not None:
            part.check_autoencoder(encoder)
    empty = pad_text([cache.empty_text], cache.text_len)[0]
    batch = _first_of_size(config, held_out) if config.loop.validate_every else None
    return _Clips(cache, held_out, batch, cache.collate, empty)


def _first_of_size(config: TransformerConfig, cache: CachedLatents) -> dict[str, Any]:
    """A batch of the first cached clips of the length and size that are to be validated on."""
    frames, height, width = config.clips.shapes[0]
    wanted = 1 + frames // STRIDE, height // SIDE, width // SIDE
    indices = [index for index, shape in enumerate(cache.shapes) if shape[1:] == wanted]
    if not indices:
        there = sorted({f"{1 + STRIDE * (t - 1)} of {SIDE * w}x{SIDE * h}" for _, t, h, w in cache.shapes})
        raise UserError(
            f"no clip of the cache has {frames} frames of {width}x{height} pixels to validate on; "
            f"set clips.frames, height and width to what it has ({', '.join(there)}), or loop.validate_every to 0"
        )
    return cache.collate([cache[index] for index in indices[: config.validation_samples]])


def _outline(config: TransformerConfig) -> FSDiT:
    """The transformer without its weights."""
    if config.model_options and config.model not in FSDiT.presets:
        names = ", ".join(config.model_options)
        raise UserError(f"model_options {names} cannot change the saved model {config.model}; they are for presets")
    return FSDiT.outline(config.model, **config.model_options)


def _encoders(
    config: TransformerConfig, outline: FSDiT, clips: _Clips
) -> tuple[TextEncoder | None, ImageEncoder | None]:
    """The encoders, if samples do not hold what they give."""
    return (None, None) if clips.empty_text is not None else load_encoders(config.encoders, outline.config.text_len)


def _autoencoder(config: TransformerConfig) -> FSAE | None:
    return FSAE.from_pretrained(config.autoencoder).requires_grad_(False) if config.autoencoder else None


def _save(result: TrainingResult, text_encoder: TextEncoder | None) -> list[Path]:
    """Write the trained modules (averaged, if there is an average) as folders in diffusers' layout."""
    parts: dict[str, Any] = {name: result.export(name) for name in result.modules}
    if "text_encoder" in parts:
        assert text_encoder is not None
        parts["tokenizer"] = text_encoder.tokenizer
    return save_parts(result, parts)
