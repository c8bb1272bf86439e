"""The grouped feed-forward in Triton. Triton itself is imported when a kernel first runs."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from moesaic.core.plan import Plan
from moesaic.kernels.activations import Activation
from moesaic.kernels.grouped_ffn.row_work import RowWork

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's own switch. It reads it when it is imported, and when a kernel is defined.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_MAX_EXPERTS = 4096


def grouped_ffn_triton(
    x_TD: Tensor,
    plan: Plan,
    gate_EDF: Tensor | None,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation,
) -> Tensor:
    """Run each expert over its rows and add the weighted outputs up.

    Takes and gives what :func:`~moesaic.kernels.grouped_ffn.reference.grouped_ffn_reference` does; not twice
    differentiable. Inputs are gathered within the first product, activation and weights applied within the products,
    and each token's rows added up in the order of experts. Blocks are tuned for each shape when it is first met, which
    takes seconds and cannot be done while a CUDA graph is captured: run once before.
    """
    from moesaic.kernels.grouped_ffn.triton.operation import run

    return run(x_TD, plan, gate_EDF, up_EDF, down_EFD, activation)


def row_work_in_triton() -> RowWork:
    """What the kernel with grouped_mm does between its products, in one pass over memory each."""
    from moesaic.kernels.grouped_ffn.triton.between import IN_TRITON

    return IN_TRITON


def triton_misfits(_gate_EDF: Tensor | None, up_EDF: Tensor, _down_EFD: Tensor) -> str | None:
    """Why the Triton kernel cannot take some weights, or None if it can."""
    num_experts = up_EDF.shape[0]
    if num_experts > _MAX_EXPERTS:
        return f"its list of tiles is written for {_MAX_EXPERTS} experts at most and there are {num_experts}"
    return None


def triton_cannot(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernel cannot run on a device in a dtype, or None if it can."""
    if not HAS_TRITON:
        return "Triton is not installed; PyTorch's builds with CUDA bring it on Linux"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return "it multiplies bfloat16, float16 and float32"
    if device.type == "cpu":
        return None if IS_INTERPRETED else "Triton runs on a CPU in its interpreter only: start with TRITON_INTERPRET=1"
    if device.type != "cuda":
        return "it runs on CUDA"
    if IS_INTERPRETED:
        return "TRITON_INTERPRET=1 has Triton run on the CPU"
    if torch.version.hip is None and torch.cuda.get_device_properties(device).major < 8:
        return "it needs compute capability 8 or later"
    return None
