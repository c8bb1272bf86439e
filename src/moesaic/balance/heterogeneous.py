"""Balance between experts of two kinds, where an imbalance is wanted (MoE++)."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.routing import Routing, missing_extra


def heterogeneous_loss(routing: Routing) -> Tensor:
    """``sum_e eta_e f_e P_e``: experts of small eta may take more.

    ``f_e`` is expert e's rows over the number of *tokens* (no gradient), ``P_e`` its mean probability. There is no
    factor E. Where every expert gets the same, of K choices it is ``K * sum_e eta_e / E^2``: with eta 1, K / E, which
    is the Switch loss times K / E.

    Raises:
        ConfigError: if the routing has no ``extras["eta_E"]``.

    Source: Jin et al. 2024, "MoE++", section 3.3.
    """
    if "eta_E" not in routing.extras:
        raise missing_extra("eta_E", "the heterogeneous loss", "routers.ResidualRouter")
    num_tokens = routing.valid_T.sum().clamp_min(1)
    probability_TE = routing.probability_TE.masked_fill(~routing.valid_T[:, None], 0)
    with torch.no_grad():
        rows_E = routing.load_E.to(probability_TE.dtype) / num_tokens
        pull_E = routing.extras["eta_E"].to(probability_TE.dtype) * rows_E
    return (pull_E * probability_TE.sum(dim=0)).sum() / num_tokens
