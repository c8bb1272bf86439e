"""Balance: how evenly a layer's work lies on its experts. Experts that got nothing count in every mean.

Chance is a router without opinion: each token of the trace takes its K experts at random, every set of K as likely as
any other. Even that gives no expert exactly the same load, the less so the fewer the tokens.
"""

from __future__ import annotations

import numpy as np

from moesaic.lens.measures.counts import exists_LE, load, rows_L
from moesaic.lens.measures.measured import FloatArray, IntArray, Measured, divide
from moesaic.lens.measures.reading import num_tokens_L, readings
from moesaic.telemetry.trace import RoutingTrace

_DRAWS = 400


def load_share(trace: RoutingTrace) -> Measured:
    """The part of a layer's choices that each expert got: ``load[l, e] / sum_e' load[l, e']``; chance is ``1 / E``."""
    load_LE = load(trace)
    share_LE = divide(load_LE, np.nansum(load_LE, axis=1, keepdims=True))
    return Measured.of(share_LE, 1 / _num_experts_L(trace)[:, None], rows_L(trace)[:, None], "choices")


def max_over_mean(trace: RoutingTrace) -> Measured:
    """``max_e load[l, e] / (sum_e load[l, e] / E)`` of each layer: 1 is perfect balance, ``E`` the worst.

    Chance is the mean over 400 draws of a random router's loads.
    """
    return Measured.of(max_over_mean_of(load(trace)), _chance_of_max(trace), rows_L(trace), "choices")


def max_violation(trace: RoutingTrace) -> Measured:
    """``MaxVio = (max_e load[l, e] - mean_e load[l, e]) / mean_e load[l, e]``: 0 is perfect balance.

    Source:
        Wang et al. 2024, arXiv:2408.15664, section 4.1.
    """
    measured = max_over_mean(trace)
    return Measured.of(measured.value - 1, measured.chance - 1, measured.count, measured.counted)


def coefficient_of_variation(trace: RoutingTrace) -> Measured:
    """Standard deviation of the loads over their mean, both over all E experts: 0 is perfect balance.

    Chance is ``sqrt((E - K) / (T K))`` for T tokens with K experts each, the root of the expected square.

    Source:
        Shazeer et al. 2017, arXiv:1701.06538, equation 7 (there squared, as a loss).
    """
    num_experts_L, tokens_L, rows = _num_experts_L(trace), num_tokens_L(trace), rows_L(trace)
    chance_L = np.sqrt(divide(num_experts_L - divide(rows, tokens_L), rows))
    return Measured.of(coefficient_of_variation_of(load(trace)), chance_L, rows, "choices")


def load_entropy(trace: RoutingTrace) -> Measured:
    """Entropy of the loads as a part of what it can be: ``-sum_e p_e ln p_e / ln E``; 1 is perfect balance.

    Chance is less than 1 by the bias of counting: ``1 - (E - K) / (2 T K ln E)`` (Miller 1955, for draws without
    replacement). A layer of one expert has no entropy to speak of: NaN.
    """
    num_experts_L, tokens_L, rows = _num_experts_L(trace), num_tokens_L(trace), rows_L(trace)
    spare_L = num_experts_L - divide(rows, tokens_L)
    chance_L = 1 - divide(spare_L, 2 * rows * np.log(num_experts_L))
    return Measured.of(load_entropy_of(load(trace)), chance_L, rows, "choices")


def dead_experts(trace: RoutingTrace) -> Measured:
    """How many experts of each layer got no row at all; chance is ``E (1 - K / E)^T``. NaN where a layer has no rows.

    An expert without a row in a short trace need not be dead: see whether chance leaves any idle too.
    """
    num_experts_L, tokens_L, rows = _num_experts_L(trace), num_tokens_L(trace), rows_L(trace)
    idle_L = (load(trace) == 0).sum(axis=1)
    missed_L = 1 - divide(rows, tokens_L * num_experts_L)
    return Measured.of(np.where(rows > 0, idle_L, np.nan), num_experts_L * missed_L**tokens_L, rows, "choices")


def idle_experts(trace: RoutingTrace) -> list[tuple[int, int]]:
    """(layer, expert) of every expert that got no row in this trace."""
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(load(trace) == 0)]


def drop_rate(trace: RoutingTrace) -> Measured:
    """``#{rows dropped by capacity} / #{rows}`` of each layer; NaN where a layer has no rows.

    What chance would drop depends on a capacity that a trace does not know: its ``chance`` is NaN.
    """
    rows = rows_L(trace)
    dropped_L = np.bincount(trace.layer[~trace.kept], minlength=trace.num_layers)
    return Measured.of(divide(dropped_L, rows), np.nan, rows, "choices")


def experts_per_token(trace: RoutingTrace) -> Measured:
    """``#{rows of layer l} / #{tokens of layer l}``: top-k, or its average where it differs by token.

    Tokens that no expert of the layer took have no row there and are not counted. Nothing to compare with: its
    ``chance`` is NaN.
    """
    tokens_L = num_tokens_L(trace)
    return Measured.of(divide(rows_L(trace), tokens_L), np.nan, tokens_L, "tokens")


def choices_of_tokens(trace: RoutingTrace) -> IntArray:
    """How many tokens have 0, 1, 2 … experts in each layer, shape (L, most + 1): what top-p and MoE++ decide.

    A token counts as having none where it has rows in another layer.
    """
    count_L = [np.bincount((layer.expert_TK >= 0).sum(axis=1), minlength=1) for layer in readings(trace)]
    table = np.zeros((trace.num_layers, max(map(len, count_L), default=1)), dtype=np.int64)
    for layer, count in enumerate(count_L):
        table[layer, : len(count)] = count
    table[:, 0] = trace.num_tokens - table.sum(axis=1)
    return table


def max_over_mean_of(load: FloatArray) -> FloatArray:
    """``max / mean`` over the last axis of any loads or shares, such as a run's history; NaN marks no expert."""
    exists = ~np.isnan(load)
    mean = divide(np.where(exists, load, 0).sum(axis=-1), exists.sum(axis=-1))
    return divide(np.where(exists, load, 0).max(axis=-1), mean)


def coefficient_of_variation_of(load: FloatArray) -> FloatArray:
    """Standard deviation over mean along the last axis of any loads or shares; NaN marks no expert."""
    exists = ~np.isnan(load)
    count = exists.sum(axis=-1)
    mean = divide(np.where(exists, load, 0).sum(axis=-1), count)
    square = np.where(exists, load - mean[..., None], 0) ** 2
    return divide(np.sqrt(divide(square.sum(axis=-1), count)), mean)


def load_entropy_of(load: FloatArray) -> FloatArray:
    """Entropy along the last axis of any loads or shares over its largest value, ``ln E``; NaN marks no expert."""
    exists = ~np.isnan(load)
    p = divide(np.where(exists, load, 0), np.where(exists, load, 0).sum(axis=-1, keepdims=True))
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)
    # Adding 0.0 turns -0.0 into 0.0.
    return divide(entropy, np.log(exists.sum(axis=-1))) + 0.0


def _num_experts_L(trace: RoutingTrace) -> IntArray:
    num_experts_L: IntArray = exists_LE(trace).sum(axis=1)
    return num_experts_L


def _chance_of_max(trace: RoutingTrace) -> FloatArray:
    """Mean of max/mean over random draws.

    Sets of K different experts spread the loads less than single draws do: their covariance is the multinomial's times
    ``(E - K) / (E - 1)``, by which its deviations are scaled.
    """
    rng = np.random.default_rng(0)
    chance_L = np.full(trace.num_layers, np.nan)
    for layer, (num_experts, rows, tokens) in enumerate(
        zip(_num_experts_L(trace).tolist(), rows_L(trace).tolist(), num_tokens_L(trace).tolist(), strict=True)
    ):
        if rows:
            drawn = rng.multinomial(rows, np.full(num_experts, 1 / num_experts), size=_DRAWS).max(axis=1)
            narrower = max(0.0, (num_experts - rows / tokens) / max(1, num_experts - 1)) ** 0.5
            chance_L[layer] = 1 + narrower * (drawn.mean() * num_experts / rows - 1)
    return chance_L
