"""Dense transformers models from numbers, and the dense twin of a sparse one."""

from __future__ import annotations

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
        family: ``llama``, ``qwen3`` or ``gpt2``.
        width: size of the residual stream.
        layers: transformer blocks.
        heads: attention heads.
        hidden: hidden size of each feed-forward network.
        context: longest sequence in tokens.
        vocab_size: tokens of the tokenizer.
        end_token: id of the token that begins, ends and pads a text.
        init_std: standard deviation of the initial weights.
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

    def config(self) -> PreTrainedConfig:
        """Give the transformers config."""
        from transformers import GPT2Config, LlamaConfig, Qwen3Config

        tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), self.end_token)
        shared: dict[str, Any] = {"vocab_size": self.vocab_size, "initializer_range": self.init_std, **tokens}
        if self.family == "gpt2":
            return GPT2Config(
                n_embd=self.width, n_layer=self.layers, n_head=self.heads, n_inner=self.hidden,
                n_positions=self.context, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shared,
            )  # fmt: skip
        shared |= {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "head_dim": self.width // self.heads,
            "intermediate_size": self.hidden,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": False,
        }
        return LlamaConfig(**shared) if self.family == "llama" else Qwen3Config(**shared)

    def build(self) -> PreTrainedModel:
        """Build the model with fresh float32 weights, drawn from torch's global generator."""
        from transformers import AutoModelForCausalLM

        from_config: Any = AutoModelForCausalLM.from_config
        model: PreTrainedModel = from_config(self.config(), attn_implementation="sdpa", dtype=torch.float32)
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
    import dataclasses

    first, second = (dataclasses.replace(backbone, hidden=hidden).num_params() for hidden in (1, 2))
    if first > active_params:
        raise ConfigError(
            f"a dense {backbone.family} of width {backbone.width} has at least {first} parameters, but the "
            f"sparse model has only {active_params} active ones. Raise hidden or top_k, or train without the twin."
        )
    return 1 + -(-(active_params - first) // (second - first))
