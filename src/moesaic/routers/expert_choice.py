"""Expert choice: each expert takes the tokens that score best for it, the same number for every expert."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError
from moesaic.core.init import Init
from moesaic.core.routing import Routing, checked_mask
from moesaic.routers.linear import LinearRouter
from moesaic.routers.ranks import rank_for_experts, share_of_groups


class ExpertChoiceRouter(LinearRouter):
    """Softmax over experts, then every expert's best ``k = floor(n c / E)`` of n tokens, at least 1 and at most n.

    Loads are equal without any loss. A token gets as many experts as want it, none included, and its weights are the
    softmax scores as they are. Padding is never taken and does not count in n.

    Whether a token is taken depends on all others, later ones too, in evaluation as in training: a causal language
    model cannot be generated from.

    Args:
        width: D.
        num_experts: E.
        top_k: c, experts per token on average; need not be whole.
        cap: b, at most this many experts for one token (EC-CAP): experts then choose by :func:`capped_plan`. None for
            no limit. The plan keeps to it; its k largest entries, which are taken, may pass it for a few tokens.
        group: "batch" ranks all tokens together, "sequence" those of each sequence alone.
        init: draws the initial weights.
    Shape:
        ``(T, D)`` -> Routing of about ``T * c`` rows, token by token, largest weight first.
    Raises:
        ConfigError: if ``top_k`` is not above 0 and at most E, ``cap`` is below ``top_k``, or ``group`` is neither.

    Source: Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", sections 3.2 and 3.3.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: float = 2,
        cap: int | None = None,
        group: Literal["batch", "sequence"] = "batch",
        init: Init | None = None,
    ) -> None:
        if not 0 < top_k <= num_experts:
            raise ConfigError(
                f"top_k, the experts per token on average, must be above 0 and at most num_experts={num_experts}, "
                f"got {top_k}. Lower top_k, or add experts."
            )
        if cap is not None and cap < top_k:
            raise ConfigError(
                f"cap must be at least top_k={top_k}, got {cap}: the average cannot exceed the limit. "
                "Raise cap, or lower top_k."
            )
        if group not in ("batch", "sequence"):
            raise ConfigError(f"group must be 'batch' or 'sequence', got {group!r}. The paper ranks the whole batch.")
        super().__init__(width, num_experts, init=init)
        self.top_k = top_k
        self.cap = cap
        self.group = group

    @property
    def experts_per_token(self) -> float:
        """c, an average."""
        return float(self.top_k)

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table for one batch of tokens."""
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.softmax(dim=-1)
        valid_T = checked_mask(valid_T, x_TD.shape[0], x_TD.device)
        group_T = context.sequences(x_TD) if self.group == "sequence" else torch.zeros_like(valid_T, dtype=torch.int64)
        take_T = share_of_groups(group_T, valid_T, self.top_k / self.num_experts)
        wanted_TE = scores_TE.detach()
        if self.cap is not None:
            wanted_TE = _capped_plans(wanted_TE, group_T, valid_T, take_T, self.cap)
        chosen_TE = rank_for_experts(wanted_TE, group_T, valid_T) < take_T[:, None]
        return Routing.from_mask(chosen_TE & valid_T[:, None], scores_TE, logits_TE, scores_TE, valid_T)


def _capped_plans(score_TE: Tensor, group_T: Tensor, valid_T: Tensor, take_T: Tensor, cap: int) -> Tensor:
    plan_TE = torch.zeros_like(score_TE, dtype=torch.float64)
    for group in sorted(set(group_T[valid_T].tolist())):
        token_M = (valid_T & (group_T == group)).nonzero()[:, 0]
        plan_TE[token_M] = capped_plan(score_TE[token_M], int(take_T[token_M[0]]), cap)
    return plan_TE


@torch.no_grad()
def capped_plan(score_TE: Tensor, take: int, cap: int, *, entropy: float = 1e-3, max_steps: int = 100) -> Tensor:
    """How much of each token each expert should take, if no token may have more than ``cap`` experts.

    Approaches the greatest ``sum(plan * score) + entropy * H(plan)`` with ``take`` for every expert, at most ``cap``
    for every token, and entries from 0 to 1. Experts and tokens take turns: each side raises or lowers its prices so
    that its own limit and the 1 hold exactly, given the other's prices. That is the paper's problem, but not quite its
    algorithm: Dykstra's projections take the 1 as a third set, and 100 rounds of them leave an expert up to 14 of 16
    tokens short. Works on logarithms, in float64: scores over the entropy's weight reach 1,000.

    Args:
        score_TE: what each expert gains from each token.
        take: tokens for each expert, at most T.
        cap: experts for each token at most.
        entropy: weight of the entropy, lambda in the paper.
        max_steps: turns, fewer once the tokens' prices have settled.
    Shape:
        ``(T, E)`` -> ``(T, E)``, float64. Experts' sums are exact, tokens' within what the turns left.

    Source: Zhou et al. 2022, section 3.3: lambda 0.001, at most 100 rounds.
    """
    gain_TE = score_TE.double() / entropy
    token_T1 = torch.zeros_like(gain_TE[:, :1])
    for _ in range(max_steps):
        expert_1E = _price(gain_TE - token_T1, take, dim=0)
        before_T1 = token_T1
        token_T1 = _price(gain_TE - expert_1E, cap, dim=1).clamp_min(0)  # a token below its cap pays nothing
        if (token_T1 - before_T1).abs().max() <= 1e-6:
            break
    wish_TE = gain_TE - token_T1
    return (wish_TE - _price(wish_TE, take, dim=0)).clamp_max(0).exp()


def _price(wish_TE: Tensor, limit: int, dim: int) -> Tensor:
    """The p at which ``min(1, exp(wish - p))`` add up to the limit along a dimension, which stays, of size 1."""
    if limit >= wish_TE.shape[dim]:
        return wish_TE.amin(dim=dim, keepdim=True)
    top = wish_TE.topk(limit, dim=dim)
    rest = wish_TE.scatter(dim, top.indices, float("-inf")).logsumexp(dim=dim, keepdim=True)
    # If the m largest are at 1, all others share what is left of the limit; m is the first at which the next one fits.
    others = torch.logaddexp(top.values.flip(dim).logcumsumexp(dim).flip(dim), rest)
    left = torch.arange(limit, 0, -1, dtype=wish_TE.dtype, device=wish_TE.device).log()
    price = others - (left[:, None] if dim == 0 else left)
    return price.gather(dim, (top.values <= price).int().argmax(dim=dim, keepdim=True))
