"""How findings put layers, experts and numbers into words."""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.doctor.thresholds import THRESHOLDS

_SHOWN = 3


def limit(name: str) -> float:
    """The value of a threshold."""
    return THRESHOLDS[name].value


def listed(things: Sequence[object]) -> str:
    """The first few of some things, and how many more there are."""
    shown = ", ".join(str(one) for one in things[:_SHOWN])
    rest = len(things) - _SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def percent(share: float) -> str:
    """A share as a percentage, with digits where it is small."""
    if share == 0:
        return "0 %"
    if share < 1e-4:
        return f"{share * 100:.1g} %"
    return f"{share * 100:.2f} %" if share < 0.01 else f"{share * 100:.1f} %"


def plural(count: int, thing: str) -> str:
    """A count and what it counts."""
    return f"{count:,} {thing}" + ("" if count == 1 else "s")
