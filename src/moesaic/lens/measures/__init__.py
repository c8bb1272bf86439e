"""What a routing trace says, as numbers: pure functions of its columns, each with its formula, its n and its chance."""

from moesaic.lens.measures.balance import (
    choices_of_tokens,
    coefficient_of_variation,
    coefficient_of_variation_of,
    dead_experts,
    drop_rate,
    experts_per_token,
    idle_experts,
    load_entropy,
    load_entropy_of,
    load_share,
    max_over_mean,
    max_over_mean_of,
    max_violation,
)
from moesaic.lens.measures.coactivation import coactivation
from moesaic.lens.measures.counts import NO_DOMAIN, by_domain, by_position, domains, exists_LE, load, load_by_domain
from moesaic.lens.measures.domain_share import Taker, domain_share, domain_specialisation, takers
from moesaic.lens.measures.guessing import WORDS_OR_SUBJECTS, next_layer, words_or_subjects
from moesaic.lens.measures.information import Information, about_domain, about_next_layer, about_token
from moesaic.lens.measures.measured import FloatArray, IntArray, Measured
from moesaic.lens.measures.neighbours import repetition, uniform_repetition
from moesaic.lens.measures.saturation import saturation
from moesaic.lens.measures.summary import summary
from moesaic.lens.measures.vocabulary import (
    PreferredToken,
    TokenTable,
    preferred_tokens,
    token_table,
    vocabulary_specialisation,
)

__all__ = [
    "NO_DOMAIN",
    "WORDS_OR_SUBJECTS",
    "FloatArray",
    "Information",
    "IntArray",
    "Measured",
    "PreferredToken",
    "Taker",
    "TokenTable",
    "about_domain",
    "about_next_layer",
    "about_token",
    "by_domain",
    "by_position",
    "choices_of_tokens",
    "coactivation",
    "coefficient_of_variation",
    "coefficient_of_variation_of",
    "dead_experts",
    "domain_share",
    "domain_specialisation",
    "domains",
    "drop_rate",
    "exists_LE",
    "experts_per_token",
    "idle_experts",
    "load",
    "load_by_domain",
    "load_entropy",
    "load_entropy_of",
    "load_share",
    "max_over_mean",
    "max_over_mean_of",
    "max_violation",
    "next_layer",
    "preferred_tokens",
    "repetition",
    "saturation",
    "summary",
    "takers",
    "token_table",
    "uniform_repetition",
    "vocabulary_specialisation",
    "words_or_subjects",
]
