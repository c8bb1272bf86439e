"""The loss that teaches strictly balanced gates their thresholds (Shazeer 2017, appendix F)."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.routing import Routing, missing_extra


def threshold_loss(routing: Routing) -> Tensor:
    """How far evaluation's choice by threshold is from the batch's: 0 where both choose alike, else positive.

    Summed over experts and averaged over tokens (the paper sums over both):
    ``mean_t sum_e (1[g_te > t_e] - chosen_te) (g_te - t_e)``. It moves the thresholds and, as written, the gates: down
    for tokens above the threshold that were not chosen, up for those below that were. It has no value at balance, as
    there is no imbalance; 0 in evaluation.

    Raises:
        ConfigError: if the router has no thresholds.

    Source: Shazeer 2017, eq. 20.
    """
    if "threshold_E" not in routing.extras:
        raise missing_extra("threshold_E", "threshold_loss", "BatchwiseRouter")
    margin_TE = routing.scores_TE - routing.extras["threshold_E"]
    chosen_TE = torch.zeros_like(margin_TE, dtype=torch.bool)
    chosen_TE[routing.token_N, routing.expert_N] = True
    differs_TE = (margin_TE > 0).to(margin_TE.dtype) - chosen_TE.to(margin_TE.dtype)
    # masked_fill, not a product: what padding holds may be no number.
    gap_TE = (differs_TE * margin_TE).masked_fill(~routing.valid_T[:, None], 0)
    return gap_TE.sum() / routing.valid_T.sum().clamp_min(1)
