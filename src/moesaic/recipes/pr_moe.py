"""PR-MoE, 2022: Residual-MoE as a pyramid, with twice the experts in the last layers."""

from __future__ import annotations

from typing import Any

from moesaic.recipes.recipe import Recipe
from moesaic.recipes.residual_moe import BALANCE, DIFFERENCES, SOURCES, residual_moe_layer


def wider_at_the_top(options: dict[str, Any], index: int, num_layers: int) -> dict[str, Any]:
    """Double the experts of the last two MoE layers; of the last one where there are two or three, of none alone.

    Args:
        options: of the layer.
        index: of the layer among the MoE layers, from 0.
        num_layers: MoE layers of the model.
    """
    if index < num_layers - min(2, num_layers // 2):
        return options
    return options | {"num_experts": 2 * options["num_experts"]}


PR_MOE = Recipe(
    name="pr-moe",
    year=2022,
    summary="a dense network plus one expert per token, and twice the experts in the last two MoE layers",
    citation="Rajbhandari et al. DeepSpeed-MoE. ICML 2022. arXiv:2201.05596",
    router="one expert per token, the best of a softmax, weighted by its probability",
    formula="""\
E experts, 2 E in the last two MoE layers
p = softmax(W x);  e* = argmax_e p_e
y = MLP(x) + p_e* FFN_e*(x);  or with a, b = softmax(V x + c):  a p_e* FFN_e*(x) + b MLP(x)
each expert takes at most max(4, ceil(T / E)) tokens, earliest first
loss = 0.01 * E * sum_e f_e P_e, E of the layer""",
    sources=SOURCES | {"num_experts": "table 2, 350M+PR-MoE-32/64"},
    differences=DIFFERENCES,
    build=residual_moe_layer,
    balance=BALANCE,
    by_depth=wider_at_the_top,
)
