"""What the commands that run a saved autoencoder share: which model, which device, where the result goes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fsae.errors import UserError
from fsae.files import check_writable

if TYPE_CHECKING:
    from fsae.model import FSAE


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """`--model` and `--device`."""
    parser.add_argument("--model", required=True, help="folder of a saved FSAE")
    parser.add_argument("--device", help="cpu, cuda, ...; without it, the accelerator if there is one")


def check_output(path: str, suffixes: tuple[str, ...]) -> None:
    """Refuse, before any work, a name of another kind or a place that cannot be written."""
    if Path(path).suffix.lower() not in suffixes:
        raise UserError(f"cannot write {path}; give a name that ends in {', '.join(suffixes)}")
    check_writable(path)


def load_model(options: argparse.Namespace) -> FSAE:
    """The saved autoencoder on its device, in eval mode."""
    import torch

    from fsae.model import FSAE

    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    # torch answers an unknown name, a device that is not there and one it was not built for in different
    # ways.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the device {options.device} cannot be used ({reason}); try cpu") from None
    return FSAE.from_pretrained(options.model).to(device).eval()
