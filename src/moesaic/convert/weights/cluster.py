"""Groups of exactly equal size: the cheapest balanced assignment, and k-means with it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.core.errors import ConfigError

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]


def balanced_kmeans(
    points: Tensor, num_groups: int, *, seed: int = 0, cosine: bool = False, rounds: int = 50
) -> Tensor:
    """Cut points into groups of exactly equal size so that they lie close to the means of their groups.

    k-means whose assignment step is the cheapest balanced one. Each round lowers the sum of squared distances, until
    nothing moves.

    For a graph this is a balanced partition: with rows ``b_i`` whose products ``b_i . b_j`` are the edges' weights and
    groups of equal size, the sum of squared distances is a constant less the weight inside groups over the group's
    size, so that the closest groups are those that cut the least.

    Args:
        points: one row each.
        num_groups: how many; it divides the number of points.
        seed: draws the first means, spread out as k-means++ does.
        cosine: measure by the cosine to the mean instead of the distance.
        rounds: at most.
    Returns:
        The group of each point, int64; groups are numbered by their lowest point.
    Raises:
        ConfigError: if the points cannot be cut into equal groups.
    """
    num_points = len(points)
    check_divides(num_points, num_groups, "points")
    rows = points.detach().to("cpu", torch.float64)
    if cosine:
        rows = torch.nn.functional.normalize(rows, dim=1)
    means = _spread_out(rows, num_groups, seed)
    group = torch.full((num_points,), -1)
    for _ in range(rounds):
        direction = torch.nn.functional.normalize(means, dim=1) if cosine else means
        cost = -2 * rows @ direction.T
        if not cosine:
            cost = cost + means.square().sum(dim=1)
        moved = cheapest_balanced(cost)
        if torch.equal(moved, group):
            break
        group = moved
        means = torch.stack([rows[group == index].mean(dim=0) for index in range(num_groups)])
    first = torch.stack([(group == index).nonzero()[0, 0] for index in range(num_groups)])
    return torch.argsort(torch.argsort(first))[group]


def cheapest_balanced(cost: Tensor) -> Tensor:
    """Assign items to groups of exactly equal size so that the sum of the costs is least.

    All items start in their cheapest group; then the surplus flows along the cheapest chains of moves to the groups
    that have too few. That is the method of successive shortest paths, exact, and fast where groups are few: time grows
    with the surplus, not with the cube of the items.

    Args:
        cost: of each item (row) in each group (column).
    Returns:
        The group of each item, int64.
    Raises:
        ConfigError: if items cannot be cut into equal groups.
    """
    num_items, num_groups = cost.shape
    check_divides(num_items, num_groups, "items")
    matrix: _Floats = cost.detach().to("cpu", torch.float64).numpy()
    group: _Ints = matrix.argmin(axis=1)
    size = num_items // num_groups
    load = np.bincount(group, minlength=num_groups)
    # price[a, b]: what the cheapest move from group a to group b costs, and who moves.
    price = np.full((num_groups, num_groups), np.inf)
    mover = np.zeros((num_groups, num_groups), dtype=np.int64)
    for index in range(num_groups):
        _reprice(index, matrix, group, price, mover)
    while (load > size).any():
        chain = _cheapest_chain(price, load > size, load < size)
        moves = [(mover[a, b], a, b) for a, b in pairwise(chain)]
        for item, _, target in moves:
            group[item] = target
        load[chain[0]] -= 1
        load[chain[-1]] += 1
        for index in chain:
            _reprice(index, matrix, group, price, mover)
    return torch.from_numpy(group)


def check_divides(count: int, num_groups: int, what: str) -> None:
    """Refuse to cut what does not come out even.

    Raises:
        ConfigError: if ``num_groups`` does not divide ``count``, or is below 1.
    """
    if num_groups < 1 or count % num_groups or not count:
        near = [n for n in range(1, count + 1) if count % n == 0]
        shown = sorted(sorted(near, key=lambda n: abs(n - num_groups))[:4])
        raise ConfigError(
            f"{count} {what} cannot be cut into {num_groups} equal groups. Use a number that divides {count}, such as "
            f"{', '.join(map(str, shown))}."
        )


def _reprice(index: int, matrix: _Floats, group: _Ints, price: _Floats, mover: _Ints) -> None:
    """Find again the cheapest moves out of one group."""
    members = (group == index).nonzero()[0]
    if len(members) == 0:
        price[index] = np.inf
        return
    step = matrix[members] - matrix[members, index, None]
    best = step.argmin(axis=0)
    price[index] = step[best, np.arange(len(price))]
    mover[index] = members[best]
    price[index, index] = np.inf


def _cheapest_chain(price: _Floats, is_over: NDArray[np.bool_], is_under: NDArray[np.bool_]) -> list[int]:
    """The cheapest chain of moves from a group that has too many to one that has too few (Bellman-Ford)."""
    total = np.where(is_over, 0.0, np.inf)
    before = np.full(len(price), -1)
    for _ in range(len(price)):
        through = total[:, None] + price
        best = through.argmin(axis=0)
        reached = through[best, np.arange(len(price))]
        # A chain costs less by more than rounding, or it could turn in circles.
        is_less = reached < total - 1e-12 * np.maximum(1.0, np.abs(np.where(np.isfinite(total), total, 0.0)))
        if not is_less.any():
            break
        total = np.where(is_less, reached, total)
        before = np.where(is_less, best, before)
    last = int(np.where(is_under, total, np.inf).argmin())
    chain = [last]
    while before[chain[-1]] >= 0:
        chain.append(int(before[chain[-1]]))
    return chain[::-1]


def _spread_out(rows: Tensor, num_groups: int, seed: int) -> Tensor:
    """The first means: points, each drawn the likelier the farther it is from those drawn before (k-means++)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    distance = (rows - rows[chosen[0]]).square().sum(dim=1)
    for _ in range(num_groups - 1):
        chances = distance if distance.sum() > 0 else torch.ones_like(distance)
        chosen.append(int(torch.multinomial(chances, 1, generator=generator)))
        distance = torch.minimum(distance, (rows - rows[chosen[-1]]).square().sum(dim=1))
    return rows[chosen]
