"""Balance losses: pure functions from a Routing to an unscaled scalar, one layer at a time.

Each says how it is normalised, because that is where implementations differ: at perfect balance `switch_loss` is 1,
while transformers' ``load_balancing_loss_func`` is K for the same routing and averages layers before it multiplies.
All count the rows that dispatch gets, dropped ones too, and leave padding out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.routing import Routing


def switch_loss(routing: Routing) -> Tensor:
    """Push probability away from the experts that are busiest: ``E * sum_e f_e P_e``.

    ``f_e`` is the share of rows that expert e got (no gradient), ``P_e`` its mean probability over tokens.
    1 at perfect balance for every K, at most E. A coefficient of transformers, whose loss pools L layers, times K / L
    pulls as hard here, where each layer has a loss of its own.

    Source: Switch Transformer eq. 4 to 6 for K=1; DeepSeekMoE eq. 12 to 14 for any K.
    """
    one_sequence_T = torch.zeros_like(routing.valid_T, dtype=torch.int64)
    return _balance_per_sequence(routing, one_sequence_T, num_sequences=1)


def sequence_loss(routing: Routing) -> Tensor:
    """The Switch loss of each sequence alone, averaged over sequences that hold a token.

    1 at perfect balance within every sequence. A routing that names no sequences is read as one sequence. The load is
    counted from the rows that were dispatched; the paper's indicator leaves the selection bias out.

    Source: DeepSeek-V3 eq. 17 to 20; DeepSeek-V2 section 2.1.3 computes its expert loss like this too.
    """
    if routing.sequence_T is None:
        return switch_loss(routing)
    num_sequences = int(routing.sequence_T.max()) + 1 if routing.num_tokens else 1
    return _balance_per_sequence(routing, routing.sequence_T, num_sequences)


def z_loss(routing: Routing) -> Tensor:
    """Keep logits small, so that rounding them changes little: mean over tokens of ``logsumexp(logits)^2``.

    Has no value of balance: uniform logits of 0 give ``ln(E)^2``.

    Source: ST-MoE eq. 5.
    """
    logits_TE = routing.logits_TE.masked_fill(~routing.valid_T[:, None], 0)
    square_T = logits_TE.logsumexp(dim=-1).square()
    return (square_T * routing.valid_T).sum() / routing.valid_T.sum().clamp_min(1)


def _balance_per_sequence(routing: Routing, sequence_T: Tensor, num_sequences: int) -> Tensor:
    """``mean over sequences of E * sum_e f_se P_se``; sequences without a valid token are left out."""
    num_experts = routing.num_experts
    probability_TE = routing.probability_TE.masked_fill(~routing.valid_T[:, None], 0)
    dtype = probability_TE.dtype
    shape_SE = (num_sequences, num_experts)
    with torch.no_grad():
        cell_N = sequence_T[routing.token_N] * num_experts + routing.expert_N
        load_SE = torch.zeros(num_sequences * num_experts, dtype=torch.int64, device=cell_N.device)
        load_SE = load_SE.index_add_(0, cell_N, routing.valid_N.to(torch.int64)).view(shape_SE).to(dtype)
        tokens_S = torch.zeros(num_sequences, dtype=torch.int64, device=cell_N.device)
        tokens_S = tokens_S.index_add_(0, sequence_T, routing.valid_T.to(torch.int64)).to(dtype)
        share_SE = load_SE / load_SE.sum(dim=-1, keepdim=True).clamp_min(1)
    summed_SE = torch.zeros(shape_SE, dtype=dtype, device=probability_TE.device)
    summed_SE = summed_SE.index_add(0, sequence_T, probability_TE)
    mean_SE = summed_SE / tokens_S.clamp_min(1)[:, None]
    return num_experts * (share_SE * mean_SE).sum() / (tokens_S > 0).sum().clamp_min(1)
