"""Which kernel runs, and why: by capability, never by name lookup in the dark or by environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.core.errors import BackendError, ConfigError
from moesaic.core.plan import Plan
from moesaic.kernels.activations import Activation
from moesaic.kernels.grouped_ffn.grouped import grouped_ffn_grouped_mm, grouped_mm_cannot, grouped_mm_misfits
from moesaic.kernels.grouped_ffn.native import grouped_ffn_native, native_cannot, native_misfits
from moesaic.kernels.grouped_ffn.reference import grouped_ffn_reference
from moesaic.kernels.grouped_ffn.torch import grouped_ffn_torch
from moesaic.kernels.grouped_ffn.triton import grouped_ffn_triton, triton_cannot, triton_misfits

GroupedFFN = Callable[[Tensor, Plan, Tensor | None, Tensor, Tensor, Activation], Tensor]


Stacks = tuple[Tensor | None, Tensor, Tensor]
"""The weights of stacked experts: gate (E, D, F) or None, up (E, D, F) and down (E, F, D)."""


def _runs_anywhere(_device: torch.device, _dtype: torch.dtype) -> str | None:
    return None


def _takes_any(_gate_EDF: Tensor | None, _up_EDF: Tensor, _down_EFD: Tensor) -> str | None:
    return None


def _is_no_rival(_device: torch.device) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One version of the grouped feed-forward.

    Attributes:
        name: what settings and reports call it.
        run: the operation.
        what: a line for the report.
        cannot: (device, dtype) to the reason why it cannot run there, or None if it can.
        misfits: (gate, up, down) to the reason why it cannot take these weights, of which it asks for more than their
            device and dtype, or None if it can.
        yields: device to the reason why "auto" passes it over there although it can run, or None.
    """

    name: str
    run: GroupedFFN
    what: str
    cannot: Callable[[torch.device, torch.dtype], str | None] = _runs_anywhere
    misfits: Callable[[Tensor | None, Tensor, Tensor], str | None] = _takes_any
    yields: Callable[[torch.device], str | None] = _is_no_rival

    def why_not(self, device: torch.device, dtype: torch.dtype, stacks: Stacks | None = None) -> str | None:
        """The reason why it cannot run on a device in a dtype, on these weights if they are given; None if it can."""
        reason = self.cannot(device, dtype)
        return self.misfits(*stacks) if reason is None and stacks is not None else reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A picked kernel and the reason in words."""

    kernel: Kernel
    reason: str


def _slower_on_cpu(device: torch.device) -> str | None:
    return "on cpu the kernel torch is faster" if device.type == "cpu" else None


def _slow_on_cpu(device: torch.device) -> str | None:
    return "on cpu only its interpreter runs, which is slow" if device.type == "cpu" else None


# Fastest first: "auto" takes the first that can run and does not yield. On CUDA, grouped_mm has products that PyTorch
# tunes for the devices that it takes; Triton has the other devices, dtypes and shapes.
KERNELS = (
    Kernel(
        name="grouped_mm",
        run=grouped_ffn_grouped_mm,
        what="PyTorch's grouped products, no loop over experts, nothing asked of the device",
        cannot=grouped_mm_cannot,
        misfits=grouped_mm_misfits,
        yields=_slower_on_cpu,
    ),
    Kernel(
        name="triton",
        run=grouped_ffn_triton,
        what="Triton, gather, activation and weights within the products, nothing asked of the device",
        cannot=triton_cannot,
        misfits=triton_misfits,
        yields=_slow_on_cpu,
    ),
    Kernel(
        name="native",
        run=grouped_ffn_native,
        what="C, few rows as fast as memory gives weights, many with all within the products; without AVX512 as torch",
        cannot=native_cannot,
        misfits=native_misfits,
    ),
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


def choose(name: str, device: torch.device, dtype: torch.dtype, stacks: Stacks | None = None) -> Choice:
    """Pick the kernel that a setting asks for, on a device and dtype.

    Args:
        name: "auto" for the fastest that can run, or a kernel's name.
        stacks: the weights, of whose shapes and strides some kernels ask more; None picks by device and dtype alone.
    Raises:
        ConfigError: if no kernel has that name.
        BackendError: if the one asked for cannot run there.
    """
    if name == "auto":
        refused: list[str] = []
        for kernel in KERNELS:
            if kernel.yields(device):
                continue
            why_not = kernel.why_not(device, dtype, stacks)
            if why_not is None:
                passed_over = f" (passed over: {'; '.join(refused)})" if refused else ""
                return Choice(kernel=kernel, reason=f"fastest that runs on {device.type} in {dtype}{passed_over}")
            refused.append(f"{kernel.name}: {why_not}")
    require_known(name)
    named = {kernel.name: kernel for kernel in KERNELS}
    why_not = named[name].why_not(device, dtype, stacks)
    if why_not is not None:
        raise BackendError(
            f"kernel {name!r} must be able to run on {device.type} in {dtype}, but {why_not}. Use kernel='auto'."
        )
    return Choice(kernel=named[name], reason="asked for by name")
