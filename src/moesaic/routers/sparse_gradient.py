"""A gradient for the chosen logits alone: of each token's E logits only K have one, and products can skip the rest.

Weights that are made of the chosen logits send a gradient to K of E logits. Two dense products, for tokens and for the
router's weight, then multiply zeros: 12 of the 28 ms that router and dispatch take in a training step at T=4096, E=256,
K=8, D=512 on two cores. Summing over the places that hold something takes 2 ms. A balance loss has a gradient for every
logit: autograd adds the sparse one to it, in 1.5 ms, and the products are dense again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Below so many logits, or where more than one in so many is chosen, dense products are no slower.
LEAST_LOGITS = 1 << 16
LEAST_RATIO = 16


def linear(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, top_k: int) -> Tensor:
    """``F.linear``, whose result :func:`gather` may give a sparse gradient where ``top_k`` of E are to be chosen."""
    num_experts = weight_ED.shape[0]
    if (
        # A GPU does the dense products in no time, and a compiler knows no sparse tensors.
        not x_TD.is_cpu
        or torch.compiler.is_compiling()
        or x_TD.shape[0] * num_experts < LEAST_LOGITS
        or num_experts < LEAST_RATIO * top_k
    ):
        return F.linear(x_TD, weight_ED, bias_E)
    logits_TE: Tensor = _LinearToChosen.apply(x_TD, weight_ED, bias_E)  # type: ignore[no-untyped-call]
    return logits_TE


def gather(logits_TE: Tensor, expert_TK: Tensor) -> Tensor:
    """The chosen logits (T, K); their gradient is a sparse tensor if the logits came straight from :func:`linear`."""
    if not logits_TE.requires_grad or torch.compiler.is_compiling():
        return logits_TE.gather(1, expert_TK)
    made_by = logits_TE.grad_fn
    is_ours = made_by is not None and made_by.name() == f"{_LinearToChosen.__name__}Backward"
    return logits_TE.gather(1, expert_TK, sparse_grad=is_ours)


class _LinearToChosen(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
        return F.linear(x_TD, weight_ED, bias_E)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def jvp(ctx: Any, x_TD: Tensor | None, weight_ED: Tensor | None, bias_E: Tensor | None) -> Tensor:
        at_x_TD, at_weight_ED = ctx.saved_tensors
        change_TE: Tensor = at_x_TD.new_zeros(len(at_x_TD), len(at_weight_ED))
        if x_TD is not None:
            change_TE = change_TE + F.linear(x_TD, at_weight_ED)
        if weight_ED is not None:
            change_TE = change_TE + F.linear(at_x_TD, weight_ED)
        return change_TE if bias_E is None else change_TE + bias_E

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        if grad_TE.is_sparse and torch.is_grad_enabled():
            # Sums over bags have no second derivative.
            grad_TE = grad_TE.to_dense()
        if not grad_TE.is_sparse:
            return (
                grad_TE @ weight_ED if for_x else None,
                grad_TE.t() @ x_TD if for_weight else None,
                grad_TE.sum(0) if for_bias else None,
            )
        (token_N, expert_N), grad_N = grad_TE._indices(), grad_TE._values()
        return (
            _product(token_N, expert_N, grad_N, weight_ED, len(x_TD)) if for_x else None,
            _product(expert_N, token_N, grad_N, x_TD, len(weight_ED)) if for_weight else None,
            grad_N.new_zeros(len(weight_ED)).index_add_(0, expert_N, grad_N) if for_bias else None,
        )


def _product(row_N: Tensor, column_N: Tensor, value_N: Tensor, dense: Tensor, num_rows: int) -> Tensor:
    """The matrix that holds those values and else zeros, times a dense one: each row a sum over its own values."""
    row_N, order_N = torch.sort(row_N, stable=True)
    start = torch.searchsorted(row_N, torch.arange(num_rows, device=row_N.device))
    column_N, value_N = column_N.index_select(0, order_N), value_N.index_select(0, order_N)
    return F.embedding_bag(column_N, dense, start, mode="sum", per_sample_weights=value_N)
