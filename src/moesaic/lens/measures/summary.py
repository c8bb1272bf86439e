"""All measures of a trace at once, as a dictionary that JSON can hold."""

from __future__ import annotations

from typing import Any

from moesaic.lens.measures import balance, counts, neighbours
from moesaic.lens.measures.coactivation import coactivation
from moesaic.lens.measures.domain_share import domain_share, domain_specialisation
from moesaic.lens.measures.guessing import WORDS_OR_SUBJECTS, next_layer, words_or_subjects
from moesaic.lens.measures.information import about_domain, about_next_layer, about_token
from moesaic.lens.measures.vocabulary import vocabulary_specialisation
from moesaic.telemetry.trace import RoutingTrace

_OF_A_LAYER = (
    balance.load_share,
    balance.max_over_mean,
    balance.max_violation,
    balance.coefficient_of_variation,
    balance.load_entropy,
    balance.dead_experts,
    balance.drop_rate,
    balance.experts_per_token,
)


def summary(trace: RoutingTrace, *, num_shuffles: int = 99, num_bins: int = 8) -> dict[str, Any]:
    """Every measure of a trace, each with what chance would give and its n.

    Args:
        num_shuffles: tries of chance for each mutual information; those about domains, which are quick, take twenty
            times as many.
        num_bins: stretches of positions to look at.
    Returns:
        For each measure :meth:`Measured.to_dict`, or for each layer :meth:`Information.to_dict`; ``by_domain`` and
        ``by_position`` hold the measures of balance for each part.
    """
    every = {
        **_balance(trace),
        "domain_share": domain_share(trace).to_dict(),
        "domain_specialisation": domain_specialisation(trace).to_dict(),
        "vocabulary_specialisation": vocabulary_specialisation(trace).to_dict(),
        "coactivation": coactivation(trace).to_dict(),
        "next_layer": next_layer(trace).to_dict(),
    }
    for name, first_only in (("repetition_of_first", True), ("repetition_of_any", False)):
        every[name] = neighbours.repetition(trace, first_only=first_only).to_dict()
        every[f"{name}_in_a_text"] = neighbours.repetition(trace, first_only=first_only, same_text=True).to_dict()
    guesses = words_or_subjects(trace).to_dict()
    every["words_or_subjects"] = {"from": list(WORDS_OR_SUBJECTS), **guesses}
    told = {
        "about_domain": about_domain(trace, num_shuffles=20 * num_shuffles),
        "about_token": about_token(trace, num_shuffles=num_shuffles),
        "about_next_layer": about_next_layer(trace, num_shuffles=num_shuffles),
    }
    return {
        "layers": list(trace.metadata.layer_names),
        "num_experts": list(trace.metadata.num_experts),
        "domains": list(counts.domains(trace)),
        "num_tokens": trace.num_tokens,
        "num_rows": trace.num_rows,
        **every,
        **{name: [one.to_dict() for one in layers] for name, layers in told.items()},
        "by_domain": {name: _balance(part) for name, part in counts.by_domain(trace).items()},
        "by_position": {name: _balance(part) for name, part in counts.by_position(trace, num_bins).items()},
    }


def _balance(trace: RoutingTrace) -> dict[str, Any]:
    return {measure.__name__: measure(trace).to_dict() for measure in _OF_A_LAYER}
