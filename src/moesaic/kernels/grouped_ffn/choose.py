"""Which kernel runs, and why: by capability, never by name lookup in the dark or by environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.core.errors import BackendError, ConfigError
from moesaic.core.plan import Plan
from moesaic.kernels.activations import Activation
from moesaic.kernels.grouped_ffn.reference import grouped_ffn_reference
from moesaic.kernels.grouped_ffn.torch import grouped_ffn_torch

GroupedFFN = Callable[[Tensor, Plan, Tensor | None, Tensor, Tensor, Activation], Tensor]


def _runs_anywhere(_device: torch.device, _dtype: torch.dtype) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One version of the grouped feed-forward.

    Attributes:
        name: what settings and reports call it.
        run: the operation.
        what: a line for the report.
        cannot: (device, dtype) to the reason why it cannot run there, or None if it can.
    """

    name: str
    run: GroupedFFN
    what: str
    cannot: Callable[[torch.device, torch.dtype], str | None] = _runs_anywhere


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A picked kernel and the reason in words."""

    kernel: Kernel
    reason: str


# Fastest first: "auto" takes the first that can run.
KERNELS = (
    Kernel(name="torch", run=grouped_ffn_torch, what="PyTorch, one graph node with a hand-written backward"),
    Kernel(
        name="reference", run=grouped_ffn_reference, what="PyTorch by autograd, the truth that others are tested by"
    ),
)


def require_known(name: str) -> None:
    """Refuse a name that no kernel has, before any token runs.

    Raises:
        ConfigError: naming the kernels that there are.
    """
    known = [kernel.name for kernel in KERNELS]
    if name not in ("auto", *known):
        raise ConfigError(f"kernel must be auto or one of {', '.join(known)}, got {name!r}. Use auto if unsure.")


def choose(name: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """Pick the kernel that a setting asks for, on a device and dtype.

    Args:
        name: "auto" for the fastest that can run, or a kernel's name.
    Raises:
        ConfigError: if no kernel has that name.
        BackendError: if the one asked for cannot run there.
    """
    if name == "auto":
        refused: list[str] = []
        for kernel in KERNELS:
            why_not = kernel.cannot(device, dtype)
            if why_not is None:
                passed_over = f" (passed over: {'; '.join(refused)})" if refused else ""
                return Choice(kernel=kernel, reason=f"fastest that runs on {device.type} in {dtype}{passed_over}")
            refused.append(f"{kernel.name}: {why_not}")
    require_known(name)
    named = {kernel.name: kernel for kernel in KERNELS}
    why_not = named[name].cannot(device, dtype)
    if why_not is not None:
        raise BackendError(
            f"kernel {name!r} must be able to run on {device.type} in {dtype}, but {why_not}. Use kernel='auto'."
        )
    return Choice(kernel=named[name], reason="asked for by name")
