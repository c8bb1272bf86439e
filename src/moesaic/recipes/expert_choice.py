"""Expert choice, 2022: experts choose tokens, so that none is ever idle or overfull."""

from __future__ import annotations

from typing import Literal, cast

from moesaic.core.errors import ConfigError
from moesaic.core.init import normal
from moesaic.experts import MLPExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn
from moesaic.routers import ExpertChoiceRouter


def expert_choice_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 64,
    top_k: int = 2,
    capacity_factor: float | None = None,
    cap: int | None = None,
    group: str = "batch",
    activation: str = "gelu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Every expert takes the same number of tokens, those that score best for it.

    Args:
        width: D.
        hidden: F.
        num_experts: E.
        top_k: experts per token on average, the paper's capacity factor c.
        capacity_factor: c in place of ``top_k``, where it is no whole number; None for ``top_k``.
        cap: at most this many experts for one token (EC-CAP); None for no limit.
        group: "batch" or "sequence", the tokens that an expert chooses among.
        activation: of the experts.
        init_std: 0.02 unless given.
        kernel: of the experts.
    """
    init = drawn(init_std, normal(0.02))
    among = cast(Literal["batch", "sequence"], group)  # the router refuses anything else
    if capacity_factor is not None and not 0 < capacity_factor <= num_experts:
        raise ConfigError(
            f"capacity_factor must be above 0 and at most num_experts={num_experts}, got {capacity_factor}. "
            "The paper has 0.5, 1 and 2."
        )
    average = top_k if capacity_factor is None else capacity_factor
    router = ExpertChoiceRouter(width, num_experts, top_k=average, cap=cap, group=among, init=init)
    act = activation_named(activation)
    experts = MLPExperts(num_experts, width, hidden, activation=act, kernel=kernel, init=init)
    return MoELayer(router, experts)


EXPERT_CHOICE = Recipe(
    name="expert-choice",
    year=2022,
    summary="experts choose their best tokens, all the same number; a token may get any number of experts",
    citation=(
        "Zhou, Lei, Liu, Du, Huang, Zhao, Dai, Chen, Le, Laudon. Mixture-of-Experts with Expert Choice Routing. "
        "NeurIPS 2022. arXiv:2202.09368"
    ),
    router="every expert takes the n K / E of n tokens that score best for it by a softmax over experts",
    formula="""\
p_t = softmax(W x_t);  k = max(1, floor(n K / E)) for n tokens
S_e = the k tokens with the largest p_te; with a cap, of the plan A that maximises <A, p> + 0.001 H(A)
      with k tokens for each expert and at most cap experts for each token
y_t = sum_{e: t in S_e} p_te FFN_e(x_t)""",
    sources={
        "num_experts": "table 1, 8B/64E",
        "top_k": "EC-CF2, the paper's default",
        "capacity_factor": "section 3.2, c; 0.5 (EC-CF0.5) in the ablations",
        "cap": "section 3.3; EC-CF2 has none",
        "group": "section 3.2",
        "activation": "section 3.4",
    },
    differences=(
        "No causal form was published: whether a token is chosen depends on later ones, in inference too, so that "
        "generating token by token is another function than the one trained. People use a threshold learned per "
        "expert, or a predictor as in mixture of depths (recipe mod); neither is done here. EC-CAP's plan is the "
        "paper's problem, solved by exact turns of experts and tokens and not by Dykstra's projections, which are far "
        "from it after 100 rounds. The plan keeps to the cap; its k largest entries may pass it for a few tokens, in "
        "the paper as here."
    ),
    build=expert_choice_layer,
    causality="never",
)
