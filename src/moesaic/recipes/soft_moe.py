"""Soft MoE, 2023: experts work on mixtures of all tokens; nothing is chosen, nothing dropped."""

from __future__ import annotations

from moesaic.core.init import normal, scaled_by_fan_in
from moesaic.experts import MLPExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.recipes.recipe import Recipe
from moesaic.soft import SoftMoE


def soft_moe_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 128,
    slots_per_expert: int = 1,
    noise_std: float = 0.0,
    activation: str = "gelu",
    init_std: float | None = None,
    kernel: str = "auto",
) -> SoftMoE:
    """Mix a sequence's tokens into slots, one or more for each expert, and the experts' outputs back into tokens.

    Args:
        width: D.
        hidden: F.
        num_experts: E.
        slots_per_expert: slots of each expert for each sequence; experts times slots is what the layer costs.
        noise_std: of normal noise on the logits in training.
        activation: of the experts.
        init_std: None draws everything with variance 1 / fan-in.
        kernel: of the experts.
    """
    init = scaled_by_fan_in() if init_std is None else normal(init_std)
    experts = MLPExperts(num_experts, width, hidden, activation=activation_named(activation), kernel=kernel, init=init)
    return SoftMoE(width, experts, slots_per_expert=slots_per_expert, noise_std=noise_std, init=init)


SOFT_MOE = Recipe(
    name="soft-moe",
    year=2023,
    summary="experts work on slots, each a mixture of all tokens of a sequence; fully differentiable",
    citation="Puigcerver, Riquelme, Mustafa, Houlsby. From Sparse to Soft Mixtures of Experts. 2023. arXiv:2308.00951",
    router="every slot is a softmax over tokens, every token a softmax over slots",
    formula="""\
L = unit(X) (s * unit(Phi)), columns of Phi in groups of slots, one group for each expert
slots = softmax over tokens(L)^T X;  o = FFN_e(slot) for expert e's slots
y_t = sum over slots of softmax over slots(L_t) o
no loss""",
    sources={
        "num_experts": "section 3, S/16, B/16 and L/16; authors' configuration",
        "slots_per_expert": "authors' configuration for JFT-4B, num_slots=1",
        "noise_std": "authors' code",
        "activation": "ViT (2020), GELU",
        "init_std": "authors' code, LeCun's normal; variance 1 / fan-in cut off at two deviations",
    },
    differences=(
        "Slots are those of a sequence, however long; the authors' code can also fix experts times slots to the "
        "number of tokens, which images have and text has not. Experts have no biases here. Their code mixes in "
        "bfloat16, this in float32."
    ),
    build=soft_moe_layer,
    causality="never",
)
