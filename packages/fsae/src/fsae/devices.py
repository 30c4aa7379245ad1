"""Which device a command computes on."""

from __future__ import annotations

import os

import torch

from fsae.errors import UserError


def choose_device(name: str | None) -> torch.device:
    """The device of a name, or without one the accelerator if there is one; UserError if it is none that computes."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    # torch answers an unknown name, a device that is not there and one it was not built for in different ways.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the device {name} cannot be used ({reason}); try cpu") from None
    if device.type == "meta":
        raise UserError("the device meta computes nothing; try cpu")
    return device


def avoid_faulty_kernels() -> None:
    """Keep oneDNN on a CPU from AMX, for convolutions in bfloat16.

    Its AMX kernels, as torch 2.13 brings them (oneDNN 3.12), give NaN for the gradient of some kernels, write beyond
    their memory or crash: three taps in time on a few large frames, frames one pixel wide, 1x1 on 32x32 pixels. It asks
    for this setting when it first computes, so call this before; one that is already made is left as it is.
    """
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
