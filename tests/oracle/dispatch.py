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


def keep_by_capacity(
    table: Table, valid: list[bool], *, num_experts: int, factor: float, minimum: int, drop: str
) -> list[bool]:
    """Serve rows in order of priority until their expert is full."""
    rows = [index for index, row in enumerate(table.rows) if valid[row.token]]
    if drop == "position":  # all first choices before all second ones, and among those the earliest token
        rows.sort(key=lambda index: (table.rows[index].choice, table.rows[index].token))
    else:  # the largest weight, then the earliest token
        rows.sort(key=lambda index: (-table.rows[index].weight.item(), table.rows[index].token))
    room = [capacity(len(rows), num_experts, factor, minimum)] * num_experts
    kept = [False] * len(table.rows)
    for index in rows:
        expert = table.rows[index].expert
        if room[expert] > 0:
            room[expert] -= 1
            kept[index] = True
    return kept
