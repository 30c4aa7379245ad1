"""The folder that a command saves a model in: looked at before any work, and written whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from fsae.errors import UserError
from fsae.storage.files import atomic_folder, check_writable


def check_new_folder(output: str) -> None:
    """UserError, before any work, if a place is a file or a folder with something in it, or no folder can be made
    there."""
    if not os.path.isdir(output):
        if os.path.exists(output):
            raise UserError(f"cannot save a model at {output}: it is a file; give a folder")
        check_writable(output)
        return
    if os.listdir(output):
        raise UserError(f"cannot save a model at {output}: the folder is not empty; give a new one")
    check_writable(Path(output) / "config.json")


def save_to(output: str, save: Callable[[str], None]) -> None:
    """Have `save` write the folder, which appears whole, and say so; UserError if it cannot be written."""
    from safetensors import SafetensorError

    print(f"writing {output}", file=sys.stderr)
    try:
        with atomic_folder(output) as temporary:
            save(os.fspath(temporary))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the model could not be written to {output} ({error}); make room or give another place"
        ) from None
    print(f"saved {output}")
