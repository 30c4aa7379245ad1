"""`fsae export`: a model's folder from any checkpoint of a run, of this package or another, without training."""

from __future__ import annotations

import argparse
from pathlib import Path

from fsae.cli.output import save_to
from fsae.errors import UserError
from fsae.storage.files import check_new_folder


def main(argv: list[str]) -> int:
    """`fsae export`."""
    parser = argparse.ArgumentParser(
        prog="fsae export",
        description="Turn a checkpoint of a training (fsae, fsdit or fsupsampler) into the folder of a model. "
        "It is read and written a part at a time, so no machine need hold the model.",
    )
    parser.add_argument("source", help="a run's output_dir, for its newest checkpoint, or a folder checkpoint-...")
    parser.add_argument("-o", "--output", required=True, help="folder to make, or an empty one")
    parser.add_argument("--module", help="which of the trained modules (default: the only one)")
    parser.add_argument("--average", choices=("true", "false"), default="true", help="averaged weights (default: true)")
    parser.add_argument("--config", help="the model's config.json, for checkpoints of earlier versions, without one")
    options = parser.parse_args(argv)
    check_new_folder(options.output)
    from fsae.training.saving import config_file, save_model, trained_tensors

    checkpoint = _checkpoint(Path(options.source))
    name = options.module or _only_module(checkpoint)
    config = Path(options.config or config_file(checkpoint, name))
    if not config.is_file():
        raise UserError(f"there is no {config}; give a trained module's name, and for an older checkpoint --config")
    tensors = trained_tensors(checkpoint, name, options.average == "true")
    save_to(options.output, lambda folder: save_model(config, tensors, Path(folder)))
    return 0


def _checkpoint(source: Path) -> Path:
    from fsae.training.checkpointing import checkpoints

    if (source / "state.json").is_file():
        return source
    if found := checkpoints(source):
        return found[-1]
    raise UserError(f"{source} is no checkpoint and holds none; give a run's output_dir or a folder checkpoint-...")


def _only_module(checkpoint: Path) -> str:
    names = sorted(path.stem.removeprefix("config-") for path in checkpoint.glob("config-*.json"))
    if len(names) == 1:
        return names[0]
    held = f"holds the models {', '.join(names)}" if names else "does not say which models it holds"
    raise UserError(f"{checkpoint} {held}; give one as --module")
