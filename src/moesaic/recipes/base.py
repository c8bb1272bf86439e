"""BASE layers, 2021: routing as a balanced assignment, solved exactly."""

from __future__ import annotations

from moesaic.core.init import normal, orthogonal
from moesaic.experts import ResidualStack, SequentialExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, gate_drawn, one_choice
from moesaic.routers import BalancedAssignmentRouter


def base_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 128,
    top_k: int = 1,
    sublayers: int = 1,
    assign_tokens: int = 1024,
    activation: str = "relu",
    init_std: float | None = None,
    gate_init_std: float | None = None,
) -> MoELayer:
    """Deal tokens out evenly in training, take each token's best expert in evaluation; weigh by a sigmoid.

    Args:
        width: D.
        hidden: F, of each sublayer.
        num_experts: E, one for each GPU in the paper.
        top_k: 1; nothing else is published.
        sublayers: residual feed-forward sublayers that make up an expert.
        assign_tokens: most tokens dealt out in one go; the paper's workers each deal out their own.
        activation: of the experts.
        init_std: of the experts' first matrices and biases; None draws them as ``nn.Linear`` does. Second matrices
            start at 0, so that a fresh expert adds nothing but its bias.
        gate_init_std: of the expert centroids; None draws them at right angles and of length 0.1.
    """
    one_choice("base", top_k)
    centroids = gate_drawn(gate_init_std, orthogonal(0.1))
    router = BalancedAssignmentRouter(width, num_experts, assign_tokens=assign_tokens, init=centroids)
    act = activation_named(activation)
    init = None if init_std is None else normal(init_std)
    stacks = [ResidualStack(width, hidden, sublayers=sublayers, activation=act, init=init) for _ in range(num_experts)]
    return MoELayer(router, SequentialExperts(stacks))


BASE = Recipe(
    name="base",
    year=2021,
    summary="tokens dealt out evenly by solving an assignment problem; no loss, no capacity",
    citation="Lewis, Bhosale, Dettmers, Goyal, Zettlemoyer. BASE Layers. ICML 2021. arXiv:2103.16716",
    router="balanced assignment in training, the best expert in evaluation; the sigmoid of its logit weighs",
    formula="""\
a_te = h_t . w_e
training: A maximises sum_t a[t, A_t] with T/E tokens for every expert;  evaluation: A_t = argmax_e a_te
F(h) = sublayers of h <- h + W2 relu(W1 LN(h) + b1) + b2
y_t = sigmoid(a[t, A_t]) * (F_{A_t}(h_t) - h_t)""",
    sources={
        "num_experts": "the paper's 128 GPUs, an expert on each",
        "top_k": "section 3",
        "sublayers": "authors' code (fairseq), --base-sublayers 1; the paper's experts stack up to 10",
        "assign_tokens": "the paper's workers solve for their own tokens; 1024 are solved in 0.05 s",
        "activation": "authors' code (fairseq)",
        "init_std": "authors' code (fairseq): W2 zero, the rest as torch draws it",
        "gate_init_std": "authors' code (fairseq): orthogonal with gain 0.1",
    },
    differences=(
        "The authors' code returns alpha F(h) + (1 - alpha) h; this leaves h out, since the block around the layer "
        "adds it: the same numbers. Their auction algorithm stops within an epsilon of the best assignment; this is "
        "exact. They shuffle tokens between workers at random; here parts of a long batch hold every n-th token. "
        "Where E does not divide the tokens, loads differ by one."
    ),
    build=base_layer,
    causality="in evaluation",
)
