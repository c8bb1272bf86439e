"""Saturation: how much two checkpoints agree on who takes which token of one text."""

from __future__ import annotations

import numpy as np

from moesaic.core.errors import ConfigError, DataError
from moesaic.lens.measures.measured import Measured
from moesaic.lens.measures.pairs import experts_as_bits, overlap
from moesaic.lens.measures.reading import Reading, reading
from moesaic.telemetry.trace import RoutingTrace


def saturation(trace: RoutingTrace, final: RoutingTrace, *, first_only: bool = False) -> Measured:
    """What part of the final checkpoint's experts an earlier one chose already, shape (L,).

    ``mean_i |E_t(i) ∩ E_T(i)| / |E_T(i)|`` over the tokens i that both recorded, with E_t and E_T the experts that the
    earlier and the final checkpoint gave them; with ``first_only`` only their best ones.

    Chance is what the two would share if each kept its loads but chose without regard to the token:
    ``sum_e P(e in E_t) · mean_i [e in E_T(i)] / |E_T(i)|``. It is ``K / E`` for even loads, and more if both prefer the
    same experts.

    Raises:
        ConfigError: if the two have other layers or other numbers of experts.
        DataError: if they have no token in common, or read different text.

    Source:
        Muennighoff et al. 2024, arXiv:2409.02060, section 5.1.
    """
    for name in ("layer_names", "num_experts"):
        if getattr(trace.metadata, name) != getattr(final.metadata, name):
            raise ConfigError(
                f"Saturation compares two checkpoints of one model, but the traces have different {name}: "
                f"{getattr(trace.metadata, name)} and {getattr(final.metadata, name)}. Record both from one model."
            )
    value_L, chance_L = np.full((2, trace.num_layers), np.nan)
    count_L = np.zeros(trace.num_layers, dtype=np.int64)
    for layer in range(trace.num_layers):
        early, late = _same_text(reading(trace, layer), reading(final, layer), trace.metadata.layer_names[layer])
        count_L[layer] = early.num_tokens
        if early.num_tokens:
            early_TK, late_TK = (read.expert_TK[:, : 1 if first_only else None] for read in (early, late))
            size_T = (late_TK >= 0).sum(axis=1)
            shared_T = overlap(*(experts_as_bits(one_TK, early.num_experts) for one_TK in (early_TK, late_TK)))
            value_L[layer] = (shared_T / size_T).mean()
            weight_TK = np.where(late_TK >= 0, 1 / size_T[:, None], 0)
            wanted_E = np.bincount(
                np.maximum(late_TK, 0).ravel(), weights=weight_TK.ravel(), minlength=early.num_experts
            )
            offered_E = np.bincount(early_TK[early_TK >= 0], minlength=early.num_experts)
            chance_L[layer] = wanted_E @ offered_E / early.num_tokens**2
    if not count_L.any():
        raise DataError(
            "Saturation needs two traces of one text, and these have no (sequence, position) in common. "
            "Record both checkpoints on the same batches, in the same order."
        )
    return Measured.of(value_L, chance_L, count_L, "tokens")


def _same_text(early: Reading, late: Reading, name: str) -> tuple[Reading, Reading]:
    """The tokens that both have, line by line."""
    _, first, second = np.intersect1d(early.place_T, late.place_T, assume_unique=True, return_indices=True)
    early, late = early.take(first), late.take(second)
    other = np.flatnonzero(early.token_T != late.token_T)
    if len(other):
        place = int(early.place_T[other[0]])
        raise DataError(
            f"Saturation needs two traces of one text, but in {name}, sequence {place >> 32}, position "
            f"{place & 0xFFFFFFFF}, one read token {early.token_T[other[0]]} and the other {late.token_T[other[0]]}. "
            "Record both checkpoints on the same batches, in the same order."
        )
    return early, late
