"""MoLE, 2024: LoRAs that were trained one by one, composed by a gate that looks at their outputs."""

from __future__ import annotations

from moesaic.balance import LossTerm, product_loss
from moesaic.core.init import normal
from moesaic.experts import LoRAExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.lora import MoLE
from moesaic.recipes.recipe import Recipe


def mole_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 8,
    rank: int = 8,
    alpha: float = 16.0,
    train_base: bool = False,
    train_experts: bool = False,
    activation: str = "silu",
    init_std: float | None = None,
) -> MoLE:
    """Add to a frozen network the outputs of frozen LoRAs, weighed by a learned gate on those outputs.

    Args:
        width: D.
        hidden: F of the frozen network.
        num_experts: LoRAs to compose.
        rank: of each, as it was trained.
        alpha: each is scaled by ``alpha / rank``, as it was trained.
        train_base: let the network train too.
        train_experts: let the LoRAs train too. Load them first: their second factors start at 0, and as each expert is
            a network of its LoRA's matrices alone, no gradient reaches any of them from there.
        activation: of the networks' gates.
        init_std: of the network, the gate and the LoRAs' first factors; None for 0.02 and Kaiming's uniform.
    """
    init = None if init_std is None else normal(init_std)
    experts = LoRAExperts(
        num_experts,
        width,
        hidden,
        rank=rank,
        alpha=alpha,
        activation=activation_named(activation),
        train_base=train_base,
        init=init,
    )
    return MoLE(width, experts, train_experts=train_experts, init=init)


MOLE = Recipe(
    name="mole",
    year=2024,
    summary="trained LoRAs, frozen, composed by a learned gate that looks at all of their outputs",
    citation="Wu, Huang, Wei. Mixture of LoRA Experts. ICLR 2024. arXiv:2404.13628",
    router="a softmax with learned temperature over a linear map of all experts' outputs",
    formula="""\
E_i(x) = the network of LoRA i's matrices alone;  F(x) = the frozen network
G = softmax(V LayerNorm(E_1(x), ..., E_N(x)) / tau)
y = F(x) + sum_i G_i E_i(x)
loss = -0.5 * log prod_i q_i,  q_i = mean of G_i over tokens""",
    sources={
        "num_experts": "ours; the paper composes from 2 to 128",
        "rank": "ours, LoRA (2021): that of the LoRAs to compose",
        "alpha": "ours, LoRA (2021): that of the LoRAs to compose",
        "train_base": "section 3.2, frozen",
        "train_experts": "section 3.2, frozen",
        "activation": "LLaMA (2023); the paper's are FLAN-T5's and a diffusion model's",
        "init_std": "ours, 0.02",
    },
    differences=(
        "The paper flattens the outputs of a whole sequence into one gate for a transformer block, which fixes the "
        "sequence's length; here each token of each feed-forward layer has a gate. The paper's mean q is over blocks, "
        "here over a layer's tokens. The coefficient is 0.5 as remembered from the paper; no code was released."
    ),
    build=mole_layer,
    balance=(LossTerm(name="product", loss=product_loss, coefficient=0.5),),
)
