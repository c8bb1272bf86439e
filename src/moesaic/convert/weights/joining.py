"""How all experts of a layer become one dense network. Pure maths on a stack and on what its experts did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from moesaic.convert.shrink.saliency import ExpertStats
from moesaic.convert.weights.combine import aligned_orders, average, concatenate, permuted, scaled, take
from moesaic.convert.weights.stack import DenseFFN, ExpertStack
from moesaic.core.errors import ConfigError

Joint = Literal["merge", "concat", "expert"]
Weights = Literal["frequency", "saliency", "uniform"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Joined:
    """What becomes of one layer's experts.

    Attributes:
        kept: experts that have a part in the network, rising.
        counts: what each of them counts in an average; None to lay them side by side.
        scales: what each one's output is multiplied by side by side; or the average's, one number.
        order_EF: in which order each expert's neurons are taken for an average; None for as they stand.
    """

    kept: tuple[int, ...]
    counts: Tensor | None
    scales: Tensor
    order_EF: Tensor | None

    def network(self, stack: ExpertStack) -> DenseFFN:
        """The network in the place of the experts."""
        if self.counts is None:
            return concatenate(take(stack, torch.tensor(self.kept)), self.scales)
        if self.order_EF is not None:
            stack = permuted(stack, self.order_EF)
        return scaled(average(stack, self.counts), float(self.scales))

    def moments(self, stack: ExpertStack) -> DenseFFN:
        """The same for moments, which are averaged or laid side by side and not scaled."""
        one = torch.ones_like(self.scales)
        return Joined(kept=self.kept, counts=self.counts, scales=one, order_EF=self.order_EF).network(stack)

    def __str__(self) -> str:
        numbers = ", ".join(f"{float(scale):.3g}" for scale in self.scales.reshape(-1))
        if self.counts is not None:
            return f"average of {len(self.kept)} experts, times {numbers}"
        return f"experts {', '.join(map(str, self.kept))} side by side, times {numbers}"


def joined(
    stats: ExpertStats,
    *,
    method: Joint,
    weights: Weights,
    num_kept: int | None = None,
    stack: ExpertStack | None = None,
) -> Joined:
    """Settle how a layer's experts are joined.

    Weighing each expert by a number instead of a router is right on average: side by side, each is multiplied by the
    mean of its weight over all tokens, those included that did not choose it. An average stands for a token's whole
    choice, and is multiplied by the mean of what a token's weights add up to. Experts that stay where others are left
    out are multiplied by more, so that weights still add up to that.

    Args:
        stats: what the experts did.
        method: "merge", "concat" or "expert"; see :func:`~moesaic.convert.shrink.to_dense.to_dense`.
        weights: what each counts, and who matters most.
        num_kept: of "concat"; None for all.
        stack: to line up neurons for an average; None to take them as they stand.
    """
    mean_E = stats.weight_E / max(stats.num_tokens, 1)
    total = mean_E.sum()
    if weights == "uniform":
        count_E = torch.ones(stats.num_experts, dtype=torch.float64)
    else:
        count_E = stats.count_E.double() if weights == "frequency" else stats.contribution_E
    if method == "merge":
        every: Sequence[int] = range(stats.num_experts)
        order_EF = None if stack is None else aligned_orders(stack, [every], count_E)
        return Joined(kept=tuple(every), counts=count_E, scales=total, order_EF=order_EF)
    kept_count = 1 if method == "expert" else stats.num_experts if num_kept is None else num_kept
    kept = count_E.argsort(descending=True, stable=True)[:kept_count].sort().values
    share = mean_E[kept].sum()
    scales = mean_E[kept] * (total / share) if float(share) > 0 else torch.full_like(mean_E[kept], float(total))
    return Joined(kept=tuple(kept.tolist()), counts=None, scales=scales, order_EF=None)


def num_side_by_side(hidden: int | None, expert_hidden: int, num_experts: int) -> int | None:
    """How many experts make up a network of so many neurons; None for all.

    Raises:
        ConfigError: if they do not.
    """
    if hidden is None:
        return None
    count, rest = divmod(hidden, expert_hidden)
    if rest or not 1 <= count <= num_experts:
        raise ConfigError(
            f"hidden must be a multiple of an expert's {expert_hidden} neurons, at most {num_experts} times, got "
            f"{hidden}. Leave it out for all experts."
        )
    return count


def check_weights(weights: str) -> None:
    """Refuse a way of counting that there is none.

    Raises:
        ConfigError: naming those that there are.
    """
    if weights not in get_args(Weights):
        raise ConfigError(
            f"weights must be one of {', '.join(get_args(Weights))}, got {weights!r}. 'frequency' counts tokens."
        )
