"""Experiments that test what the literature claims, small enough for a laptop."""

from moesaic.lab.balance import BalanceResult, rebalance
from moesaic.lab.gallery import Gallery, gallery
from moesaic.lab.precision import PrecisionResult, precision
from moesaic.lab.small import Outcome, Setup

__all__ = ["BalanceResult", "Gallery", "Outcome", "PrecisionResult", "Setup", "gallery", "precision", "rebalance"]
