"""Leaving autocast: what must not be rounded is worked without it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which no operation on the tensor's device is cast.

    Where autocast is off already nothing is entered: that alone takes 6 us, and routers do it for every token decoded.
    """
    # The name of a device's type is a new string each time, 3 us.
    device = "cpu" if tensor.is_cpu else tensor.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
