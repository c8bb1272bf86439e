"""The shape of a model: sizes of all its layers, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moesaic.core.errors import ConfigError
from moesaic.zoo import cost, count
from moesaic.zoo.layers import Experts, Layer
from moesaic.zoo.parts import Parts
from moesaic.zoo.published import Published, Without


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """What a language model is made of, and what it holds, costs and needs because of that.

    Args:
        name: as ``moesaic zoo show`` takes it.
        year: of publication.
        width: D, channels of a token between layers.
        vocab: tokens in the table; 0 where the source does not say, and nothing is then counted for it.
        layers: of the stack that writes, first to last.
        encoder: layers of the stack that reads, where there is one.
        tied: whether input and output share one table.
        positions: rows of a learned table of positions.
        norm: what a norm learns: a scale per channel ("rms"), scale and shift ("layer"), or nothing ("none").
        final_norms: norms after the stacks, and before them where a model has such.
        head_bias: whether the map to the vocabulary has a bias.
        embedding_extra: weights of the input side beside the tables.
        other: weights outside the layers that are none of these and that every token passes.
        other_products: those of them that are factors of matrix products.
        writes: whether it gives scores of all tokens of the vocabulary, which a model for classes does not.
        towers: weights that see images or hear sound, which no text passes.
        activation: inside experts and dense networks, in the paper's word.
        citation: paper or release that the model is of.
        source: where these sizes are from.
        checked: whether they were checked against paper, repository or configuration rather than written from memory.
        open: what the source leaves open, and what was assumed.
        published: figures that its authors gave, or None.
    """

    name: str
    width: int
    vocab: int
    layers: tuple[Layer, ...]
    year: int = 0
    encoder: tuple[Layer, ...] = ()
    tied: bool = False
    positions: int = 0
    norm: Literal["rms", "layer", "none"] = "rms"
    final_norms: int = 1
    head_bias: bool = False
    embedding_extra: int = 0
    other: int = 0
    other_products: int = 0
    writes: bool = True
    towers: int = 0
    activation: str = "SwiGLU"
    citation: str = ""
    source: str = ""
    checked: bool = True
    open: str = ""
    published: Published | None = field(default=None)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError(f"{self.name} needs at least one layer, got none. Give it layers.")

    @property
    def num_params(self) -> int:
        """All weights."""
        return self.params().total

    @property
    def num_active_params(self) -> int:
        """Weights that work on one token: of the experts those that it passes, of the rest all."""
        return self.params(active=True).total

    def num_params_without(self, left_out: Without, *, active: bool = False) -> int:
        """Weights, leaving out what a publication left out.

        Args:
            left_out: "nothing"; the "input embedding" where the output has a table of its own (where they share one,
                it works as the output too and stays); or all "embeddings", the output's included.
            active: those that work on one token.
        """
        parts = self.params(active=active)
        if left_out == "nothing":
            return parts.total
        if left_out == "input embedding":
            return parts.total - (0 if self.tied else parts.embeddings)
        return parts.total - parts.embeddings - parts.head

    @property
    def norm_params(self) -> int:
        """Weights of one norm over the model's width."""
        return {"rms": 1, "layer": 2, "none": 0}[self.norm] * self.width

    @property
    def depth(self) -> int:
        """Layers of both stacks."""
        return len(self.encoder) + len(self.layers)

    @property
    def mixtures(self) -> tuple[Experts, ...]:
        """All mixtures, encoder first."""
        layers = (*self.encoder, *self.layers)
        return tuple(feed for layer in layers for feed in layer.feeds if isinstance(feed, Experts))

    def params(self, *, active: bool = False) -> Parts:
        """Weights by part; ``active`` for those that work on one token."""
        return count.model_params(self, active=active)

    def layer_params(self, layer: Layer, *, active: bool = False) -> Parts:
        """Weights by part of one layer of this model."""
        return count.layer_params(layer, width=self.width, norm=self.norm_params, active=active)

    def flops_per_token(self, context: int = 0, *, causal: bool = False, backward: bool = False) -> int:
        """Floating-point operations that one token takes, an addition and a multiplication counting as two.

        Only matrix products (and convolutions) count, as in ``torch.utils.flop_counter``; what is done element by
        element does not. In an encoder-decoder it is one source token and one target token.

        Args:
            context: tokens that attention looks at; 0 leaves attention's own products out.
            causal: count of a sequence of ``context`` tokens only the pairs that may see each other, half of them.
            backward: count forward and backward, three times forward.
        """
        return self.flops(context, causal=causal, backward=backward).total

    def flops(self, context: int = 0, *, causal: bool = False, backward: bool = False) -> Parts:
        """The same by part: attention with its own products, head with the product even where its table is shared."""
        return cost.model_flops(self, context, causal=causal) * (3 if backward else 1)

    def cache_bytes(self, context: int, *, dtype: str = "bf16") -> int:
        """Bytes that one sequence of ``context`` tokens keeps for the next: keys, values, latents, states."""
        return cost.cache_bytes(self, context, dtype)

    def memory(
        self,
        *,
        dtype: str = "bf16",
        train: bool = False,
        optimizer: str = "adamw",
        context: int = 0,
        sequences: int = 1,
    ) -> cost.Memory:
        """Bytes for weights, and for what is kept beside them, on one device and without activations.

        Args:
            dtype: of the weights and the cache: "fp32", "bf16", "fp16", "fp8", "int8", "mxfp4" or "int4".
            train: whether gradients and the optimizer's states are kept; then nothing is cached.
            optimizer: "adamw" (two float32 numbers a weight), "sgd" (none) or "momentum" (one); where weights are not
                float32, one float32 copy of the weight more.
            context: tokens of each sequence in the cache.
            sequences: in the cache.

        Raises:
            ConfigError: for another dtype or optimizer.
        """
        return cost.memory(self, dtype=dtype, train=train, optimizer=optimizer, context=context, sequences=sequences)
