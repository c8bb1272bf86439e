"""Leaving autocast: what must not be rounded is worked without it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which no operation on the device is cast.

    Where autocast is off already nothing is entered: that alone takes 6 us, and routers do it for every token decoded.
    """
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
