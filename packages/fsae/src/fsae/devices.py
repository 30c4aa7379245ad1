"""Which device a command computes on."""

from __future__ import annotations

import torch

from fsae.errors import UserError


def choose_device(name: str | None) -> torch.device:
    """The device of a name, or without one the accelerator if there is one.

    Raises:
        UserError: there is no such device, or it computes nothing.
    """
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
