"""Policy gradient: draws of experts that did better than usual become more likely."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.routing import Routing, missing_extra


def reinforce_loss(routing: Routing) -> Tensor:
    """REINFORCE with a baseline: ``-mean_t (r_t - b) log p(draw of t)``, whose gradient raises the expected reward.

    The reward ``r_t`` is ``routing.extras["reward_T"]``, minus the model's loss at the token, in nats, and the
    baseline b its mean over the batch's valid tokens, a constant: what a token earned beyond the others. (It holds a
    token's own reward, so the gradient is short by a factor of ``1 - 1/T``.) The draw's probability is that of its
    experts one after the other without replacement, ``prod_k p_k / (1 - p_1 - ... - p_(k-1))``. No value of balance:
    for equal rewards it is 0, and so is its gradient.

    Raises:
        ConfigError: if the routing has no rewards.

    Source: Williams 1992; Bengio et al. 2015, "Conditional Computation in Neural Networks for Faster Models"; Clark et
    al. 2022, RL-R.
    """
    if "reward_T" not in routing.extras:
        raise missing_extra(
            "reward_T", "The REINFORCE loss", "a model of moesaic.sparsify that is given labels, when its loss is known"
        )
    num_tokens = routing.valid_T.sum().clamp_min(1)
    with torch.no_grad():
        reward_T = routing.extras["reward_T"].to(routing.logits_TE).masked_fill(~routing.valid_T, 0)
        advantage_T = (reward_T - reward_T.sum() / num_tokens).masked_fill(~routing.valid_T, 0)
    log_probability_N = _log_probability(routing).masked_fill(~routing.valid_N, 0)
    return -(advantage_T[routing.token_N] * log_probability_N).sum() / num_tokens


def _log_probability(routing: Routing) -> Tensor:
    """Logarithm of each row's probability to be drawn, given the token's earlier draws."""
    logits_TE = routing.logits_TE
    never_TE = torch.full_like(logits_TE, routing.num_experts, dtype=torch.int64)
    drawn_TE = never_TE.index_put((routing.token_N, routing.expert_N), routing.choice_N)
    gone_NE = drawn_TE[routing.token_N] < routing.choice_N[:, None]
    left_NE = logits_TE[routing.token_N].masked_fill(gone_NE, float("-inf"))
    return left_NE.gather(1, routing.expert_N[:, None])[:, 0] - left_NE.logsumexp(dim=-1)
