"""Which experts a domain of text gets: the two definitions of the literature, and who takes most above the average."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesaic.lens.measures.counts import NO_DOMAIN, domains, exists_LE, load_by_domain
from moesaic.lens.measures.measured import FloatArray, Measured, divide
from moesaic.lens.measures.reading import readings
from moesaic.telemetry.trace import RoutingTrace


def domain_share(trace: RoutingTrace) -> Measured:
    """How a domain's choices split over the experts, shape (L, Q, E), domains as :func:`domains` orders them.

    ``share[l, q, e] = load[l, q, e] / sum_e' load[l, q, e']``: over all choices, so that chance is ``1 / E`` whatever
    the router's top-k. NaN where a domain has no rows.

    Source:
        Jiang et al. 2024, arXiv:2401.04088, section 5.
    """
    load_LQE = load_by_domain(trace)
    total_LQ1 = np.nansum(load_LQE, axis=2, keepdims=True)
    num_experts_L = exists_LE(trace).sum(axis=1)
    return Measured.of(divide(load_LQE, total_LQ1), 1 / num_experts_L[:, None, None], total_LQ1, "choices")


def domain_specialisation(trace: RoutingTrace, *, first_only: bool = False) -> Measured:
    """What part of a domain's tokens each expert is among the chosen of, shape (L, Q, E).

    ``N(e, q) / N(q)``: tokens of domain q that have e among their K experts over all tokens of q, so that an expert's
    values over domains compare however much text each has, and chance is ``K / E``. With ``first_only``, K is 1.

    Source:
        Muennighoff et al. 2024, arXiv:2409.02060, section 5.3.
    """
    names = domains(trace)
    index_Q = [trace.metadata.domains.index(name) if name != NO_DOMAIN else -1 for name in names]
    exists = exists_LE(trace)
    value_LQE = np.full((len(exists), len(names), exists.shape[1]), np.nan)
    chance_LQE, tokens_LQ1 = np.full_like(value_LQE, np.nan), np.zeros((*value_LQE.shape[:2], 1), dtype=np.int64)
    for layer, read in enumerate(readings(trace)):
        num_experts = read.num_experts
        for place, index in enumerate(index_Q):
            expert_TK = read.expert_TK[read.domain_T == index, : 1 if first_only else None]
            tokens_LQ1[layer, place] = tokens = len(expert_TK)
            if tokens:
                taken_E = np.bincount(expert_TK[expert_TK >= 0], minlength=num_experts)
                value_LQE[layer, place, :num_experts] = taken_E / tokens
                chance_LQE[layer, place] = taken_E.sum() / tokens / num_experts
    return Measured.of(value_LQE, chance_LQE, tokens_LQ1, "tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Taker:
    """The expert that takes more of a domain than of the average one, and both shares."""

    layer: int
    domain: str
    expert: int
    share: float
    average: float


def takers(trace: RoutingTrace, layer: int) -> list[Taker]:
    """For each domain the expert with the largest ``share[l, q, e] - mean_q' share[l, q', e]`` in this layer.

    The difference and not the ratio, so that an expert that hardly works at all cannot win.
    """
    share_QE = domain_share(trace).value[layer]
    average_E = _mean_over_domains(share_QE)
    found = []
    for index, name in enumerate(domains(trace)):
        if name == NO_DOMAIN or np.isnan(share_QE[index]).all():
            continue
        expert = int(np.nanargmax(share_QE[index] - average_E))
        share, average = float(share_QE[index, expert]), float(average_E[expert])
        found.append(Taker(layer=layer, domain=name, expert=expert, share=share, average=average))
    return found


def _mean_over_domains(share_QE: FloatArray) -> FloatArray:
    known_QE = ~np.isnan(share_QE)
    return divide(np.where(known_QE, share_QE, 0).sum(axis=0), known_QE.sum(axis=0))
