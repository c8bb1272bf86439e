"""LoRAMoE, 2023: a frozen network, and in each of its linear maps a dense mixture of low-rank changes."""

from __future__ import annotations

from moesaic.balance import LocalizedLoss, LossTerm
from moesaic.core.init import normal
from moesaic.experts import LoRAExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.lora import LoRAMoE
from moesaic.recipes.recipe import Recipe


def lora_moe_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 8,
    rank: int = 4,
    alpha: float = 32.0,
    dropout: float = 0.05,
    train_base: bool = False,
    activation: str = "silu",
    init_std: float | None = None,
) -> LoRAMoE:
    """Add to gate, up and down projection a softmax mixture of low-rank maps, each with a router of its own.

    Args:
        width: D.
        hidden: F of the frozen network.
        num_experts: low-rank maps in each linear map.
        rank: of each.
        alpha: they are scaled by ``alpha / rank``.
        dropout: of their input in training.
        train_base: let the network train too.
        activation: of its gate.
        init_std: of the network, the routers and the maps' first factors; None for 0.02 and Kaiming's uniform. The
            second factors start at 0 always.
    """
    init = None if init_std is None else normal(init_std)
    experts = LoRAExperts(
        num_experts,
        width,
        hidden,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        activation=activation_named(activation),
        train_base=train_base,
        init=init,
    )
    return LoRAMoE(width, hidden, experts, init=init)


LORA_MOE = Recipe(
    name="lora-moe",
    year=2023,
    summary="all low-rank experts on every token, mixed in each linear map of a frozen network",
    citation="Dou et al. LoRAMoE: Alleviating World Knowledge Forgetting in LLMs. 2023. arXiv:2312.09979",
    router="a softmax over all experts in each of the three linear maps",
    formula="""\
in each linear map W of the frozen network: y = W x + alpha / rank * sum_e softmax(V x)_e B_e A_e dropout(x)
Q_es = weight of expert e over the tokens of sequence s;  I_es = 1 + delta if their kinds match, else 1 - delta
loss = 0.1 * var(I Q) / mean(I Q)^2, added up over the three maps""",
    sources={
        "num_experts": "authors' code, run_loramoe.sh",
        "rank": "authors' code, run_loramoe.sh",
        "alpha": "authors' code, run_loramoe.sh",
        "dropout": "authors' code, run_loramoe.sh",
        "train_base": "section 3.2, frozen",
        "activation": "LLaMA-2 (2023)",
        "init_std": "authors' code, Kaiming's uniform",
    },
    differences=(
        "The paper writes variance over mean; the code has variance over squared mean, which the authors call the "
        "right one (their issue 3), and so has this. Delta and the coefficient are 0 in the code's script, 0.1 here "
        "as remembered from the paper. Taken at its word the loss asks matching experts for less weight: see "
        "LocalizedLoss. Without domains in the context all kinds count as the same."
    ),
    build=lora_moe_layer,
    balance=(LossTerm(name="localized", loss=LocalizedLoss(delta=0.1), coefficient=0.1),),
)
