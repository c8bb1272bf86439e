"""What dispatch means: for each row of the table, whether its expert takes it."""

from __future__ import annotations

import math
from fractions import Fraction

from tests.oracle.router import Table


def keep_all(table: Table, valid: list[bool]) -> list[bool]:
    """Dropless: every row of a token that is not padding."""
    return [valid[row.token] for row in table.rows]


def capacity(num_rows: int, num_experts: int, factor: float, minimum: int) -> int:
    """``max(minimum, ceil(factor * rows / experts))``, in exact fractions of the factor as it is written."""
    return max(minimum, math.ceil(Fraction(str(factor)) * num_rows / num_experts))


def groups_of(valid: list[bool], size: int) -> list[int]:
    """Cut the tokens that are no padding into groups of so many neighbours; padding belongs to group 0, idly."""
    groups, seen = [], 0
    for is_valid in valid:
        groups.append(seen // size if is_valid else 0)
        seen += is_valid
    return groups


def keep_by_capacity(
    table: Table,
    valid: list[bool],
    *,
    num_experts: int,
    factor: float,
    minimum: int,
    drop: str,
    groups: list[int] | None = None,
    per: str = "row",
    drawn: list[list[float]] | None = None,
) -> list[bool]:
    """Serve rows in order of priority until their expert is full, each group of tokens on its own.

    ``groups`` names the group of each token; None is one group. ``drawn`` is the random number of each token and
    expert, where rows are dropped at random: the largest are served first.
    """
    kept = [False] * len(table.rows)
    groups = [0] * len(valid) if groups is None else groups
    for group in set(groups):
        members = [t for t in range(len(valid)) if valid[t] and groups[t] == group]
        rows = [index for index, row in enumerate(table.rows) if row.token in members]
        if drop == "position":  # all first choices before all second ones, and among those the earliest token
            rows.sort(key=lambda index: (table.rows[index].choice, table.rows[index].token))
        elif drop == "random":  # the largest draw
            rows.sort(key=lambda index: -drawn[table.rows[index].token][table.rows[index].expert])
        else:  # the largest weight, then the earliest token
            rows.sort(key=lambda index: (-table.rows[index].weight.item(), table.rows[index].token))
        room = [capacity(len(rows) if per == "row" else len(members), num_experts, factor, minimum)] * num_experts
        for index in rows:
            expert = table.rows[index].expert
            if room[expert] > 0:
                room[expert] -= 1
                kept[index] = True
    return kept
