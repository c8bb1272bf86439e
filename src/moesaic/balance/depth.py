"""The loss that lets a mixture of depths choose without seeing later tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.core.routing import Routing


def depth_loss(routing: Routing) -> Tensor:
    """Make the router's output positive where a token was chosen and negative where not.

    The binary cross-entropy between ``sigmoid(logits)`` and the rows of the table, which stand fast, averaged over
    valid tokens and experts. ``ln 2`` for a router that gives 0, 0 for one that is sure and right; says nothing about
    balance, which is given. Whatever router wrote the table is taught by it.

    Source: Raposo et al. 2024, "Mixture-of-Depths", section 3.5, the first of its two ways.
    """
    chosen_TE = torch.zeros_like(routing.logits_TE)
    chosen_TE[routing.token_N, routing.expert_N] = 1
    logits_TE = routing.logits_TE.masked_fill(~routing.valid_T[:, None], 0)
    loss_TE = F.binary_cross_entropy_with_logits(logits_TE, chosen_TE, reduction="none")
    counted_T1 = routing.valid_T[:, None].to(loss_TE.dtype)
    return (loss_TE * counted_T1).sum() / (counted_T1.sum() * routing.num_experts).clamp_min(1)
