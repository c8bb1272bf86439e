"""Experiments that test what the literature claims, small enough for a laptop."""

from moesaic.lab.balance import BalanceResult, Trial, every_term, rebalance
from moesaic.lab.gallery import Failure, Gallery, Task, every_recipe
from moesaic.lab.precision import PrecisionResult, Variant, every_variant
from moesaic.lab.small import Outcome, Setup

__all__ = [
    "BalanceResult",
    "Failure",
    "Gallery",
    "Outcome",
    "PrecisionResult",
    "Setup",
    "Task",
    "Trial",
    "Variant",
    "every_recipe",
    "every_term",
    "every_variant",
    "rebalance",
]
