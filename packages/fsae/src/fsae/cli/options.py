"""What the commands that run a saved autoencoder share: which model, which device, where the result goes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fsae.errors import UserError
from fsae.storage.files import check_writable

if TYPE_CHECKING:
    from fsae.model import FSAE

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """`--model` and `--device`."""
    parser.add_argument("--model", required=True, help="folder of a saved FSAE")
    parser.add_argument("--device", help="cpu, cuda, ...; without it, the accelerator if there is one")


def add_memory_option(parser: argparse.ArgumentParser) -> None:
    """`--memory`."""
    parser.add_argument(
        "--memory",
        type=parse_bytes,
        help="what the activations may take, such as 4GB or 600MiB; frames are then worked on in tiles, without seams",
    )


def parse_bytes(text: str) -> int:
    """ "4GB", "1.5 GiB", "600M" or a plain number -> bytes; an `ArgumentTypeError` if it is none of these, or not above
    0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.strip().upper())
    count = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; give one such as 4GB, 600MiB or 2000000000")
    return count


def parse_count(text: str) -> int:
    """A number from 1 on; an `ArgumentTypeError` if it is none."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def check_output(path: str, suffixes: tuple[str, ...]) -> None:
    """Refuse, before any work, a name of another kind or a place that cannot be written."""
    if Path(path).suffix.lower() not in suffixes:
        raise UserError(f"cannot write {path}; give a name that ends in {', '.join(suffixes)}")
    check_writable(path)


def load_model(options: argparse.Namespace) -> FSAE:
    """The saved autoencoder on its device, in eval mode."""
    from fsae.devices import choose_device
    from fsae.model import FSAE

    device = choose_device(options.device)
    return FSAE.from_pretrained(options.model).to(device).eval()
