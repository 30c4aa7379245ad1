"""The folder that a command saves a model in: written whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from fsae.errors import UserError
from fsae.storage.files import atomic_folder


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
