"""What settings may be, and the words for one that is not: said when fitting begins, as scikit-learn does."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

from moesaic.core.errors import ConfigError


def is_number(value: Any, kind: type) -> bool:
    """Whether a value is such a number; True and False are none."""
    return isinstance(value, kind) and value is not True and value is not False


def need_count(name: str, value: Any, least: int = 1) -> None:
    """See that a setting is a whole number of at least ``least``."""
    if not is_number(value, Integral) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def need_number(name: str, value: Any, *, above: float | None = None, least: float | None = None) -> None:
    """See that a setting is a finite number above one bound or at least another."""
    bound = f"above {above:g}" if above is not None else f"of at least {least:g}"
    is_fine = is_number(value, Real) and abs(value) != float("inf")
    if is_fine and above is not None:
        is_fine = value > above
    if is_fine and least is not None:
        is_fine = value >= least
    if not is_fine:
        raise ConfigError(f"{name} must be a number {bound}, got {value!r}.")


def need_share(name: str, value: Any) -> None:
    """See that a setting is between 0 and 1."""
    if not is_number(value, Real) or not 0 < value < 1:
        raise ConfigError(f"{name} must be a number between 0 and 1, without the ends; got {value!r}.")


def need_one_of(name: str, value: Any, allowed: Collection[str]) -> None:
    """See that a setting is one of some words."""
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}.")
