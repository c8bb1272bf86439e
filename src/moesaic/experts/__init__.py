"""Experts: rows in, rows out. One file per kind."""

from moesaic.experts.biased import BiasedExperts
from moesaic.experts.gated import GatedExperts
from moesaic.experts.lora import LoRAExperts
from moesaic.experts.mix import LearnedMix
from moesaic.experts.mixed import MixedExperts
from moesaic.experts.mlp import MLPExperts
from moesaic.experts.residual_stack import ResidualStack
from moesaic.experts.sequential import SequentialExperts
from moesaic.experts.shared import SharedExpert
from moesaic.experts.special import ConstantExpert, CopyExpert, ZeroExpert

__all__ = [
    "BiasedExperts",
    "ConstantExpert",
    "CopyExpert",
    "GatedExperts",
    "LearnedMix",
    "LoRAExperts",
    "MLPExperts",
    "MixedExperts",
    "ResidualStack",
    "SequentialExperts",
    "SharedExpert",
    "ZeroExpert",
]
