"""What the numbers come to, in plain sentences; each is computed, and says what chance or balance would give."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesaic.lens import measures
from moesaic.lens.runs import Run
from moesaic.lens.study import Study
from moesaic.lens.tokens import one_line

_MOST_DOMAINS = 4


def verdict(study: Study, runs: Sequence[Run]) -> list[str]:
    """Who predicts better, how even the load is, what experts split by, how steady they are, and what was dropped.

    Sentences are plain text; whoever writes them into a page escapes them.
    """
    sentences = [
        _comparison(runs), _balance(study), _domains(study), _word_or_subject(study), _staying(study), _drops(study),
    ]  # fmt: skip
    return [sentence for sentence in sentences if sentence]


def twins(runs: Sequence[Run]) -> tuple[Run, Run] | None:
    """The first sparse and the first dense run that have both finished: half-way figures are not compared."""
    finished = [run for run in runs if run.is_finished]
    sparse = next((run for run in finished if run.is_sparse), None)
    dense = next((run for run in finished if not run.is_sparse), None)
    return (sparse, dense) if sparse and dense else None


def equal_terms(sparse: Run, dense: Run) -> str:
    """On what terms two runs compare: which of active parameters and tokens are equal, to within one per cent."""
    equal: list[str] = []
    unequal: list[str] = []
    for key, name in (("active_params", "active parameters"), ("tokens", "training tokens")):
        first, second = sparse.summary.get(key), dense.summary.get(key)
        if isinstance(first, int | float) and isinstance(second, int | float) and second > 0:
            if abs(first / second - 1) <= 0.01:
                equal.append(name)
            else:
                unequal.append(f"{first / second:.2f} times its {name}")
    parts = []
    if equal:
        parts.append("with equal " + " and equal ".join(equal))
    if unequal:
        parts.append("with " + " and ".join(unequal))
    return ", ".join(parts)


def _comparison(runs: Sequence[Run]) -> str:
    pair = twins(runs)
    if pair is None:
        alone = next((run for run in runs if "mean" in run.last_bits_per_byte), None)
        if alone is None:
            return ""
        value = alone.last_bits_per_byte["mean"]
        return f"{one_line(alone.caption)}: {value:.3f} bits for a byte of held-out text; guessing needs 8."
    sparse, dense = (run.last_bits_per_byte for run in pair)
    difference = 100 * (sparse["mean"] / dense["mean"] - 1)
    numbers = f"{sparse['mean']:.3f} against {dense['mean']:.3f} bits per byte, {abs(difference):.1f} % "
    terms = equal_terms(*pair)
    terms = f", {terms}" if terms else ""
    if abs(difference) < 0.1:
        return f"The mixture of experts and its dense twin predict held-out text equally well: {numbers}apart{terms}."
    better = difference < 0
    both = [name for name in sparse if name in dense and name != "mean"]
    ahead = [name for name in both if (sparse[name] < dense[name]) == better]
    where = "in every domain" if len(ahead) == len(both) else f"in {_listed(ahead)} but not in the other domains"
    return (
        f"The mixture of experts predicts held-out text {'better' if better else 'worse'} than its dense twin: "
        f"{numbers}{'fewer' if better else 'more'}{terms}."
        + (f" It is {'ahead' if better else 'behind'} {where}." if both else "")
    )


def _balance(study: Study) -> str:
    layer = int(np.nanargmax(study.worst.value))
    worst = float(study.worst.value[layer])
    words = ((1.25, "evenly"), (1.75, "fairly evenly"), (3.0, "unevenly"), (float("inf"), "very unevenly"))
    word = next(word for limit, word in words if worst < limit)
    where = f" ({study.labels[layer]})" if study.trace.num_layers > 1 else ""
    in_use = set(np.unique(study.trace.layer).tolist())
    idle = [pair for pair in study.idle if pair[0] in in_use]
    total = sum(count for number, count in enumerate(study.trace.metadata.num_experts) if number in in_use)
    rest = f"{len(idle)} of the {total} experts got nothing at all" if idle else f"none of the {total} experts is idle"
    return (
        f"The work is spread {word}: the busiest expert of the most uneven layer{where} takes {worst:.2f} times the "
        f"average load (1 is perfect), and {rest}."
    )


def _domains(study: Study) -> str:
    domain = study.about_domain
    layers = [number for number, value in enumerate(domain) if value.ceiling > 0]
    if not layers:
        return ""
    layer = max(layers, key=lambda number: domain[number].bits - domain[number].chance)
    best = domain[layer]
    told = (
        f"of the {best.ceiling:.2f} bits that name a token's domain, its expert in {study.labels[layer]} "
        f"tells {best.bits:.3f} (chance {best.chance:.3f})"
    )
    # The layer was picked as the best of several, so each gets its part of the 5 %.
    if best.p_value * len(layers) > 0.05:
        return f"Experts do not split by domain as far as this trace can tell: {told}."
    part = (best.bits - best.chance) / best.ceiling
    words = ((0.02, "hardly split"), (0.1, "split slightly"), (0.4, "split clearly"), (2.0, "split almost entirely"))
    word = next(word for limit, word in words if part < limit)
    takers = sorted(measures.takers(study.trace, layer), key=lambda taker: taker.average - taker.share)[:_MOST_DOMAINS]
    took = [
        f"{one_line(taker.domain)} leans to expert {taker.expert} ({100 * taker.share:.0f} % of its choices, where the "
        f"average domain has {100 * taker.average:.0f} %)"
        for taker in takers
    ]
    return f"Experts {word} by domain: {told}." + (f" There {_joined(took)}." if part >= 0.02 else "")


def _word_or_subject(study: Study) -> str:
    """Held-out guesses of the expert, averaged over the layers."""
    value_3L, chance_L = study.guessed.value, study.guessed.chance[0]
    known = np.isfinite(value_3L).all(axis=0)
    if not known.any() or len(study.domains) < 2:
        return ""
    word, subject, both = (100 * value_3L[:, known].mean(axis=1)).tolist()
    chance = 100 * float(chance_L[known].mean())
    follow = "the word more than the subject" if word > subject else "the subject more than the word"
    if max(word, subject) - chance < 1:
        follow = "neither words nor subjects"
    return (
        f"Experts follow {follow}: from the token itself its first-choice expert is guessed right in {word:.0f} % of "
        f"cases, from its domain in {subject:.0f} %, from both in {both:.0f} %, and from nothing in {chance:.0f} %, "
        "averaged over the layers and on text that the guesses were not made from."
    )


def _staying(study: Study) -> str:
    excess_L = study.stays.value - study.stays.chance
    if not np.isfinite(excess_L).any():
        return ""
    layer = int(np.nanargmax(np.abs(excess_L)))
    value, chance = float(study.stays.value[layer]), float(study.stays.chance[layer])
    often = "more often than" if value > chance else "less often than"
    if abs(value - chance) < 0.01:
        often = "as often as"
    return (
        f"A token keeps the first-choice expert of the token before it {often} chance would have it: "
        f"{100 * value:.0f} % of the time against {100 * chance:.0f} % in {study.labels[layer]}, where it differs most."
    )


def _drops(study: Study) -> str:
    dropped = int((~study.trace.kept).sum())
    if not dropped:
        return ""
    layer = int(np.nanargmax(study.dropped.value))
    return (
        f"Experts had no room for {100 * dropped / study.trace.num_rows:.2g} % of the choices, "
        f"{100 * study.dropped.value[layer]:.2g} % in {study.labels[layer]}, where it was worst."
    )


def _listed(parts: Sequence[str]) -> str:
    return _joined([one_line(part) for part in parts])


def _joined(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]])) if parts else ""
