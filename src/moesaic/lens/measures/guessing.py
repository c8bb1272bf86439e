"""Guessing: how well an expert can be foretold, on text that the guess was not made from.

A guess is the commonest first choice under a condition: under the same token, in the same domain, after the same expert
of the layer before. It is learned from every other sequence and scored on the rest, then the other way round, so that a
rare condition cannot be right by having seen its own answer. Chance is the guess without condition.
"""

from __future__ import annotations

import numpy as np

from moesaic.lens.measures.measured import IntArray, Measured
from moesaic.lens.measures.pairs import first_choices, pairs
from moesaic.lens.measures.reading import Reading, reading, readings
from moesaic.telemetry.trace import RoutingTrace

WORDS_OR_SUBJECTS = ("token", "domain", "token and domain")
"""What :func:`words_or_subjects` guesses from, in its order."""


def next_layer(trace: RoutingTrace) -> Measured:
    """How often the first choice of layer l + 1 is the one that mostly follows layer l's first choice, shape (L - 1,).

    Held-out accuracy, over the tokens that both layers took; NaN where a trace has only one sequence.
    """
    parts = []
    for layer in range(trace.num_layers - 1):
        one, other = pairs(reading(trace, layer), reading(trace, layer + 1))
        parts.append(_guessed(other, (first_choices(one),)))
    return _measured(parts)


def words_or_subjects(trace: RoutingTrace) -> Measured:
    """How often a layer's first choice is guessed from the token, from the domain, and from both, shape (3, L).

    Held-out accuracy, in the order of ``WORDS_OR_SUBJECTS``. A token not met before is guessed as its domain is, or as
    the commonest where domains are not used; a token not met in its domain as it is elsewhere. If token and domain
    together tell no more than the token, the layer knows words, not subjects. Tokens of unknown id or domain are left
    out.
    """
    parts = []
    for read in readings(trace):
        read = read.take((read.token_T >= 0) & (read.domain_T >= 0))
        both_T = np.unique(read.token_T << 16 | read.domain_T, return_inverse=True)[1]
        token_T = np.unique(read.token_T, return_inverse=True)[1]
        conditions = ((token_T,), (read.domain_T,), (both_T, token_T, read.domain_T))
        parts.append([_guessed(read, condition) for condition in conditions])
    return Measured.stack([_measured([part[place] for part in parts]) for place in range(len(WORDS_OR_SUBJECTS))])


def _guessed(read: Reading, conditions: tuple[IntArray, ...]) -> tuple[float, float, int]:
    """Accuracy of guesses from the first condition that has been met, accuracy of the commonest, and tokens guessed."""
    first_T = first_choices(read)
    # By rank, not by number: recordings may number the sequences of one domain all even.
    half_T = np.unique(read.sequence_T, return_inverse=True)[1] % 2
    right, right_by_chance = 0, 0
    if not (half_T == 1).any():
        return float("nan"), float("nan"), 0
    for learned_T, scored_T in ((half_T == 0, half_T == 1), (half_T == 1, half_T == 0)):
        commonest = int(np.bincount(first_T[learned_T]).argmax())
        guess_T = np.full(len(first_T), -1)
        for condition_T in conditions:
            best_V = _best(condition_T, first_T, learned_T, read.num_experts)
            guess_T = np.where(guess_T < 0, best_V[condition_T], guess_T)
        guess_T = np.where(guess_T < 0, commonest, guess_T)
        right += int((guess_T == first_T)[scored_T].sum())
        right_by_chance += int((first_T[scored_T] == commonest).sum())
    return right / len(first_T), right_by_chance / len(first_T), len(first_T)


def _best(condition_T: IntArray, first_T: IntArray, learned_T: IntArray, num_experts: int) -> IntArray:
    """The commonest expert under each value of the condition, the lowest of equals; -1 where it was never met."""
    most = int(condition_T.max(initial=0)) + 1
    flat_T = condition_T[learned_T] * num_experts + first_T[learned_T]
    count_VE = np.bincount(flat_T, minlength=most * num_experts).reshape(most, num_experts)
    return np.where(count_VE.any(axis=1), count_VE.argmax(axis=1), -1)


def _measured(parts: list[tuple[float, float, int]]) -> Measured:
    value_L, chance_L, count_L = np.asarray(parts, dtype=np.float64).reshape(-1, 3).T
    return Measured.of(value_L, chance_L, count_L, "tokens, each guessed from the other half of the sequences")
