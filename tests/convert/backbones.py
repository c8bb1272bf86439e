"""Tiny dense models of the families that sparse models are exported from, and sparse ones made of them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import moesaic as mz
from moesaic import recipes

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MULTIPLIERS = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 3,
}
HYBRID = {"num_experts": 1, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4}
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},
    "qwen3": {"head_dim": 12, "tie_word_embeddings": True},
    "youtu": LATENT | {"num_key_value_heads": 2},
    "granite": MULTIPLIERS,
    "jamba": HYBRID,
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
}


def dense(base: str, **changes: Any) -> PreTrainedModel:
    """A dense model with random weights and no two alike, in evaluation mode."""
    config_class = CONFIG_MAPPING[base]
    if base == "t5":
        sizes = {"vocab_size": 61, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 4, "num_heads": 2}
        settings = {"decoder_start_token_id": 0, "dropout_rate": 0.0, "feed_forward_proj": "relu"}
        model = AutoModelForSeq2SeqLM.from_config(config_class(**sizes | settings | changes))
    else:
        model = AutoModelForCausalLM.from_config(config_class(**SIZES | CHANGES.get(base, {}) | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def sparse(base: str, recipe: str, *, backbone: dict[str, Any] | None = None, **options: Any) -> PreTrainedModel:
    """A sparse model with top-2 of 4 experts, unless told otherwise, and biases that are not zero."""
    published = recipes.get(recipe).options
    sizes = {"num_experts": 4} | ({"top_k": 2} if published.get("top_k", 1) != 1 else {})
    model = mz.sparsify(dense(base, **backbone or {}), recipe, **sizes | options)
    for name, buffer in model.named_buffers():
        if name.endswith("bias_E"):
            buffer.normal_(std=0.2)
    for name, parameter in model.named_parameters():
        if "experts" in name or "shared" in name or "router" in name:
            parameter.data.normal_(std=0.3)
    return model.eval()
