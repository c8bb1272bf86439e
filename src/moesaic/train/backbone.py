"""Dense transformers models from numbers, and the dense twin of a sparse one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moesaic.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Backbone:
    """The numbers of a dense language model; nothing is fetched to build it.

    Args:
        family: a name in :data:`FAMILIES`.
        width: size of the residual stream.
        layers: transformer blocks, of each of encoder and decoder in ``t5``; LSTM layers in ``lstm``, with a
            feed-forward network between each and the next.
        heads: attention heads; ``lstm`` has none.
        hidden: hidden size of each feed-forward network.
        context: longest sequence in tokens.
        vocab_size: tokens of the tokenizer.
        end_token: id of the token that begins, ends and pads a text.
        init_std: standard deviation of the initial weights; ``t5`` draws each map by its fan-in, as published.
    """

    family: str
    width: int
    layers: int
    heads: int
    hidden: int
    context: int
    vocab_size: int
    end_token: int
    init_std: float

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether one stack reads the text so far and another one writes on."""
        return self.family in ENCODER_DECODERS

    def config(self) -> PreTrainedConfig:
        """Give the transformers config."""
        return FAMILIES[self.family](self)

    def build(self) -> PreTrainedModel:
        """Build the model with fresh float32 weights, drawn from torch's global generator."""
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        from_config: Any = (AutoModelForSeq2SeqLM if self.is_encoder_decoder else AutoModelForCausalLM).from_config
        attention = {} if self.family in WITHOUT_ATTENTION else {"attn_implementation": "sdpa"}
        model: PreTrainedModel = from_config(self.config(), dtype=torch.float32, **attention)
        return model

    def num_params(self) -> int:
        """Count the parameters, tied ones once, without allocating them."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build().parameters())


def twin_hidden(backbone: Backbone, active_params: int) -> int:
    """Give the smallest hidden size with which a dense model has at least ``active_params`` parameters.

    The twin is never the smaller one: rounding, and the router's parameters, go in its favour.

    Raises:
        ConfigError: if even a hidden size of 1 has more.
    """
    first, second = (dataclasses.replace(backbone, hidden=hidden).num_params() for hidden in (1, 2))
    if first > active_params:
        raise ConfigError(
            f"a dense {backbone.family} of width {backbone.width} has at least {first} parameters, but the "
            f"sparse model has only {active_params} active ones. Raise hidden or top_k, or train without the twin."
        )
    return 1 + -(-(active_params - first) // (second - first))


def _gpt2(backbone: Backbone) -> PreTrainedConfig:
    from transformers import GPT2Config

    return GPT2Config(
        n_embd=backbone.width,
        n_layer=backbone.layers,
        n_head=backbone.heads,
        n_inner=backbone.hidden,
        n_positions=backbone.context,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=backbone.init_std,
        **_tokens(backbone),
    )


def _llama(backbone: Backbone) -> PreTrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(**_decoder(backbone), head_dim=backbone.width // backbone.heads)


def _qwen3(backbone: Backbone) -> PreTrainedConfig:
    from transformers import Qwen3Config

    return Qwen3Config(**_decoder(backbone), head_dim=backbone.width // backbone.heads)


def _jamba(backbone: Backbone) -> PreTrainedConfig:
    """Mamba layers with one attention layer in every eight, the fifth, as published (Lieber et al. 2024, section 3).

    A model of four layers or fewer, which would have none, has one in its middle.
    """
    from transformers import JambaConfig

    period = 8 if backbone.layers > 4 else backbone.layers
    return JambaConfig(
        **_decoder(backbone),
        attn_layer_period=period,
        attn_layer_offset=period // 2,
        # Its own mixtures are left out; sparsify puts ours in.
        num_experts=1,
        num_experts_per_tok=1,
    )


def _lstm(backbone: Backbone) -> PreTrainedConfig:
    from moesaic.hf import LstmConfig

    return LstmConfig(
        hidden_size=backbone.width,
        intermediate_size=backbone.hidden,
        num_hidden_layers=backbone.layers,
        max_position_embeddings=backbone.context,
        initializer_range=backbone.init_std,
        **_tokens(backbone),
    )


def _t5(backbone: Backbone) -> PreTrainedConfig:
    """T5 of version 1.0: plain networks with ReLU, as in the first Switch models, and tied embeddings."""
    from transformers import T5Config

    return T5Config(
        d_model=backbone.width,
        d_kv=backbone.width // backbone.heads,
        d_ff=backbone.hidden,
        num_layers=backbone.layers,
        num_decoder_layers=backbone.layers,
        num_heads=backbone.heads,
        dropout_rate=0.0,
        **_tokens(backbone) | {"decoder_start_token_id": backbone.end_token},
    )


def _decoder(backbone: Backbone) -> dict[str, Any]:
    """The names that the newer decoders share."""
    return {
        "hidden_size": backbone.width,
        "num_hidden_layers": backbone.layers,
        "num_attention_heads": backbone.heads,
        "num_key_value_heads": backbone.heads,
        "intermediate_size": backbone.hidden,
        "max_position_embeddings": backbone.context,
        "initializer_range": backbone.init_std,
        "tie_word_embeddings": False,
        **_tokens(backbone),
    }


def _tokens(backbone: Backbone) -> dict[str, Any]:
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), backbone.end_token)
    return {"vocab_size": backbone.vocab_size, **ends}


FAMILIES: Mapping[str, Callable[[Backbone], PreTrainedConfig]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "gpt2": _gpt2,
    "jamba": _jamba,
    "lstm": _lstm,
    "t5": _t5,
}
"""The transformers configuration of each family, by name."""

ENCODER_DECODERS = frozenset({"t5"})
WITHOUT_ATTENTION = frozenset({"lstm"})
# Rotary positions turn pairs of numbers.
ROTARY = frozenset({"llama", "qwen3"})
