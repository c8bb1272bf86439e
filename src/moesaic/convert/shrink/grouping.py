"""Which experts of a layer belong together: hierarchical clustering with average linkage."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from moesaic.convert.shrink.saliency import ExpertStats
from moesaic.convert.weights.stack import ExpertStack
from moesaic.core.errors import ConfigError

Cluster = Literal["outputs", "functions", "weights", "router"]
"""What experts are compared by; :func:`distances` says what each means."""


def distances(
    cluster: Cluster,
    *,
    stats: ExpertStats | None = None,
    stack: ExpertStack | None = None,
    rows_ED: Tensor | None = None,
) -> Tensor:
    """How far any two experts of a layer are apart, float64 (E, E).

    Args:
        cluster: "outputs": Euclidean distance of the experts' mean outputs over all tokens (HC-SMoE). "functions":
            root mean squared distance of their outputs for the same token, over all tokens: 0 only for experts that do
            the same, where two different experts may have equal means. "weights": Euclidean distance of all their
            weights, neuron by neuron as they stand. "router": Euclidean distance of their rows of the router.
        stats: for "outputs" and "functions", with every expert run on every token.
        stack: for "weights".
        rows_ED: for "router".
    Raises:
        ConfigError: if ``cluster`` is none of these, or what it needs was not given.

    Source: Chen et al. 2024, "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering", arXiv:2410.08589,
    section 3.2 and the authors' code.
    """
    if cluster == "outputs" and stats is not None and stats.every_ED is not None:
        return torch.cdist(stats.every_ED, stats.every_ED, compute_mode="donot_use_mm_for_euclid_dist")
    if cluster == "functions" and stats is not None and stats.product_EE is not None:
        return _from_products(stats.product_EE)
    if cluster == "weights" and stack is not None:
        return _from_products(_products(stack))
    if cluster == "router" and rows_ED is not None:
        return torch.cdist(rows_ED.double(), rows_ED.double(), compute_mode="donot_use_mm_for_euclid_dist")
    if cluster not in get_args(Cluster):
        raise ConfigError(
            f"cluster must be one of {', '.join(get_args(Cluster))}, got {cluster!r}. 'outputs' is the published best."
        )
    raise ConfigError(
        f"cluster={cluster!r} needs statistics in which every expert ran on every token. "
        "Call calibrate(..., every_expert=True), or cluster by 'weights' or 'router'."
    )


def grouped(distance_EE: Tensor, to: int, *, groups: int = 1) -> list[list[int]]:
    """Cut experts into clusters by average linkage, within each group of experts.

    Merges the two closest clusters, by the mean distance of their members, until ``to`` are left.

    Args:
        distance_EE: see :func:`distances`.
        to: clusters altogether.
        groups: equal, neighbouring groups of experts that clusters do not cross; each gets as many clusters.
    Returns:
        The members of each cluster, rising; clusters by their lowest member, so that groups stay neighbours.
    Raises:
        ConfigError: if there are fewer experts than clusters, or groups that cannot be cut equally.
    """
    num_experts = len(distance_EE)
    check_count(num_experts, to, groups, "merge to")
    per_group, found = num_experts // groups, []
    for start in range(0, num_experts, per_group):
        part = distance_EE[start : start + per_group, start : start + per_group]
        found += [[start + member for member in members] for members in _cut(part.numpy(), to // groups)]
    return found


def check_count(num_experts: int, to: int, groups: int, what: str) -> None:
    """Refuse a number of experts that cannot be kept.

    Raises:
        ConfigError: if it is out of range, or groups cannot keep equally many.
    """
    if not 1 <= to <= num_experts:
        raise ConfigError(
            f"Experts to {what} must be between 1 and {num_experts}, the number that a layer has, got {to}. "
            "Give fewer than there are."
        )
    if to % groups or num_experts % groups:
        raise ConfigError(
            f"A router that chooses among {groups} groups needs as many experts in each, got {to} to {what}. "
            f"Give a multiple of {groups}."
        )


def _cut(distance: np.ndarray[tuple[int, int], np.dtype[np.float64]], to: int) -> list[list[int]]:
    count = len(distance)
    clusters = {index: [index] for index in range(count)}
    if count > 1:
        # Rounding must leave neither a negative distance nor an asymmetry, which squareform would refuse.
        condensed = squareform(np.maximum((distance + distance.T) / 2, 0) * (1 - np.eye(count)), checks=False)
        # Not fcluster: among equal distances, as of copies, it may give fewer clusters than were asked for.
        for step, (left, right, _, _) in enumerate(linkage(condensed, method="average")[: count - to]):
            clusters[count + step] = sorted(clusters.pop(int(left)) + clusters.pop(int(right)))
    return sorted(clusters.values())


def _from_products(product_EE: Tensor) -> Tensor:
    square_E = product_EE.diagonal()
    squared_EE = square_E[:, None] + square_E[None, :] - 2 * product_EE
    return squared_EE.clamp_min(0).sqrt().fill_diagonal_(0)


def _products(stack: ExpertStack) -> Tensor:
    """Inner products of all weights of two experts, float64, one kind of weight at a time."""
    total_EE = torch.zeros(stack.num_experts, stack.num_experts, dtype=torch.float64)
    for part in (stack.gate_EDF, stack.up_EDF, stack.down_EFD, stack.gate_EF, stack.up_EF, stack.down_ED):
        # Some rows of each weight at a time: all at once in float64 would be several layers' worth of memory.
        for start in range(0, 0 if part is None else part.shape[1], 64):
            rows = part[:, start : start + 64].flatten(1).double()  # type: ignore[index]
            total_EE += (rows @ rows.T).cpu()
    return total_EE
