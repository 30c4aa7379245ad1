"""A training run of the transformer, from its configuration to the saved folders (paper §2.3.2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fsae import FSAE
from fsae.errors import UserError
from fsae.training.loop import TrainingResult, train
from fsae.training.runs import is_main_process, model_to_train, read_samples, report_end, save_parts
from fsdit.conditioning.encoders import Encoders
from fsdit.conditioning.folders import load_encoders
from fsdit.model import FSDiT
from fsdit.training.config import TransformerConfig
from fsdit.training.data import CachedLatents, Samples, read_cache, report_missing_captions
from fsdit.training.task import FlowMatchingTask, check_widths


def train_transformer(config: TransformerConfig, dataset: Any = None, validation: Any = None) -> list[Path]:
    """Train an FSDiT and save it in `output_dir/transformer`, with the encoders beside it if they were trained.

    What does not fit is refused before the transformer is built. Samples to train on (`fsdit.training.data`) and held-
    out ones are those that `config` describes if None.

    Returns:
        The saved folders; none if a signal stopped the run, which then can be resumed.
    """
    loop = config.loop
    outline = _outline(config)
    autoencoder = _autoencoder(config)
    clips = _read_clips(config, outline, autoencoder, dataset, validation)
    torch.manual_seed(loop.seed)
    encoders = _encoders(config, outline, clips)
    check_widths(outline, encoders, autoencoder)
    transformer = model_to_train(FSDiT, config.model, loop, **config.model_options)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    task = FlowMatchingTask(transformer, encoders, config, autoencoder, clips)
    result = train(task, clips.samples, loop, clips.collate)
    if not report_end(result, loop.max_steps, clips.samples, clips.held_out):
        return []
    return _save(result, encoders)


def _read_clips(
    config: TransformerConfig, outline: FSDiT, autoencoder: FSAE | None, dataset: Any, validation: Any
) -> Samples:
    """The clips that `config` describes, or those given."""
    if dataset is None and config.cache:
        dataset = CachedLatents(config.cache)
    if isinstance(dataset, CachedLatents):
        dataset.check_fits(outline.config)
        return read_cache(config, dataset, validation, autoencoder)
    if dataset is None:
        _check_clips(config, autoencoder)
    clips = Samples(*read_samples(config, dataset, validation))
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


def _outline(config: TransformerConfig) -> FSDiT:
    """The transformer without its weights."""
    if config.model_options and config.model not in FSDiT.presets:
        names = ", ".join(config.model_options)
        raise UserError(f"model_options {names} cannot change the saved model {config.model}; they are for presets")
    return FSDiT.outline(config.model, **config.model_options)


def _encoders(config: TransformerConfig, outline: FSDiT, clips: Samples) -> Encoders | None:
    """The encoders, if samples do not hold what they give."""
    if clips.empty_text is None:
        return load_encoders(config.encoders, outline.config.text_len)
    if config.encoders != "nano" or config.train_encoders:
        raise UserError(
            "encoders or train_encoders is given with a cache that holds what encoders gave; leave them out, or make "
            "the cache without encoders"
        )
    return None


def _autoencoder(config: TransformerConfig) -> FSAE | None:
    return FSAE.from_pretrained(config.autoencoder).requires_grad_(False) if config.autoencoder else None


def _save(result: TrainingResult, encoders: Encoders | None) -> list[Path]:
    """Write the trained modules (averaged, if there is an average) as folders in diffusers' layout."""
    parts: dict[str, Any] = {name: name for name in result.modules}
    if "text_encoder" in parts:
        assert encoders is not None
        parts["tokenizer"] = encoders.text.tokenizer
    return save_parts(result, parts)
