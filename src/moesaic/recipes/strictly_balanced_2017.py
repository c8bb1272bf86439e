"""Strictly balanced gating, 2017: in training every expert takes as many tokens as every other, by construction."""

from __future__ import annotations

from moesaic.balance import LossTerm, threshold_loss
from moesaic.core.init import scaled_by_fan_in
from moesaic.experts import MLPExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import BatchwiseRouter


def strictly_balanced_2017_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 256,
    top_k: int = 4,
    activation: str = "relu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Each expert keeps its best tokens of the batch in training, and those above a learned threshold in evaluation.

    Args:
        width: D.
        hidden: F.
        num_experts: E.
        top_k: experts per token on average in training.
        activation: of the experts.
        init_std: None draws with variance 1 / fan-in. Thresholds start at ``1 / E`` either way.
        kernel: of the experts.
    """
    init = drawn(init_std, scaled_by_fan_in())
    router = BatchwiseRouter(width, num_experts, top_k=top_k, init=init)
    experts = MLPExperts(num_experts, width, hidden, activation=activation_named(activation), kernel=kernel, init=init)
    return MoELayer(router, experts)


STRICTLY_BALANCED_2017 = Recipe(
    name="strictly-balanced-2017",
    year=2017,
    summary="every expert keeps its best K T / E tokens; learned thresholds stand in for it in evaluation",
    citation="Shazeer et al. Outrageously Large Neural Networks. ICLR 2017. arXiv:1701.06538",
    router="experts choose tokens: the best of the batch in training, those above a threshold in evaluation",
    formula="""\
g = softmax(W x)
training: M_te = 1 where g_te is among the m = K T / E largest of expert e;  evaluation: M_te = 1 where g_te > t_e
w_te = g_te M_te / sum_e g_te M_te;  y_t = sum_e w_te FFN_e(x_t)
loss = 0.1 * mean_t sum_e (1[g_te > t_e] - M_te) (g_te - t_e)""",
    sources={
        "num_experts": "table 7, as for the flat gates; appendix F names no number",
        "top_k": "appendix C.1, as for the flat gates",
        "activation": "appendix C.1",
        "init_std": "the paper does not say",
    },
    differences=(
        "The paper sums its loss over tokens and names no coefficient; this takes the mean over tokens, times 0.1, the "
        "size of its other losses. Nor does it say how gate and thresholds start: a gate of 0 would let all experts "
        "keep the same tokens, so it is drawn; thresholds start at 1 / E, the mean gate. m is rounded down, and at "
        "least 1. As evaluation goes by the thresholds, a token may get more experts than K there, or none."
    ),
    build=strictly_balanced_2017_layer,
    balance=(LossTerm(name="threshold", loss=threshold_loss, coefficient=0.1),),
    causality="in evaluation",
)
