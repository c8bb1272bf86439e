"""The three errors of 1991, with their derivatives: who is to blame for a residual.

All experts together (cooperative), each for its part (competitive), or whoever explains the target best (mixture).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesaic.classic.family import Family
from moesaic.classic.mixture import normalized
from moesaic.classic.tree import Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Blame:
    """An error of each row, and its derivatives.

    Attributes:
        error_T: the error.
        d_log_gate_TE: by the log-probability of each expert.
        d_eta_TEO: by the experts' natural parameters.
        responsible_TE: whose noise a residual shows: the posterior, or the gate where the error knows none.
    """

    error_T: Floats
    d_log_gate_TE: Floats
    d_eta_TEO: Floats
    responsible_TE: Floats


Error = Callable[[Family, Floats, Floats, Floats, Floats], Blame]
"""Family, targets (T, O), log-gates (T, E), η (T, E, O), dispersion (E, O) -> the blame."""


def cooperative(family: Family, y_TO: Floats, log_gate_TE: Floats, eta_TEO: Floats, _dispersion_EO: Floats) -> Blame:
    """``‖d − Σ_i p_i o_i‖²``: every expert sees the residual of all (equation 1)."""
    gate_TE, mean_TEO = np.exp(log_gate_TE), family.mean(eta_TEO)
    residual_T1O = (y_TO - np.einsum("te,teo->to", gate_TE, mean_TEO))[:, None]
    return Blame(
        error_T=(residual_T1O**2).sum(axis=(1, 2)),
        d_log_gate_TE=-2 * gate_TE * (residual_T1O * mean_TEO).sum(axis=-1),
        d_eta_TEO=family.through_mean(mean_TEO, -2 * gate_TE[..., None] * residual_T1O),
        responsible_TE=gate_TE,
    )


def competitive(family: Family, y_TO: Floats, log_gate_TE: Floats, eta_TEO: Floats, _dispersion_EO: Floats) -> Blame:
    """``Σ_i p_i ‖d − o_i‖²``: what is expected when one expert is drawn by the gate (equation 2)."""
    gate_TE, mean_TEO = np.exp(log_gate_TE), family.mean(eta_TEO)
    residual_TEO = y_TO[:, None] - mean_TEO
    each_TE = gate_TE * (residual_TEO**2).sum(axis=-1)
    return Blame(
        error_T=each_TE.sum(axis=1),
        d_log_gate_TE=each_TE,
        d_eta_TEO=family.through_mean(mean_TEO, -2 * gate_TE[..., None] * residual_TEO),
        responsible_TE=gate_TE,
    )


def mixture(family: Family, y_TO: Floats, log_gate_TE: Floats, eta_TEO: Floats, dispersion_EO: Floats) -> Blame:
    """``−log Σ_i p_i P_i(d)``: the best expert is moved most (equation 3, with the Gaussian's constant)."""
    posterior_TE, loglik_T = normalized(log_gate_TE + family.loglik(y_TO, eta_TEO, dispersion_EO))
    return Blame(
        error_T=-loglik_T,
        d_log_gate_TE=-posterior_TE,
        d_eta_TEO=-posterior_TE[..., None] * family.score(y_TO, family.mean(eta_TEO), dispersion_EO),
        responsible_TE=posterior_TE,
    )


ERRORS: dict[str, Error] = {"cooperative": cooperative, "competitive": competitive, "mixture": mixture}
