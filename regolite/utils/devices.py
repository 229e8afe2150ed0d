"""Choose a device by name."""

from __future__ import annotations

import torch

from regolite.errors import UserError


def choose_device(name: str | torch.device) -> torch.device:
    """A device by its name: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, or ``auto`` for a GPU where there is one.

    Raises:
        UserError: when PyTorch sees no such device.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, is_there in there.items() if is_there)
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise UserError(f"device {name}: PyTorch knows no such device; give auto, cpu, cuda or mps") from None
    is_beyond = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if not there.get(device.type, True) or is_beyond:
        raise UserError(f"device {name}: PyTorch sees no such device; give auto")
    return device
