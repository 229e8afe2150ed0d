"""Device selection, and small tensors on a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regolite.errors import UserError


def choose_device(name: str | torch.device) -> torch.device:
    """Get a device by name: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, or ``auto`` for a GPU if one is available.

    Raises:
        UserError: PyTorch sees no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, is_available in available.items() if is_available)
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise UserError(f"device {name}: PyTorch has no such device; give auto, cpu, cuda or mps") from None
    is_out_of_range = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if not available.get(device.type, True) or is_out_of_range:
        raise UserError(f"device {name}: PyTorch sees no such device; give auto")
    return device


def constant(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A small tensor of given numbers on a device.

    ``torch.tensor(values, device="cuda")`` returns only when the GPU has done all that it was asked before, so that it
    runs out of work. This copy does not wait.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
