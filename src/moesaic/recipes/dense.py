"""Mixture of experts, 1991, as a layer: every expert sees every token."""

from __future__ import annotations

from moesaic.core.init import normal
from moesaic.experts import MLPExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import DenseRouter


def dense_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 8,
    activation: str = "relu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """All experts, weighted by a softmax gate; nothing is saved, nothing is left out.

    Args:
        width: D.
        hidden: F.
        num_experts: E, all of them active.
        activation: of the experts.
        init_std: 0.02 unless given.
        kernel: of the experts.
    """
    init = drawn(init_std, normal(0.02))
    act = activation_named(activation)
    experts = MLPExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init)
    return MoELayer(DenseRouter(width, num_experts, init=init), experts)


DENSE = Recipe(
    name="dense",
    year=1991,
    summary="every token visits every expert, weighted by a softmax: where it all began, and the baseline",
    citation="Jacobs, Jordan, Nowlan, Hinton. Adaptive Mixtures of Local Experts. Neural Computation 3(1), 1991",
    router="all experts, weighted by a softmax",
    formula="""\
p = softmax(W x);  y = sum_e p_e FFN_e(x)""",
    sources={
        "num_experts": "1991, vowel experiment: 4 and 8",
        "activation": "Eigen et al. 2013, rectified hidden layers",
        "init_std": "ours",
    },
    differences=(
        "The 1991 paper trains with the likelihood of a mixture, in which each expert answers for itself; as a layer "
        "inside a network the experts' outputs are blended first, which the paper calls cooperative (eq. 1). "
        "Eigen, Ranzato and Sutskever, who first stacked such layers (2013, arXiv:1312.4314), hold back experts that "
        "are ahead early in training; that is left out."
    ),
    build=dense_layer,
)
