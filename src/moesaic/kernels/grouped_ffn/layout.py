"""Gradients that lie in memory as their weights do, so that none has to be copied into place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.kernels.memory import large_empty


def halves(both_EDF: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up projections that checkpoints keep as one, (E, D, 2F): the first and the second half, as views.

    Unlike with ``chunk``, gradients that :func:`gradients_like` has made side by side are the gradient of both as they
    are.
    """
    gate_EDF, up_EDF = _Halves.apply(both_EDF)  # type: ignore[no-untyped-call]
    return gate_EDF, up_EDF


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both_EDF: Tensor) -> tuple[Tensor, Tensor]:
        ctx.stride = both_EDF.stride()
        gate_EDF, up_EDF = both_EDF.chunk(2, dim=-1)
        return gate_EDF, up_EDF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_gate_EDF: Tensor, grad_up_EDF: Tensor) -> Tensor:
        num_experts, width, hidden = grad_up_EDF.shape
        is_laid_out = grad_gate_EDF.stride() == grad_up_EDF.stride() == ctx.stride
        if is_laid_out and _lie_together(grad_gate_EDF, grad_up_EDF):
            step = hidden * grad_up_EDF.stride(-1)
            if grad_up_EDF.storage_offset() - grad_gate_EDF.storage_offset() == step:
                return grad_gate_EDF.as_strided((num_experts, width, 2 * hidden), ctx.stride)
        return torch.cat([grad_gate_EDF, grad_up_EDF], dim=-1)


def gradients_like(weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Uninitialized memory for the gradients of some weights; where two share one memory, the gradients share one too.

    Args:
        weights: those of a gradient; None stays None.
    """
    made: list[Tensor | None] = []
    for place, weight in enumerate(weights):
        before = weights[place - 1] if place else None
        if weight is None:
            made.append(None)
        elif before is not None and before.stride() == weight.stride() and _lie_together(before, weight):
            start = min(before.storage_offset(), weight.storage_offset())
            shared = large_empty((before.numel() + weight.numel(),), weight.dtype, weight.device)
            made[-1], one = (
                shared.as_strided(each.shape, each.stride(), each.storage_offset() - start) for each in (before, weight)
            )
            made.append(one)
        else:
            made.append(_like(weight))
    return made


def _like(weight: Tensor) -> Tensor:
    """Dense memory with the dimensions in the weight's order."""
    order = sorted(range(weight.ndim), key=weight.stride, reverse=True)
    memory = large_empty(tuple(weight.shape[i] for i in order), weight.dtype, weight.device)
    return memory.permute([order.index(i) for i in range(weight.ndim)])


def _lie_together(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are all that is in their memory, without a gap."""
    memory = one.untyped_storage()
    size = (one.numel() + other.numel()) * one.element_size()
    return memory.data_ptr() == other.untyped_storage().data_ptr() and size <= memory.nbytes() and _fill(one, other)


def _fill(one: Tensor, other: Tensor) -> bool:
    first, second = sorted((one, other), key=lambda each: each.storage_offset())
    last = second.storage_offset() + sum((n - 1) * s for n, s in zip(second.shape, second.stride(), strict=True))
    return last - first.storage_offset() + 1 == one.numel() + other.numel()
