"""Experts: rows in, rows out. One file per kind."""

from moesaic.experts.gated import GatedExperts
from moesaic.experts.mlp import MLPExperts
from moesaic.experts.sequential import SequentialExperts
from moesaic.experts.shared import SharedExpert

__all__ = ["GatedExperts", "MLPExperts", "SequentialExperts", "SharedExpert"]
