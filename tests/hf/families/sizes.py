"""Small values for the sizes that configs name, and a config made from them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

VOCABULARY = 97
TEXT_IDS = range(3, 90)  # those of no special token
# What some configs read from their keywords though they have no field for it.
KEYWORDS = re.compile(r"rope_theta|global_head_dim|vision_start_token_id|shared_expert_intermediate_size|swa_\w+")

# A config takes those that it has a field for. What a family wants otherwise stands with the family.
SMALL: dict[str, Any] = {
    # the transformer
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 5,
    # the experts, under their many names
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 12,
    "shared_experts_intermediate_size": 12,
    "shared_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 12,
    # one dense layer before them
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # latent and sparse attention
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    # linear attention and state spaces
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_d_state": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_chunk_size": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 4,
    "chunk_size": 4,
    "n_groups": 2,
    # the towers that see and hear, and what leads from them to the text
    "depth": 2,
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": 4,
    "image_size": 16,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "projector_hidden_size": 32,
    "projection_hidden_dim": 32,
    "projection_intermediate_size": 24,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "output_proj_dims": 32,
    "adapter_in_dim": 32,
    "adapter_input_size": 32,
    "adapter_out_dim": 32,
    "feature_size": 16,
    "num_mel_bins": 16,
    "n_mel_bins": 4,
    "mel_vocab_size": 16,
    "downsample_hidden_size": 8,
    "output_dim": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    # ids of tokens that stand for images and the like: beyond those that the text takes
    "image_token_id": 90,
    "image_token_index": 90,
    "video_token_id": 91,
    "video_token_index": 91,
    "audio_token_id": 92,
    "image_start_token_id": 93,
    "vision_start_token_id": 93,
    "boi_token_id": 93,
    "boi_token_index": 93,
    "image_end_token_id": 94,
    "vision_end_token_id": 94,
    "eoi_token_id": 94,
    "eoi_token_index": 94,
    "video_start_token_id": 95,
    "video_end_token_id": 96,
    # heads that predict further tokens
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
}


def config_of(kind: type[PreTrainedConfig], changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A config of this class with small sizes, and small configs inside it.

    Args:
        changes: values that win over the small ones; for a config inside, a dict of such values, or None for none.
    """
    fields = {field.name for field in dataclasses.fields(kind)}
    aliases = {name: field for name, field in kind.attribute_map.items() if name not in fields}
    changes = {aliases.get(name, name): value for name, value in changes.items()}
    unknown = {name for name in changes.keys() - fields if not KEYWORDS.fullmatch(name)}
    assert not unknown, f"{kind.__name__} has no {sorted(unknown)}; it has {sorted(fields)}."
    values = {name: value for name, value in SMALL.items() if name in fields} | dict(changes)
    if "kv_lora_rank" in fields and "num_key_value_heads" not in changes:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention has a key for each query head
    for name, default in kind.sub_configs_defaults.items():
        given = changes.get(name, {})
        if given is not None:
            named = default.config_class is AutoConfig
            values[name] = config_of(CONFIG_MAPPING[default.model_type] if named else default.config_class, given)
    return kind(**values)
