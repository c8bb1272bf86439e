"""Routing that is given, not learned: the table of a router without parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.errors import ShapeError
from moesaic.core.routing import Routing

LOG_OF_NOTHING = -100.0
"""Stands for the logarithm of 0: its exponential is 0 in float32, and it is finite."""


def given_choices(expert_TK: Tensor, num_experts: int, x_TD: Tensor, valid_T: Tensor | None) -> Routing:
    """The table of tokens whose K experts are given and count the same: every weight is ``1 / K``.

    Scores are those weights, 0 elsewhere; logits are the scores' logarithm, -100 standing for that of 0. So the
    probabilities are the choices themselves, a z-loss is 0, and nothing of either has a gradient: a balance loss has
    nothing to push here.

    Args:
        expert_TK: the given experts, each once per token.
        num_experts: E.
        x_TD: the tokens, whose precision the weights take, float32 or wider.
        valid_T: False where a token is padding.
    Raises:
        ShapeError: if the tokens are not in one dimension.
    """
    if x_TD.ndim != 2:
        raise ShapeError(
            f"x_TD must be (tokens, width), got {tuple(x_TD.shape)}. Flatten batch and position into one dimension."
        )
    num_tokens, top_k = expert_TK.shape
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    weight_TK = torch.full((num_tokens, top_k), 1 / top_k, dtype=dtype, device=x_TD.device)
    scores_TE = weight_TK.new_zeros(num_tokens, num_experts).scatter(1, expert_TK, weight_TK)
    return Routing.from_choices(expert_TK, weight_TK, scores_TE.log().clamp_min(LOG_OF_NOTHING), scores_TE, valid_T)
