"""How a run starts and ends, whatever it trains: its samples from its configuration, its models into folders."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError
from torch.utils.data import default_collate

from fsae.commandline import INTERRUPTED
from fsae.data.buckets import BucketedClips
from fsae.data.datasets import ClipDataset, VideoFolder
from fsae.errors import UserError
from fsae.storage.checkpoint import StrictModelMixin
from fsae.storage.files import atomic_folder, check_folder
from fsae.storage.pieces import stored_model
from fsae.training.checkpointing import checkpoints
from fsae.training.config import ClipTrainingConfig, LoopConfig
from fsae.training.loop import TrainingResult

Model = TypeVar("Model", bound=StrictModelMixin)


def read_samples(config: ClipTrainingConfig, dataset: Any = None, validation: Any = None) -> tuple[Any, Any, Any]:
    """The samples to train on, those held out, and the batch of these to validate on, None if the run never does.

    A dataset that is given stands for the clips that `config` describes. Without held-out samples the first training
    samples are validated on; of a mixture, whose clips differ in size, the first of `config`'s own length and size.

    Raises:
        UserError: the run's folder cannot be made, before a sample is looked at; or the samples' own errors.
    """
    check_folder(config.loop.output_dir)

    def clips(source: str) -> VideoFolder:
        return VideoFolder(source, config.clips.sampling, config.loop.seed)

    samples, mixed = dataset, dataset is None and not config.clips.plain
    if dataset is None:
        data, seed = config.data, config.loop.seed
        samples = BucketedClips(config.clips.mixture(data), seed) if mixed else clips(data)
    if validation is None:
        if config.validation_data is not None:
            validation = clips(config.validation_data)
        else:
            validation = clips(config.data) if mixed else samples
    if not config.loop.validate_every:
        return samples, validation, None
    count = min(config.validation_samples, len(validation))
    return samples, validation, default_collate([validation[i] for i in range(count)])


def model_to_train(kind: type[Model], model: str, loop: LoopConfig, **overrides: Any) -> Model:
    """What a training's option `model` names: a preset, built with `overrides`, or the folder of a saved model.

    Under FSDP2 it has weights only where they are drawn, in the main process. Of a saved model, and of a run that goes
    on, each process reads its part when the model is split.

    Raises:
        UserError: as the model's `from_preset_or_folder`.
    """
    if loop.sharding != "fsdp2" or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return kind.from_preset_or_folder(model, **overrides)
    goes_on, saved = loop.resume and checkpoints(Path(loop.output_dir)), model not in kind.presets
    drawn = is_main_process() and not (goes_on or saved)
    made = (kind.from_preset_or_folder if drawn else kind.outline)(model, **overrides)
    made.weights_source = "checkpoint" if goes_on else stored_model(Path(model)) if saved else "main"
    return made


def report_end(result: TrainingResult, max_steps: int, *sources: Any) -> bool:
    """Say what was skipped in reading the sources; whether the run came to its end, and if not, how to go on."""
    for source in {id(s): s for s in sources}.values():
        if isinstance(source, ClipDataset) and source.skipped:
            print(source.summary(), file=sys.stderr)
    if result.stopped == "signal":
        if result.is_main_process:
            print(f"stopped at step {result.step} of {max_steps}; run again to go on", file=sys.stderr)
        return False
    return True


def save_parts(result: TrainingResult, parts: Mapping[str, Any]) -> list[Path]:
    """Write parts of a pipeline as folders of diffusers' layout in the run's folder.

    A folder appears whole, in place of that of an earlier run; only the main process writes. A part is the name of a
    trained module, or what saves itself by `save_pretrained`. UserError if one cannot be written, such as on a full
    disk.
    """
    folders = [result.output_dir / name for name in parts]
    if result.is_main_process:
        for folder, part in zip(folders, parts.values(), strict=True):
            try:
                with atomic_folder(folder) as temporary:
                    result.save(part, temporary) if isinstance(part, str) else part.save_pretrained(temporary)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"cannot write {folder} ({error}); the run's last checkpoint is whole: make room, and run again"
                ) from error
    return folders


def report_saved(folders: Sequence[Path]) -> int:
    """Say, once for all processes, where the results are; the exit code: that of an interrupt if there are none."""
    if is_main_process():
        for folder in folders:
            print(f"saved {folder}")
    return 0 if folders else INTERRUPTED


def is_main_process() -> bool:
    """Whether this process speaks for those of its run; before they have met, as their launcher numbers them."""
    return (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))) == 0
