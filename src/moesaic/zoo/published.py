"""Figures that authors gave for their models, and how far a count is from them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from moesaic.core.errors import ConfigError

_UNITS = {"M": 10**6, "B": 10**9, "T": 10**12}
Without = Literal["nothing", "input embedding", "embeddings"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """What a publication says of a model's size.

    Args:
        total: weights as printed, such as "46.7B"; empty if not given.
        active: weights that work on one token as printed; empty if not given.
        total_without: what the printed total leaves out.
        active_without: what the printed active number leaves out.
        extra: weights in the printed total that are no part of the language model counted here.
        extra_name: what those are.
        source: where the figures are from.
        checked: whether the figures were read there rather than remembered.
        note: what does not agree, and why.
    """

    total: str = ""
    active: str = ""
    total_without: Without = "nothing"
    active_without: Without = "nothing"
    extra: int = 0
    extra_name: str = ""
    source: str = ""
    checked: bool = True
    note: str = ""


def number(printed: str) -> float:
    """The number that was printed, such as 46.7e9 for "46.7B".

    Raises:
        ConfigError: if it is not digits followed by M, B or T.
    """
    return _digits(printed)[0]


def rounding(printed: str) -> float:
    """Half a unit of the last digit printed, relative to the number: what rounding alone can explain."""
    value, unit = _digits(printed)
    return unit / 2 / value


def _digits(printed: str) -> tuple[float, float]:
    found = re.fullmatch(r"(\d+)(?:\.(\d+))?([MBT])", printed.replace(",", ""))
    if found is None:
        raise ConfigError(f"A published figure needs the form 46.7B, got {printed!r}. End it with M, B or T.")
    whole, part, unit = found.groups()
    scale = _UNITS[unit]
    return float(f"{whole}.{part or 0}") * scale, scale / 10 ** len(part or "")
