"""Balance: losses are pure functions of a Routing; controllers are stepped once per optimizer step."""

from moesaic.balance.controllers import BiasController
from moesaic.balance.losses import sequence_loss, switch_loss, z_loss
from moesaic.balance.terms import BalanceTerm, BiasRule, LossTerm

__all__ = [
    "BalanceTerm",
    "BiasController",
    "BiasRule",
    "LossTerm",
    "sequence_loss",
    "switch_loss",
    "z_loss",
]
