"""Pass after pass until nothing is gained: the loop that every way of fitting goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from moesaic.classic.mixture import Mixture


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What came of it.

    Attributes:
        mixture: the best one that was seen.
        curve: the objective before the first pass and after each.
        has_converged: whether the last pass gained less than the tolerance.
        loglik_curve: the log-likelihood at the same times, where the objective is another.
        held_out: number of experts and held-out log-likelihood of a row, of each tree on the way, if it changed.
    """

    mixture: Mixture
    curve: tuple[float, ...]
    has_converged: bool
    loglik_curve: tuple[float, ...] = ()
    held_out: tuple[tuple[int, float], ...] = ()

    @property
    def num_passes(self) -> int:
        """Over the data."""
        return len(self.curve) - 1

    @property
    def best(self) -> float:
        """What fits from several beginnings are compared by: rows held out, where trees differ in size, or else all."""
        return self.held_out[-1][1] if self.held_out else max(self.curve)


def climb(
    passes: Iterable[tuple[Mixture, float]],
    *,
    max_iter: int,
    tol: float,
    over: int = 1,
    measure: Callable[[Mixture], float] | None = None,
) -> Fit:
    """Follow the passes until they change the objective by less than ``tol``, or ``max_iter`` of them are done.

    Args:
        passes: a mixture and its objective, before the first pass and after each.
        max_iter: passes at most.
        tol: change of the objective that ends it; negative for never.
        over: passes that a change is looked at over.
        measure: the log-likelihood, where it is not the objective.
    """
    curve: list[float] = []
    measured: list[float] = []
    best: Mixture | None = None
    has_converged = False
    for mixture, value in passes:
        if best is None or value >= max(curve):
            best = mixture
        curve.append(value)
        if measure is not None:
            measured.append(measure(mixture))
        has_converged = len(curve) > over and abs(curve[-1] - curve[-1 - over]) < tol
        if has_converged or len(curve) > max_iter:
            break
    assert best is not None
    return Fit(mixture=best, curve=tuple(curve), has_converged=has_converged, loglik_curve=tuple(measured))
