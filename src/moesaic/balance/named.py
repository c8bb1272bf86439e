"""Every balance loss and controller by the name that settings and saved models have for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from moesaic.balance.adaptive import AdaptiveRule, even_gate_loss
from moesaic.balance.batchwise import threshold_loss
from moesaic.balance.depth import depth_loss
from moesaic.balance.devices import communication_loss, device_loss
from moesaic.balance.entropy import entropy_loss, mutual_information_loss
from moesaic.balance.heterogeneous import heterogeneous_loss
from moesaic.balance.importance import importance_cv2, load_cv2
from moesaic.balance.localized import LocalizedLoss
from moesaic.balance.losses import global_batch_loss, gshard_loss, sequence_loss, switch_loss, z_loss
from moesaic.balance.policy import reinforce_loss
from moesaic.balance.product import product_loss
from moesaic.balance.schedules import AnnealingRule, SparsityRule
from moesaic.balance.sparsity import active_share_loss, l1_loss
from moesaic.balance.terms import BalanceTerm, BiasRule, LossTerm
from moesaic.core.errors import ConfigError
from moesaic.core.routing import Routing


def named(balance: Mapping[str, float]) -> tuple[BalanceTerm, ...]:
    """Build balance terms from their names.

    Args:
        balance: name in :data:`TERMS` to its number.
    Raises:
        ConfigError: if a name is unknown, or its number negative, infinite or none.
    """
    unknown = sorted(set(balance) - set(TERMS))
    if unknown:
        raise ConfigError(
            f"balance must name terms of moesaic.balance.TERMS ({', '.join(TERMS)}), got {', '.join(unknown)}. "
            "Pick from these."
        )
    for name, value in balance.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigError(
                f"The number of balance term {name} must be finite and at least 0, got {value!r}. Give a loss its "
                "coefficient, a controller its rate."
            )
    return tuple(TERMS[name](value) for name, value in balance.items())


def _loss(
    name: str, loss: Callable[[Routing], Tensor], *, adaptive: bool = False, rewarded: bool = False
) -> Callable[[float], BalanceTerm]:
    def build(coefficient: float) -> BalanceTerm:
        return LossTerm(name=name, loss=loss, coefficient=coefficient, adaptive=adaptive, rewarded=rewarded)

    return build


TERMS: Mapping[str, Callable[[float], BalanceTerm]] = {
    "switch": _loss("switch", switch_loss),
    "sequence": _loss("sequence", sequence_loss),
    "global-batch": _loss("global-batch", global_batch_loss),
    "gshard": _loss("gshard", gshard_loss),
    "importance": _loss("importance", importance_cv2),
    "load": _loss("load", load_cv2),
    "device": _loss("device", device_loss),
    "communication": _loss("communication", communication_loss),
    "even-gate": _loss("even-gate", even_gate_loss),
    "adaptive-even-gate": _loss("adaptive-even-gate", even_gate_loss, adaptive=True),
    "heterogeneous": _loss("heterogeneous", heterogeneous_loss),
    "localized": _loss("localized", LocalizedLoss()),
    "product": _loss("product", product_loss),
    "mutual-information": _loss("mutual-information", mutual_information_loss),
    "entropy": _loss("entropy", entropy_loss),
    "active-share": _loss("active-share", active_share_loss),
    "l1": _loss("l1", l1_loss),
    "adaptive-l1": _loss("adaptive-l1", l1_loss, adaptive=True),
    "depth": _loss("depth", depth_loss),
    "threshold": _loss("threshold", threshold_loss),
    "reinforce": _loss("reinforce", reinforce_loss, rewarded=True),
    "z": _loss("z", z_loss),
    "bias": lambda rate: BiasRule(rate=rate),
    "drops": lambda alpha_max: AdaptiveRule(alpha_max=alpha_max),
    "sparsity": lambda factor: SparsityRule(factor=factor),
    "annealing": lambda _: AnnealingRule(),
}
"""From a name to what builds the term from one number.

For a loss the number is its coefficient; an adaptive one is multiplied by the layer's own coefficient too, which a
controller moves. For a controller it is: ``bias``, the rate of :class:`BiasRule`; ``drops``, ``alpha_max`` of
:class:`AdaptiveRule`; ``sparsity``, ``factor`` of :class:`SparsityRule`; ``annealing``, not read, as the schedule is
the router's own.
"""
