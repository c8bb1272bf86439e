"""Where each token's rows stand in a plan, and their sum: in the same order each time, on every device.

A plan is sorted by expert. Adding each row to its token as it comes would need atomic additions, whose order a GPU does
not repeat. So the places are sorted once more, by token, and each token reads its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.core.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenRows:
    """The places of a plan in the order of their tokens, those that reach no expert last.

    Attributes:
        place_N: places; within one token they rise, which is the order of experts. int64.
        bounds: token ``t`` has the places ``place_N[bounds[t]:bounds[t + 1]]``; T + 1 numbers, int64.
    """

    place_N: Tensor
    bounds: Tensor

    @classmethod
    def of(cls, plan: Plan, num_tokens: int) -> TokenRows:
        """Sort a plan's places by token, without asking the device for a number.

        Args:
            plan: rows sorted by expert.
            num_tokens: T.
        """
        # Rows that no expert takes sort as if they were of a token after the last.
        token_N = torch.where(live(plan.offset_E, len(plan.token_N)), plan.token_N, num_tokens)
        token_N, place_N = torch.sort(token_N, stable=True)
        tokens = torch.arange(num_tokens + 1, device=token_N.device)
        return cls(place_N=place_N, bounds=torch.searchsorted(token_N, tokens))


def live(offset_E: Tensor, num_rows: int) -> Tensor:
    """True on the places that an expert works on, bool (N,)."""
    return torch.arange(num_rows, device=offset_E.device) < offset_E[-1]


def sum_by_token(rows_ND: Tensor, token_rows: TokenRows, weight_N: Tensor | None = None) -> Tensor:
    """Each token's sum of its rows, in float32 or wider; zeros for a token without any. Not differentiable.

    Args:
        rows_ND: a row for each place; what stands on places that no expert works on is not read into any sum.
        token_rows: which are whose.
        weight_N: multiply each row by this first, in the precision of the sum.
    Shape:
        ``(N, D)`` -> ``(T, D)``.
    """
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    rows_ND = rows_ND.index_select(0, token_rows.place_N).to(wide)
    if weight_N is not None:
        rows_ND = rows_ND * weight_N.to(wide).index_select(0, token_rows.place_N)[:, None]
    return torch.segment_reduce(rows_ND, "sum", offsets=token_rows.bounds, axis=0, unsafe=True)


def add_up(rows_ND: Tensor, plan: Plan, num_tokens: int) -> Tensor:
    """Each token's sum of its rows, differentiable: a row's gradient is its token's.

    Args:
        rows_ND: a row for each place of the plan.
        plan: which rows are whose.
        num_tokens: T.
    """
    y_TD: Tensor = _AddUp.apply(rows_ND, plan, num_tokens)  # type: ignore[no-untyped-call]
    return y_TD


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, plan: Plan, num_tokens: int) -> Tensor:
        ctx.save_for_backward(plan.token_N, plan.offset_E)
        return sum_by_token(rows_ND, TokenRows.of(plan, num_tokens)).to(rows_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TD: Tensor) -> tuple[Tensor, None, None]:
        token_N, offset_E = ctx.saved_tensors
        is_live_N1 = live(offset_E, token_N.shape[0])[:, None]
        return torch.where(is_live_N1, grad_y_TD.index_select(0, token_N), 0), None, None
