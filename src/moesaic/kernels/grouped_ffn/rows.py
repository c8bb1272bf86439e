"""Where the rows of each expert lie while it works on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.core.plan import Plan
from moesaic.kernels.memory import large_empty


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """The rows that experts work on, expert after expert, each one's rows filled up to a round number.

    Attributes:
        experts: those that have any rows.
        sizes: the rows of each of them, filler counted.
        token_N: the token of each row; of filler, any.
        filler_N: the rows that are filler.
        weight_N: the weight of each row; 0 of filler.
        place_N: the row of each of the plan's places up to its last expert's last.
        by_token_N: the rows of the first token, of the second and so on, each in the order of its choices; no filler.
        start_T: where each token's begin in ``by_token_N``.
    """

    experts: list[int]
    sizes: list[int]
    token_N: Tensor
    filler_N: Tensor
    weight_N: Tensor
    place_N: Tensor
    by_token_N: Tensor
    start_T: Tensor

    @classmethod
    def of(cls, plan: Plan, num_tokens: int, dtype: torch.dtype) -> Rows:
        """Lay out the rows of a plan for products in a dtype."""
        load: list[int] = plan.load_E.tolist()
        is_half = dtype in (torch.bfloat16, torch.float16)
        room = [_rounded(rows) for rows in load] if is_half else load
        num_rows = sum(room)
        num_kept = sum(load)
        token_N, weight_N = plan.token_N[:num_kept], plan.weight_N.detach()[:num_kept]
        place_N = torch.arange(num_kept, device=token_N.device)
        filler_N = place_N[:0]
        if num_rows > num_kept:
            filler_E = torch.tensor([have - want for have, want in zip(room, load, strict=True)], device=token_N.device)
            place_N += (filler_E.cumsum(0) - filler_E).repeat_interleave(plan.load_E)
            is_filler_N = torch.ones(num_rows, dtype=torch.bool, device=token_N.device)
            filler_N = is_filler_N.index_fill_(0, place_N, False).nonzero(as_tuple=True)[0]
            token_N = token_N.new_zeros(num_rows).index_copy(0, place_N, token_N)
            weight_N = weight_N.new_zeros(num_rows).index_copy(0, place_N, weight_N)
        count_T = torch.bincount(plan.token_N[:num_kept], minlength=num_tokens)
        return cls(
            experts=[e for e, rows in enumerate(room) if rows],
            sizes=[rows for rows in room if rows],
            token_N=token_N,
            filler_N=filler_N,
            weight_N=weight_N,
            place_N=place_N,
            by_token_N=place_N[torch.argsort(plan.token_N[:num_kept], stable=True)],
            start_T=count_T.cumsum(0) - count_T,
        )

    @property
    def num_rows(self) -> int:
        """All rows, filler counted."""
        return self.token_N.shape[0]

    def gather(self, x_TD: Tensor) -> Tensor:
        """Each row's token, zeros for filler. All at once: tokens stay in the cache until their last row is read."""
        x_ND = large_empty((self.num_rows, x_TD.shape[1]), x_TD.dtype, x_TD.device)
        torch.index_select(x_TD, 0, self.token_N, out=x_ND)
        return x_ND.index_fill_(0, self.filler_N, 0)

    def sum(self, y_ND: Tensor, weight_N: Tensor | None = None) -> Tensor:
        """Add up the rows of each token, weighted or not, in the order of its choices and in float32; no filler."""
        index_N, start_T = self.by_token_N, self.start_T
        if weight_N is not None:
            weight_N = weight_N[index_N]
            if y_ND.dtype.itemsize < weight_N.dtype.itemsize:
                # Weights have to be of the rows' dtype: what rounding takes from one comes as a second.
                high_N = weight_N.to(y_ND.dtype)
                weight_N = torch.stack([high_N, (weight_N - high_N).to(y_ND.dtype)], dim=1).flatten()
                index_N, start_T = index_N.repeat_interleave(2), 2 * start_T
            weight_N = weight_N.to(y_ND.dtype)
        y_TD: Tensor = F.embedding_bag(index_N, y_ND, start_T, mode="sum", per_sample_weights=weight_N)
        return y_TD

    def split(self, one: Tensor) -> tuple[Tensor, ...]:
        """The rows of each expert that has any."""
        return torch.split(one, self.sizes)


def _rounded(rows: int) -> int:
    """The next of thirty-two numbers of rows to each octave.

    oneDNN, which multiplies in half precision, generates code for each shape that it meets: 0.7 ms for a product that
    takes 0.15, and it forgets the oldest of 1,024. Loads differ in every step, so this would never end.
    """
    step = 1 << max(0, rows.bit_length() - 6)
    return -(-rows // step) * step
