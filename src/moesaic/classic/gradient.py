"""Gradient descent on the three errors: all rows at once or some at a time, with momentum, or by L-BFGS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import minimize

from moesaic.classic.data import Data
from moesaic.classic.expert import Differentiable, flattened, unflattened
from moesaic.classic.gate import along_paths, log_branches, through_gates
from moesaic.classic.irls import slopes
from moesaic.classic.mixture import Mixture
from moesaic.classic.noise import Noise
from moesaic.classic.objective import Blame, Error
from moesaic.classic.objective import mixture as mixture_error
from moesaic.classic.tree import Floats
from moesaic.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Gradient:
    """How a mixture is fitted.

    Attributes:
        error: what is descended.
        noise: how the variance is estimated. Under the mixture error it is descended with the rest, as a logarithm;
            the other errors know no noise, and it is measured afterwards.
        penalty: on half the squared slopes.
        learning_rate: step on the error of a row, on average.
        momentum: share of the last step that is taken again.
        batch_size: rows of a step, in an order drawn anew for each pass; None for all.
    """

    error: Error
    noise: Noise
    penalty: float = 0.0
    learning_rate: float = 0.1
    momentum: float = 0.0
    batch_size: int | None = None

    @property
    def learns_noise(self) -> bool:
        """Whether log φ is among the numbers that are descended on."""
        return self.error is mixture_error and self.noise.kind != "fixed"

    def passes(self, mixture: Mixture, data: Data, random: np.random.RandomState) -> Iterator[tuple[Mixture, float]]:
        """The mixture before the first pass over the data, after it, after the second …, each with its objective."""
        flat, speed = self.flat(mixture), np.zeros(1)
        while True:
            value, gradient = self.value(flat, mixture, data)
            if not np.isfinite(value):
                raise ConfigError(
                    f"Gradient descent needs a finite error, got {value} with learning_rate={self.learning_rate}. "
                    "Lower learning_rate, or take solver='lbfgs', which chooses its steps."
                )
            yield self.measured(self.at(flat, mixture), data), -value
            if self.batch_size is None:
                speed = self.momentum * speed - self.learning_rate * gradient
                flat = self._in_bounds(flat + speed, mixture)
                continue
            order = random.permutation(len(data.x_TD))
            for start in range(0, len(order), self.batch_size):
                batch = data.rows(order[start : start + self.batch_size])
                if batch.total > 0:
                    gradient = self.value(flat, mixture, batch, batch.total / data.total)[1]
                    speed = self.momentum * speed - self.learning_rate * gradient
                    flat = self._in_bounds(flat + speed, mixture)

    def lbfgs(
        self, mixture: Mixture, data: Data, *, max_iter: int, tol: float
    ) -> tuple[list[tuple[Mixture, float]], bool]:
        """The same by L-BFGS, and whether it came to an end by itself.

        One pass is one of its steps, which looks at the data once or a few times.
        """
        flat = self.flat(mixture)
        found = [(self.measured(mixture, data), -self.value(flat, mixture, data)[0])]

        def note(intermediate_result: Any) -> None:
            seen = intermediate_result
            found.append((self.measured(self.at(seen.x, mixture), data), -float(seen.fun)))

        low = np.full(len(flat), -np.inf)
        self._noise_of(low, mixture)[:] = np.log(self.noise.floor_O)
        done = minimize(
            lambda flat: self.value(flat, mixture, data),
            flat,
            jac=True,
            method="L-BFGS-B",
            bounds=np.stack([low, np.full(len(flat), np.inf)], axis=1),
            callback=note,
            # One of its steps may gain little before another that gains much.
            options={"maxiter": max_iter, "ftol": tol / 100, "gtol": 1e-9},
        )
        return found, done.status == 0

    def value(self, flat: Floats, like: Mixture, data: Data, part: float = 1.0) -> tuple[float, Floats]:
        """The error of a row on average, with the penalty's part of it, and its gradient.

        Args:
            flat: the numbers, as :meth:`flat` gives them.
            like: a mixture of that form.
            data: rows.
            part: of all rows that these are, by weight; so much of the penalty is theirs.
        """
        penalty = part * self.penalty
        mixture = self.at(flat, like)
        experts = _differentiable(mixture)
        log_branch_TA = log_branches(mixture.tree, mixture.gate_AD, data.x_TD)
        eta_TEO = experts.eta(data.x_TD)
        log_gate_TE = along_paths(mixture.tree, log_branch_TA)
        blame = self.error(mixture.family, data.y_TO, log_gate_TE, eta_TEO, mixture.dispersion_EO)
        value = float(data.weight_T @ blame.error_T) + 0.5 * penalty * mixture.squared_slopes()
        d_logits_TA = data.weight_T[:, None] * through_gates(mixture.tree, log_branch_TA, blame.d_log_gate_TE)
        d_eta_TEO = data.weight_T[:, None, None] * blame.d_eta_TEO
        parts = [d_logits_TA.T @ data.x_TD, *experts.backward(data.x_TD, d_eta_TEO)]
        numbers = (mixture.gate_AD, *experts.arrays)
        parts = [one + penalty * slopes(array) for one, array in zip(parts, numbers, strict=True)]
        if self.learns_noise:
            parts.append(self._d_noise(mixture, data, mixture.family.mean(eta_TEO), blame))
        return value / data.total, flattened(parts) / data.total

    def _d_noise(self, mixture: Mixture, data: Data, mean_TEO: Floats, blame: Blame) -> Floats:
        share_TE = data.weight_T[:, None] * blame.responsible_TE
        squares_EO = np.einsum("te,teo->eo", share_TE, (data.y_TO[:, None] - mean_TEO) ** 2)
        d_log_EO = 0.5 * (share_TE.sum(axis=0)[:, None] - squares_EO / mixture.dispersion_EO)
        d_log: Floats = d_log_EO.sum(axis=0) if self.noise.kind == "shared" else d_log_EO
        return d_log

    def measured(self, mixture: Mixture, data: Data) -> Mixture:
        """With the noise that its residuals show, where the error is not the one that learns it."""
        if self.error is mixture_error or not mixture.family.is_gaussian:
            return mixture
        means = mixture.components(data.x_TD)[1]
        share = np.ones((len(means), 1)) if mixture.is_blended else np.exp(mixture.log_gate(data.x_TD))
        first = mixture.dispersion_EO[: means.shape[1]]
        found_EO = self.noise.estimate(first, data.y_TO, means, data.weight_T[:, None] * share)
        return replace(mixture, dispersion_EO=np.broadcast_to(found_EO, mixture.dispersion_EO.shape))

    def flat(self, mixture: Mixture) -> Floats:
        """Every number that is descended on, in one row: gates, experts, log φ."""
        parts = [mixture.gate_AD, *_differentiable(mixture).arrays]
        if self.learns_noise:
            shared = self.noise.kind == "shared"
            parts.append(np.log(mixture.dispersion_EO[0] if shared else mixture.dispersion_EO))
        return flattened(parts)

    def at(self, flat: Floats, like: Mixture) -> Mixture:
        """The mixture with these numbers."""
        experts = _differentiable(like)
        noise_EO = self._noise_of(flat, like)
        gate_AD, *arrays = unflattened(flat[: len(flat) - noise_EO.size], (like.gate_AD, *experts.arrays))
        mixture = replace(like, gate_AD=gate_AD, experts=experts.with_arrays(tuple(arrays)))
        if not self.learns_noise:
            return mixture
        return replace(mixture, dispersion_EO=np.broadcast_to(np.exp(noise_EO), like.dispersion_EO.shape))

    def _noise_of(self, flat: Floats, like: Mixture) -> Floats:
        """The part of the row that holds log φ, as a view: (1, O), (E, O) or nothing."""
        num_experts, num_outputs = like.dispersion_EO.shape
        count = {"fixed": 0, "shared": 1, "expert": num_experts}[self.noise.kind] if self.learns_noise else 0
        return flat[len(flat) - count * num_outputs :].reshape(count, num_outputs)

    def _in_bounds(self, flat: Floats, like: Mixture) -> Floats:
        noise_EO = self._noise_of(flat, like)
        noise_EO[:] = np.maximum(noise_EO, np.log(self.noise.floor_O))
        return flat


def _differentiable(mixture: Mixture) -> Differentiable:
    """Settings are checked before: experts of the user's own come here never."""
    experts: Any = mixture.experts
    found: Differentiable = experts
    return found
