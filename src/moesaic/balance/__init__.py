"""Balance: losses are pure functions of a Routing; controllers are stepped once per optimizer step."""

from moesaic.balance.adaptive import AdaptiveCoefficient, AdaptiveRule, even_gate_loss
from moesaic.balance.batchwise import threshold_loss
from moesaic.balance.check import check
from moesaic.balance.consistency import consistency_loss
from moesaic.balance.controllers import BiasController, Controller
from moesaic.balance.depth import depth_loss
from moesaic.balance.devices import communication_loss, device_loss
from moesaic.balance.entropy import entropy_loss, mutual_information_loss
from moesaic.balance.heterogeneous import heterogeneous_loss
from moesaic.balance.importance import importance_cv2, load_cv2
from moesaic.balance.localized import LocalizedLoss
from moesaic.balance.losses import global_batch_loss, gshard_loss, sequence_loss, switch_loss, z_loss
from moesaic.balance.named import TERMS, named
from moesaic.balance.policy import reinforce_loss
from moesaic.balance.product import product_loss
from moesaic.balance.schedules import AnnealingController, AnnealingRule, SparsityController, SparsityRule
from moesaic.balance.sparsity import active_share_loss, l1_loss
from moesaic.balance.terms import BalanceTerm, BiasRule, LossTerm, Rule

__all__ = [
    "TERMS",
    "AdaptiveCoefficient",
    "AdaptiveRule",
    "AnnealingController",
    "AnnealingRule",
    "BalanceTerm",
    "BiasController",
    "BiasRule",
    "Controller",
    "LocalizedLoss",
    "LossTerm",
    "Rule",
    "SparsityController",
    "SparsityRule",
    "active_share_loss",
    "check",
    "communication_loss",
    "consistency_loss",
    "depth_loss",
    "device_loss",
    "entropy_loss",
    "even_gate_loss",
    "global_batch_loss",
    "gshard_loss",
    "heterogeneous_loss",
    "importance_cv2",
    "l1_loss",
    "load_cv2",
    "mutual_information_loss",
    "named",
    "product_loss",
    "reinforce_loss",
    "sequence_loss",
    "switch_loss",
    "threshold_loss",
    "z_loss",
]
