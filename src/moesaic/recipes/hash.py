"""Hash layers, 2021: no router at all, the token's id says which expert it goes to."""

from __future__ import annotations

from moesaic.core.init import normal
from moesaic.experts import GatedExperts, MLPExperts
from moesaic.kernels.activations import activation as activation_named
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Recipe, drawn, one_choice
from moesaic.routers import HashRouter


def hash_layer(
    width: int,
    *,
    hidden: int,
    num_experts: int = 64,
    top_k: int = 1,
    vocab_size: int = 50_257,
    seed: int = 42,
    activation: str = "relu",
    gated: bool = False,
    init_std: float | None = None,
    kernel: str = "auto",
) -> MoELayer:
    """Look up each token's expert in a fixed random table.

    ``layer.router.load_table`` puts another in its place, such as ``balanced_table`` of the corpus' counts.

    Args:
        width: D.
        hidden: F.
        num_experts: E.
        top_k: 1; nothing else is published.
        vocab_size: of the model's tokenizer; ids beyond it are an error.
        seed: of the random table; the same in every layer unless given.
        activation: of the experts.
        gated: experts with a gate, as a model with gated networks needs to be upcycled; the paper's have none.
        init_std: 0.02 unless given.
        kernel: of the experts.
    """
    one_choice("hash", top_k)
    router = HashRouter(num_experts, vocab_size=vocab_size, seed=seed)
    act = activation_named(activation)
    init = drawn(init_std, normal(0.02))
    kind = GatedExperts if gated else MLPExperts
    experts = kind(num_experts, width, hidden, activation=act, kernel=kernel, init=init)
    return MoELayer(router, experts)


HASH = Recipe(
    name="hash",
    year=2021,
    summary="a fixed table from token ids to experts; nothing to learn, no loss, no weight",
    citation="Roller, Sukhbaatar, Szlam, Weston. Hash Layers For Large Sparse Models. NeurIPS 2021. arXiv:2106.04426",
    router="a fixed random table from token ids to experts",
    formula="""\
table[v] drawn uniformly from the experts, once, for each id v of the vocabulary
y_t = FFN_{table[id_t]}(x_t)""",
    sources={
        "num_experts": "Hash 1x64, the paper's main model",
        "top_k": "one hash gives one expert",
        "vocab_size": "GPT-2's; the authors' code (ParlAI) asks the model, as moesaic.sparsify should be told to",
        "seed": "authors' code (ParlAI)",
        "activation": "authors' code (ParlAI)",
        "gated": "authors' code (ParlAI); True is ours",
    },
    differences=(
        "The paper's best table is balanced over the corpus (23.16 perplexity against 23.22 at random), which needs "
        "counts and so cannot be an option: load_table takes it. The authors' code adds residual and layer norm "
        "inside the layer, which transformer blocks do themselves. Balance losses and controllers have nothing to "
        "train here."
    ),
    build=hash_layer,
)
