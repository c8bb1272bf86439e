"""The families that see or hear besides; in two of them experts work on what is seen."""

from __future__ import annotations

from typing import Any

from tests.hf.families.family import LINEAR, ROPE, SPARSE_AFTER_DENSE, YARN, Family, conditional
from tests.hf.families.inputs import canvas, image, text_with_image, text_with_image_tokens


def mrope(*section: int) -> dict[str, Any]:
    """Rotary positions in three dimensions, with so many frequencies for each."""
    return ROPE | {"mrope_section": list(section)}


GEMMA = {"global_head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
INKLING = {
    "rel_extent": 8,
    "d_rel": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 5,
}
SAM = {
    "output_channels": 8,
    "downsample_channels": [8, 8],
    "window_size": 2,
    "global_attn_indexes": [1],
    "mlp_dim": 24,
}

COMPOSITE: dict[str, Family] = {
    "aria": conditional("Aria", num_layers_moe=3, projector_patch_to_query_dict={16: 4}),
    "deepseek_ocr2": conditional(
        "DeepseekOcr2", text_config={"mlp_layer_types": SPARSE_AFTER_DENSE}, vision_config={"sam_config": SAM}
    ),
    "diffusion_gemma": Family(
        architecture="DiffusionGemmaForBlockDiffusion",
        home="text_config",
        num_layers_moe=6,  # the encoder's three and the decoder's, whose weights are the same
        inputs=canvas,
        changes={"canvas_length": 5, "text_config": GEMMA},
    ),
    "dots3_note": conditional(
        "Dots3Note",
        num_layers_moe=4,  # two of text, two of images
        inputs=text_with_image,
        vision_config={"mlp_layer_types": SPARSE_AFTER_DENSE},
        text_config={
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 12,
            "swa_kv_lora_rank": 8,
            "swa_head_dim": 16,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 8,
        },
    ),
    "ernie4_5_vl_moe": conditional(
        "Ernie4_5_VLMoe",
        num_layers_moe=4,  # in each of two layers one for text and one for images
        inputs=text_with_image_tokens,
        text_config={"moe_intermediate_size": [16, 12], "rope_parameters": mrope(1, 1, 2)},
    ),
    "gemma4": conditional(
        "Gemma4",
        num_layers_moe=3,
        vision_config=None,
        audio_config=None,
        text_config={
            **GEMMA,
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97,
        },
    ),
    "glm4v_moe": conditional("Glm4vMoe", text_config={"rope_parameters": mrope(1, 1, 0)}),
    "glm5_next": conditional(
        "Glm5Next",
        text_config={
            "mlp_layer_types": SPARSE_AFTER_DENSE,
            "layer_types": LINEAR,
            "index_kpool": 4,
            "qk_rope_head_dim": 0,
        },
    ),
    "inkling": conditional("Inkling", num_layers_moe=3, text_config=INKLING | {"logits_mup_width_multiplier": 1.0}),
    "inkling2": conditional("Inkling2", num_layers_moe=3, text_config=INKLING),
    "llama4": conditional(
        "Llama4",
        num_layers_moe=3,
        text_config={"intermediate_size_mlp": 24},
        vision_config={
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    ),
    "minimax_m3_vl": conditional("MiniMaxM3Sparse", num_layers_moe=3),
    "mistral_large4": conditional("MistralLarge4", text_config={"rope_parameters": YARN}),
    "muse_spark": conditional(
        "MuseSpark",
        num_layers_moe=3,
        text_config={"moe_hidden_size": 24},
        audio_config={"num_hidden_layers": 2, "patch_sizes": (4, 2), "hidden_sizes": (8, 16), "depths": (1, 1)},
    ),
    "qwen3_5_moe": conditional("Qwen3_5Moe", num_layers_moe=3, text_config={"layer_types": LINEAR}),
    "qwen3_omni_moe": Family(
        architecture="Qwen3OmniMoeThinkerForConditionalGeneration",
        home="text_config",
        num_layers_moe=3,
        changes={"vision_start_token_id": 93},
    ),
    "qwen3_vl_moe": conditional("Qwen3VLMoe", num_layers_moe=3),
    "qwen4_exp": conditional(
        "Qwen4Exp",
        num_layers_moe=3,
        text_config={
            "layer_types": LINEAR,
            "hc_count": 2,
            "hc_lowrank": 8,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
        },
    ),
    "step3p7": conditional("Step3p7", text_config={"mlp_layer_types": SPARSE_AFTER_DENSE, "share_expert_dim": 12}),
    "unlimited_ocr": conditional("UnlimitedOcr", vision_config={"sam_config": SAM}),
    "vitpose_backbone": Family(
        architecture="VitPoseBackbone",
        inputs=image,
        num_layers_moe=3,
        changes={"image_size": (24, 16), "patch_size": (8, 8), "part_features": 8, "num_experts": 4},
    ),
}
