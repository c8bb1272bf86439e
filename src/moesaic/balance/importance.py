"""Importance and load losses: squared coefficients of variation over experts (Shazeer 2017).

Both take the population variance (divide by E), as tensor2tensor does; ``torch.var`` and LLaMA-MoE divide by E - 1 and
get ``E / (E - 1)`` times as much. There is no epsilon: scaling all values changes nothing. Both are statistics of
exactly the tokens that they are given.
"""

from __future__ import annotations

from torch import Tensor

from moesaic.core.routing import Routing, missing_extra


def importance_cv2(routing: Routing) -> Tensor:
    """``CV(importance)^2``: variance over squared mean, across experts, of the summed weights.

    0 at perfect balance, E - 1 if one expert has everything.

    Source: Shazeer 2017, eq. 6 and 7.
    """
    return _cv2(routing.importance_E)


def load_cv2(routing: Routing) -> Tensor:
    """``CV(load)^2`` of the smooth load, which unlike a count has a gradient.

    0 at perfect balance, at most E - 1. In evaluation, and where every expert is chosen, the load is a count and the
    gradient 0.

    Raises:
        ConfigError: if the router keeps no smooth load.

    Source: Shazeer 2017, eq. 10 and 11.
    """
    if "smooth_load_E" not in routing.extras:
        raise missing_extra("smooth_load_E", "load_cv2", "NoisyTopKRouter and HierarchicalRouter")
    return _cv2(routing.extras["smooth_load_E"])


def _cv2(value_E: Tensor) -> Tensor:
    mean = value_E.mean()
    mean = mean.where(mean > 0, 1)  # of nothing: every value is 0, and so is its variation
    return ((value_E - value_E.mean()) / mean).square().mean()
