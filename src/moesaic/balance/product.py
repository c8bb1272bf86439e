"""Balance by the product of the experts' mean weights (MoLE)."""

from __future__ import annotations

import math

from torch import Tensor

from moesaic.core.routing import Routing


def product_loss(routing: Routing) -> Tensor:
    """``-log(q_1 q_2 ... q_E)``, ``q_e`` the mean of expert e's probability over tokens.

    Smallest, ``E ln E``, where all means are equal. The paper takes the mean over the blocks of the model; here each
    layer has a loss of its own, so that none makes up for another.

    Source: Wu et al. 2024, "Mixture of LoRA Experts", eq. 10.
    """
    num_tokens = routing.valid_T.sum()
    # By logarithms: a mean that underflows would make the loss infinite and end its gradient.
    log_TE = routing.logits_TE.log_softmax(dim=-1)
    log_TE = log_TE[routing.valid_T]
    if log_TE.shape[0] == 0:
        return log_TE.sum()
    return -(log_TE.logsumexp(dim=0) - math.log(int(num_tokens))).sum()
