"""Tiny random models of the families that the bridge is tested on, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from moesaic import recipes
from moesaic.hf import LstmConfig, LstmForCausalLM

VOCABULARY = 61
TEXT = ("llama", "qwen3", "gpt2", "jamba", "lstm", "t5")
FAMILIES = (*TEXT, "vit")

# The recipes that have been here longest, tried on every family: one choice with capacity, two, and two with a bias.
CLASSIC = ("switch", "mixtral", "deepseek-v3")
DROPLESS = ("mixtral", "deepseek-v3")


def options_of(recipe: str) -> dict[str, Any]:
    """Small enough to be quick, large enough for top-2 of 4; recipes of one expert per token keep it."""
    published = recipes.get(recipe).options
    wanted = {"num_experts": 4, "top_k": 1 if published.get("top_k") == 1 else 2, "jitter": 0.0, "min_capacity": 1}
    return {name: value for name, value in wanted.items() if name in published}


OPTIONS = {recipe: options_of(recipe) for recipe in recipes.names()}


def build(family: str, **changes: Any) -> PreTrainedModel:
    """A dense model with random weights, in evaluation mode."""
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llama = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.1,
        **common,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**llama | changes)).eval()
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**llama | {"tie_word_embeddings": True} | changes)).eval()
    if family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "initializer_range": 0.1}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**sizes | dropout | common | changes)).eval()
    if family == "jamba":
        pattern = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 4}
        sizes = {name: value for name, value in llama.items() if name != "head_dim"}
        return JambaForCausalLM(JambaConfig(**sizes | pattern | changes)).eval()
    if family == "lstm":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "initializer_range": 0.1}
        return LstmForCausalLM(LstmConfig(**sizes | common | changes)).eval()
    if family == "t5":
        sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
        common = common | {"decoder_start_token_id": 0, "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu"}
        return T5ForConditionalGeneration(T5Config(**sizes | common | changes)).eval()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    image = {"image_size": 8, "patch_size": 4, "num_labels": 3, "initializer_range": 0.1}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(ViTConfig(**sizes | image | dropout | changes)).eval()


# What was gradient checkpointing is activation checkpointing in newer versions of transformers, which warn of the old.
CHECKPOINTING = "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"


def recompute(model: PreTrainedModel, kwargs: dict[str, Any] | None = None) -> None:
    """Turn activation checkpointing on, under the name that this transformers has for it."""
    getattr(model, f"{CHECKPOINTING}_checkpointing_enable")(kwargs)


def recompute_nothing(model: PreTrainedModel) -> None:
    """Turn activation checkpointing off."""
    getattr(model, f"{CHECKPOINTING}_checkpointing_disable")()


def recomputes(model: PreTrainedModel) -> bool:
    """Whether activation checkpointing is on."""
    return bool(getattr(model, f"is_{CHECKPOINTING}_checkpointing"))


def batch(family: str, *, sequences: int = 3, positions: int = 7) -> dict[str, Tensor]:
    """Random inputs with labels, without padding."""
    if family == "vit":
        return {"pixel_values": torch.randn(sequences, 3, 8, 8), "labels": torch.randint(0, 3, (sequences,))}
    input_ids = torch.randint(3, VOCABULARY, (sequences, positions))
    labels = torch.randint(3, VOCABULARY, (sequences, positions - 2)) if family == "t5" else input_ids.clone()
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """The gradient of every parameter, by name."""
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Same names, same dtypes, same bits."""
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name
