"""Balance losses: pure functions from a Routing to an unscaled scalar, one layer at a time.

Each says how it is normalised, because that is where implementations differ: at perfect balance `switch_loss` is 1,
while transformers' ``load_balancing_loss_func`` is K for the same routing and averages layers before it multiplies.
All count the rows that dispatch gets, dropped ones too, and leave padding out.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    return _switch_loss_of(_statistics(routing, _as_one_sequence(routing), num_sequences=1))


def sequence_loss(routing: Routing) -> Tensor:
    """The Switch loss of each sequence alone, averaged over sequences that hold a token.

    1 at perfect balance within every sequence. A routing that names no sequences is read as one sequence. The load is
    counted from the rows that were dispatched; the paper's indicator leaves the selection bias out.

    Source: DeepSeek-V3 eq. 17 to 20; DeepSeek-V2 section 2.2.3 computes its expert loss like this too.
    """
    return _switch_loss_of(sequence_statistics(routing))


def global_batch_loss(routing: Routing, load_E: Tensor | None = None) -> Tensor:
    """The Switch loss with the load of the global batch: all ranks and micro-batches of an optimizer step.

    ``E * sum_e f_e P_e``, where ``f_e`` is the share of the global batch's rows (no gradient) and ``P_e`` the mean
    probability of this micro-batch. The mean of these losses over equally large micro-batches is the loss of all their
    tokens together, exactly, as the loss is linear in P; so experts may specialise within a micro-batch. 1 at perfect
    global balance for every K.

    Args:
        routing: of one micro-batch.
        load_E: rows per expert of the global batch, or as many of its micro-batches as have been seen. None reads
            ``routing.extras["global_load_E"]``, which a trainer stamps; without it, this batch stands for the whole.

    Source: Qiu et al. 2025, "Demons in the Detail", eq. 2 to 4.
    """
    if load_E is None:
        load_E = routing.extras.get("global_load_E", routing.load_E)
    batch = _statistics(routing, _as_one_sequence(routing), num_sequences=1)
    load_E = load_E.detach().to(batch.mean_SE.device, batch.mean_SE.dtype)
    return routing.num_experts * (load_E / load_E.sum().clamp_min(1) * batch.mean_SE[0]).sum()


def gshard_loss(routing: Routing) -> Tensor:
    """The Switch loss of first choices alone: ``E * sum_e f_e P_e`` with ``f_e`` the share of first choices.

    1 at perfect balance, as in Mesh TensorFlow and DeepSpeed; GShard's algorithm 1 has ``1 / E`` in place of ``E``, and
    so ``1 / E^2`` of this. Second choices are left out and rows that capacity drops are counted, as in all of these.
    The tokens are all that it is given; GShard and Mesh TensorFlow average over groups of tokens, each with a loss of
    its own.

    Source: GShard algorithm 1, line 13; Mesh TensorFlow, ``_top_2_gating``.
    """
    first_N = routing.choice_N == 0
    return _switch_loss_of(_statistics(routing, _as_one_sequence(routing), num_sequences=1, counted_N=first_N))


def z_loss(routing: Routing) -> Tensor:
    """Keep logits small, so that rounding them changes little: mean over tokens of ``logsumexp(logits)^2``.

    Has no value of balance: uniform logits of 0 give ``ln(E)^2``.

    Source: ST-MoE eq. 5.
    """
    logits_TE = routing.logits_TE.masked_fill(~routing.valid_T[:, None], 0)
    square_T = logits_TE.logsumexp(dim=-1).square()
    return (square_T * routing.valid_T).sum() / routing.valid_T.sum().clamp_min(1)


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """What balance losses compare, sequence by sequence.

    Attributes:
        share_SE: share of the sequence's rows that each expert got; no gradient.
        mean_SE: mean probability over the sequence's tokens, differentiable.
        tokens_S: tokens of each sequence, padding left out; losses leave a sequence without any out of their mean.
        sequence_T: which of the sequences each token belongs to.
    """

    share_SE: Tensor
    mean_SE: Tensor
    tokens_S: Tensor
    sequence_T: Tensor

    def mean(self, loss_S: Tensor) -> Tensor:
        """Mean over the sequences that hold a token of losses that are 0 for the others."""
        return loss_S.sum() / (self.tokens_S > 0).sum().clamp_min(1)


def sequence_statistics(routing: Routing) -> Statistics:
    """Statistics of each sequence; a routing that names no sequences is read as one."""
    if routing.sequence_T is None:
        return _statistics(routing, _as_one_sequence(routing), num_sequences=1)
    return _statistics(routing, routing.sequence_T, _room_for_sequences(routing.sequence_T))


def _room_for_sequences(sequence_T: Tensor) -> int:
    """How many sequences there may be: their number, or where asking for it has the host wait, as many as tokens.

    A sequence without tokens is left out of every mean, so that losses are the same.
    """
    num_tokens = sequence_T.shape[0]
    if sequence_T.device.type != "cpu" or torch.compiler.is_compiling():
        return max(1, num_tokens)
    return int(sequence_T.max()) + 1 if num_tokens else 1


def _as_one_sequence(routing: Routing) -> Tensor:
    return torch.zeros_like(routing.valid_T, dtype=torch.int64)


def _switch_loss_of(statistics: Statistics) -> Tensor:
    num_experts = statistics.mean_SE.shape[1]
    return statistics.mean(num_experts * (statistics.share_SE * statistics.mean_SE).sum(dim=-1))


def _statistics(
    routing: Routing, sequence_T: Tensor, num_sequences: int, *, counted_N: Tensor | None = None
) -> Statistics:
    """Of the rows that ``counted_N`` marks, or all."""
    counted_N = routing.valid_N if counted_N is None else routing.valid_N & counted_N
    num_experts = routing.num_experts
    probability_TE = routing.probability_TE.masked_fill(~routing.valid_T[:, None], 0)
    dtype = probability_TE.dtype
    shape_SE = (num_sequences, num_experts)
    with torch.no_grad():
        cell_N = sequence_T[routing.token_N] * num_experts + routing.expert_N
        load_SE = torch.zeros(num_sequences * num_experts, dtype=torch.int64, device=cell_N.device)
        load_SE = load_SE.index_add_(0, cell_N, counted_N.to(torch.int64)).view(shape_SE).to(dtype)
        tokens_S = torch.zeros(num_sequences, dtype=torch.int64, device=cell_N.device)
        tokens_S = tokens_S.index_add_(0, sequence_T, routing.valid_T.to(torch.int64)).to(dtype)
        share_SE = load_SE / load_SE.sum(dim=-1, keepdim=True).clamp_min(1)
    summed_SE = torch.zeros(shape_SE, dtype=dtype, device=probability_TE.device)
    summed_SE = summed_SE.index_add(0, sequence_T, probability_TE)
    mean_SE = summed_SE / tokens_S.clamp_min(1)[:, None]
    return Statistics(share_SE, mean_SE, tokens_S, sequence_T)
