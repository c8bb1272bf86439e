"""The families that are language models and nothing else."""

from __future__ import annotations

from tests.hf.families.family import LINEAR, SPARSE_AFTER_DENSE, YARN, Family, causal
from tests.hf.families.inputs import sequence_to_sequence

LANGUAGE: dict[str, Family] = {
    "afmoe": causal("Afmoe"),
    "axk1": causal("AXK1"),
    "axk2": causal("AXK2"),
    "bailing_hybrid": causal("BailingHybrid", layer_group_size=2),
    "beam": causal("Beam", mlp_layer_types=SPARSE_AFTER_DENSE),
    "cohere2_moe": causal("Cohere2Moe", num_layers_moe=3, logit_scale=1.0),
    "dbrx": causal(
        "Dbrx",
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 16, "moe_top_k": 2},
    ),
    "deepseek_v2": causal("DeepseekV2"),
    "deepseek_v3": causal("DeepseekV3"),
    "deepseek_v32": causal("DeepseekV32"),
    "deepseek_v4": causal(
        "DeepseekV4",
        num_layers_moe=3,
        mlp_layer_types=["hash_moe", "moe", "moe"],
        o_groups=2,
        o_lora_rank=8,
        hc_mult=2,
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    ),
    "doge": causal("Doge", num_layers_moe=3, is_moe=True, num_experts=16),  # 4 keys x 4 keys
    "dots1": causal("Dots1"),
    "ernie4_5_moe": causal("Ernie4_5_Moe"),
    "exaone_moe": causal("ExaoneMoe"),
    "flex_olmo": causal("FlexOlmo", num_layers_moe=3),
    "flint": causal("Flint", mlp_only_layers=[0]),
    "glm4_moe": causal("Glm4Moe"),
    "glm4_moe_lite": causal("Glm4MoeLite"),
    "glm_moe_dsa": causal("GlmMoeDsa"),
    "gpt_oss": causal("GptOss", num_layers_moe=3, rope_parameters=YARN),
    "granitemoe": causal("GraniteMoe", num_layers_moe=3),
    "granitemoe_swa": causal("GraniteMoeSWA", num_layers_moe=3),
    "granitemoehybrid": causal("GraniteMoeHybrid", num_layers_moe=3, layer_types=["mamba", "attention", "mamba"]),
    "granitemoeshared": causal("GraniteMoeShared", num_layers_moe=3),
    "hunyuan_v1_moe": causal("HunYuanMoEV1", num_layers_moe=3),
    "hy_v3": causal("HYV3"),
    "hy_v4": causal("HYV4"),
    "jamba": causal("Jamba", attn_layer_period=2, attn_layer_offset=1, num_hidden_layers=4),
    # Its attention routes too, to heads: three more routers, which are not counted here.
    "jetmoe": causal("JetMoe", num_layers_moe=3, kv_channels=8),
    "kimi_linear": causal("KimiLinear", layer_types=LINEAR),
    "kolibri1": causal("Kolibri1", num_layers_moe=3),
    "laguna": causal("Laguna"),
    "lfm2_moe": causal("Lfm2Moe", layer_types=["conv", "full_attention", "conv"]),
    "longcat_flash": causal(
        "LongcatFlash", num_layers=2, ffn_hidden_size=24, expert_ffn_hidden_size=16, zero_expert_num=3
    ),
    "mellum": causal("Mellum", num_layers_moe=3),
    "mimo_v2_flash": causal("MiMoV2Flash"),
    "minimax": causal("MiniMax", num_layers_moe=3),
    "minimax_m2": causal("MiniMaxM2", num_layers_moe=3),
    "mistral4": causal("Mistral4", rope_parameters=YARN | {"llama_4_scaling_beta": 0.1}),
    "mixtral": causal("Mixtral", num_layers_moe=3),
    "nemotron_h": causal("NemotronH", layers_block_type=["linear_attention", "moe", "full_attention", "moe"]),
    "nllb_moe": Family(
        architecture="NllbMoeForConditionalGeneration",
        inputs=sequence_to_sequence,
        num_layers_moe=4,
        changes={
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "decoder_attention_heads": 4,
            "encoder_sparse_step": 1,
            "decoder_sparse_step": 1,
        },
    ),
    "olmoe": causal("Olmoe", num_layers_moe=3),
    "openai_privacy_filter": Family(
        architecture="OpenAIPrivacyFilterForTokenClassification", num_layers_moe=3, changes={"rope_parameters": YARN}
    ),
    "phimoe": causal("Phimoe", num_layers_moe=3),
    "qwen2_moe": causal("Qwen2Moe", num_layers_moe=3),
    "qwen3_moe": causal("Qwen3Moe", num_layers_moe=3),
    "qwen3_next": causal("Qwen3Next", num_layers_moe=3, layer_types=LINEAR),
    "solar_open": causal("SolarOpen", num_layers_moe=3),
    "switch_transformers": Family(
        architecture="SwitchTransformersForConditionalGeneration",
        inputs=sequence_to_sequence,
        num_layers_moe=4,
        changes={
            "d_kv": 8,
            "d_ff": 16,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 2,
        },
    ),
    "zaya": causal("Zaya", num_layers_moe=3, num_experts=4, num_experts_per_tok=1, router_hidden_size=16),
}
