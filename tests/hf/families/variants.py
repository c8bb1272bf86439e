"""Settings of a family that change how it routes, each worth a test of its own."""

from __future__ import annotations

from typing import Any

GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}  # 3 of the 4 experts of the best 2 groups
DROPS = {"moe_eval_capacity_token_fraction": 0.2}
NORMALIZED, NOT_NORMALIZED = {"norm_topk_prob": True}, {"norm_topk_prob": False}

# The families that limit a token to its best groups by the sum of each group's best two, and those that divide.
BY_GROUPS = (
    "axk1",
    "axk2",
    "bailing_hybrid",
    "beam",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "dots3_note",
    "exaone_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe",
    "glm5_next",
    "glm_moe_dsa",
    "hy_v4",
    "kimi_linear",
    "mimo_v2_flash",
    "mistral4",
    "mistral_large4",
    "nemotron_h",
    "solar_open",
)
DIVIDE_BY_DEFAULT = (
    "axk1",
    "axk2",
    "bailing_hybrid",
    "beam",
    "deepseek_v3",
    "deepseek_v32",
    "dots3_note",
    "exaone_moe",
    "flint",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe",
    "glm5_next",
    "glm_moe_dsa",
    "hy_v4",
    "kimi_linear",
    "lfm2_moe",
    "mellum",
    "mimo_v2_flash",
    "mistral4",
    "nemotron_h",
    "qwen3_next",
    "qwen3_omni_moe",
    "qwen4_exp",
    "solar_open",
)
DO_NOT_BY_DEFAULT = ("dots1", "flex_olmo", "kolibri1", "olmoe", "qwen2_moe", "qwen3_moe")

VARIANTS: dict[str, dict[str, Any]] = {
    **{f"{family}/groups": GROUPS for family in BY_GROUPS},
    **{f"{family}/not-normalized": NOT_NORMALIZED for family in DIVIDE_BY_DEFAULT},
    **{f"{family}/normalized": NORMALIZED for family in DO_NOT_BY_DEFAULT},
    "afmoe/scaled": {"route_scale": 2.5},
    "cohere2_moe/sigmoid": {"expert_selection_fn": "sigmoid"},
    "cohere2_moe/sigmoid-not-normalized": {"expert_selection_fn": "sigmoid", "norm_topk_prob": False},
    "cohere2_moe/no-shared": {"num_shared_experts": 0},
    "cohere2_moe/shared-sum": {"shared_expert_combination_strategy": "sum"},
    "dbrx/not-normalized": {"ffn_config": {"moe_normalize_expert_weights": None}},
    "dbrx/2-norm": {"ffn_config": {"moe_normalize_expert_weights": 2.0}},
    "deepseek_ocr2/groups": {"topk_method": "group_limited_greedy", **GROUPS},
    "deepseek_v2/groups": {"topk_method": "group_limited_greedy", **GROUPS},
    "deepseek_v2/scaled": {"routed_scaling_factor": 16.0},
    "deepseek_v4/sigmoid": {"scoring_func": "sigmoid"},
    "deepseek_v4/all-hash": {"mlp_layer_types": ["hash_moe"] * 3},
    "ernie4_5_moe/no-shared": {"moe_num_shared_experts": 0},
    "granitemoeshared/no-shared": {"shared_intermediate_size": 0},
    "hunyuan_v1_moe/choices-by-layer": {"moe_topk": [1, 2, 3]},
    "inkling2/sqrtsoftplus": {"scoring_func": "sqrtsoftplus"},
    "laguna/softcap": {"moe_router_logit_softcapping": 3.0, "moe_routed_scaling_factor": 2.5},
    "lfm2_moe/no-bias": {"use_expert_bias": False},
    "lfm2_moe/scaled": {"routed_scaling_factor": 2.5},
    "llama4/top-1": {"num_experts_per_tok": 1},
    "longcat_flash/no-zero-experts": {"zero_expert_num": 0},
    "mixtral/top-1": {"num_experts_per_tok": 1},
    "mixtral/top-3": {"num_experts_per_tok": 3},
    "mixtral/all": {"num_experts_per_tok": 8},
    "muse_spark/scaled": {"routed_scaling_factor": 2.5},
    "nemotron_h/latent": {"moe_latent_size": 20},
    "nllb_moe/drops": DROPS,
    "nllb_moe/normalized-before-dropping": DROPS | {"normalize_router_prob_before_dropping": True},
    "nllb_moe/drops-the-unsure": DROPS | {"batch_prioritized_routing": True},
    "nllb_moe/router-bias": {"router_bias": True},
    "step3p7/limits": {"swiglu_limits": [0.0, 0.5, 0.0], "moe_router_scaling_factor": 2.5},
    "switch_transformers/drops": {"expert_capacity": 1},
    "switch_transformers/router-bias": {"router_bias": True},
    "unlimited_ocr/groups": {"topk_method": "group_limited_greedy", **GROUPS},
}

SAME_ROUTER: dict[str, tuple[str, ...]] = {
    "deepseek_v3": ("axk1", "bailing_hybrid", "glm5_next", "kimi_linear", "mimo_v2_flash", "nemotron_h"),
    "deepseek_v32": ("glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hy_v4", "solar_open"),
    "mellum": ("qwen3_next", "qwen3_omni_moe", "qwen4_exp"),
    "olmoe": ("flex_olmo", "qwen2_moe", "qwen3_moe"),
    "deepseek_v2": ("deepseek_ocr2", "unlimited_ocr"),
}
"""Families whose routers have the same code as the first's, but for its name; a test compares them."""

_FIRST = {family: first for first, others in SAME_ROUTER.items() for family in others}


def _has_a_twin(name: str) -> bool:
    family, _, variant = name.partition("/")
    first = f"{_FIRST.get(family)}/{variant}"
    return first in VARIANTS and VARIANTS[first] == VARIANTS[name]


TRIED = tuple(name for name in VARIANTS if not _has_a_twin(name))
"""The variants to try: one of those that turn the same switch of the same code."""
