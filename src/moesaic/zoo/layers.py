"""What a published model's layers are made of, as plain values: sizes only, no weights and no code that runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesaic.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Softmax attention with as many key-value heads as said: multi-head, grouped or multi-query.

    Args:
        heads: query heads.
        kv_heads: heads of keys and of values.
        head_dim: width of each head.
        qkv_bias: whether the maps to queries, keys and values have a bias.
        out_bias: whether the map back has one.
        qk_norm: norms on queries and keys, one weight per channel of a head ("head") or of all heads ("full").
        gated: whether the query map gives a gate for each output channel too (Qwen3-Next).
        sinks: whether each head has one learned logit more (gpt-oss).
        window: keys that a token sees at most; None for all.
        buckets: rows of a learned table of relative positions, one column per head; T5 has it in a stack's first layer.
        cross: whether keys and values come from the encoder.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    gated: bool = False
    sinks: bool = False
    window: int | None = None
    buckets: int = 0
    cross: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Multi-head latent attention: keys and values come from one small latent vector per token.

    Args:
        heads: query heads.
        q_rank: width of the latent of queries; None where queries come straight from the token.
        kv_rank: width of the latent of keys and values, which is what a cache keeps.
        nope_dim: channels of a key without position.
        rope_dim: channels with position, one key shared by all heads.
        value_dim: width of a head's values.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
    """

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearAttention:
    """Lightning attention: a running sum of key-value products per head instead of a cache that grows.

    Args:
        heads: of queries, keys and values alike.
        head_dim: width of each.
        block: tokens of which products are taken at once.

    Source: MiniMax-01, arXiv:2501.08313.
    """

    heads: int
    head_dim: int
    block: int = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Mamba:
    """A selective state space, version 1.

    Args:
        inner: channels that the state space works in.
        state: numbers kept per channel.
        conv: taps of the convolution before it.
        dt_rank: rank of the map to step sizes.
        norms: whether step size, input and output matrices are normalised, as in Jamba.
    """

    inner: int
    state: int
    conv: int
    dt_rank: int
    norms: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Lstm:
    """A recurrent layer with four gates.

    Args:
        hidden: cells.
        projection: width of what it gives on, if not all cells.
    """

    hidden: int
    projection: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Other:
    """Something in a layer of which only the weights are known, counted on a model that was built.

    Args:
        name: of its class.
        params: all its weights.
        active_params: those that work on one token.
        matmul_params: active weights that are factors of matrix products.
    """

    name: str
    params: int
    active_params: int
    matmul_params: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Dense:
    """A feed-forward network that every token passes.

    Args:
        hidden: width inside.
        gated: whether it has three maps (SwiGLU, GEGLU) or two.
        bias: whether its maps have biases.
    """

    hidden: int
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """A mixture: a router, experts of which each token passes a few, and shared experts that every token passes.

    Args:
        num_experts: that the router can choose and that have weights.
        top_k: that one token passes.
        hidden: width inside one expert.
        gated: whether an expert has three maps or two.
        bias: whether their maps have biases.
        shared_hidden: width inside all shared experts together; 0 for none.
        shared_gate: whether the shared expert's output is weighed by a learned gate of the token.
        router_maps: linear maps from token to experts: 1; 2 with learned noise (2017); 3 for the attention router of
            Yuan; 0 where nothing is learned.
        router_bias: whether the router's map has a bias that is learned by gradient.
        selection_bias: whether each expert has a number added to its score for the choice alone, moved by its load. It
            is saved with the weights and counted as one; transformers keeps it in a buffer, not in a parameter.
        router_extra: further weights of the router.
        tree: branches of the first of two levels of routers (2017); 0 for one level.
        groups: groups that experts are in, of which a token may use ``groups_kept``; 1 for no such limit.
        groups_kept: see ``groups``.
        expert_extra: weights of one expert beside its maps and biases.
        shared_extra: weights of the shared experts beside theirs.
        width: that experts read and write, where it is not the model's.

    Raises:
        ConfigError: if a token is to pass more experts than there are.
    """

    num_experts: int
    top_k: int
    hidden: int
    gated: bool = True
    bias: bool = False
    shared_hidden: int = 0
    shared_gate: bool = False
    router_maps: int = 1
    router_bias: bool = False
    selection_bias: bool = False
    router_extra: int = 0
    tree: int = 0
    groups: int = 1
    groups_kept: int = 1
    expert_extra: int = 0
    shared_extra: int = 0
    width: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"top_k must be between 1 and num_experts={self.num_experts}, got {self.top_k}. "
                "Lower top_k, or add experts."
            )


Mixer = Attention | LatentAttention | LinearAttention | Mamba | Lstm | Other
Feed = Dense | Experts | Other


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One block of a stack.

    Args:
        mixers: what mixes positions, in order; a decoder's second one looks at the encoder.
        feeds: what works on each token alone; two side by side where a dense network runs beside the experts.
        norms: norms over the model's width.
        extra: further weights, such as learned scales.
        extra_products: those of them that are factors of matrix products.
    """

    mixers: tuple[Mixer, ...]
    feeds: tuple[Feed, ...]
    norms: int = 2
    extra: int = 0
    extra_products: int = 0

    @property
    def experts(self) -> Experts | None:
        """The (first) mixture of this layer, or None."""
        return next((feed for feed in self.feeds if isinstance(feed, Experts)), None)
