"""A row for each router class of transformers; rows that classes share say that they compute the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.hf.native.router_spec import RouterSpec
from moesaic.hf.native.table import Row, groups_of, linear_logits


def _gemma_logits(row: Row, router: nn.Module, x_TD: Tensor, spec: RouterSpec) -> Tensor:
    """Gemma 4 norms and scales the tokens first."""
    if spec.precision == "float32":
        x_TD = x_TD.float()
    x_TD = router.norm(x_TD) * router.scale * router.scalar_root_size  # type: ignore[operator]
    return linear_logits(row, router, x_TD, spec)


def _deepseek_v2(router: nn.Module, _block: nn.Module) -> Mapping[str, Any]:
    if router.topk_method == "greedy":
        return {"groups": None}
    return {"groups": groups_of(cast(int, router.num_group), cast(int, router.topk_group), 1)}


def _cohere2(router: nn.Module, _block: nn.Module) -> Mapping[str, Any]:
    if router.expert_selection_fn == "softmax":
        return {"score": "softmax", "normalize": "sum"}
    return {"score": "sigmoid", "normalize": "sum" if router.norm_topk_prob else None}


def _lfm2(router: nn.Module, _block: nn.Module) -> Mapping[str, Any]:
    return {"selection_bias": bool(router.use_expert_bias)}


def _score_fn(router: nn.Module, _block: nn.Module) -> Mapping[str, Any]:
    """DeepSeek-V4 and Inkling 2 name their scoring function in the configuration; told apart by value."""
    probe = torch.linspace(-3, 3, 13, device="cpu")
    known = {"sigmoid": probe.sigmoid(), "sqrt_softplus": F.softplus(probe).sqrt(), "softmax": probe.softmax(-1)}
    scored = cast(Callable[[Tensor], Tensor], router.score_fn)(probe)
    # No match is left to the numerical check, which names the first difference.
    return {"score": next((name for name, value in known.items() if torch.allclose(value, scored)), "sigmoid")}


def _inkling(router: nn.Module, _block: nn.Module) -> Mapping[str, Any]:
    return {"num_experts": router.num_experts, "shared_gates": router.n_shared_experts}


def _privacy_filter(router: nn.Module, _block: nn.Module) -> Mapping[str, Any]:
    return {"scale": 1 / cast(int, router.top_k)}


def _longcat(router: nn.Module, _block: nn.Module) -> Mapping[str, Any]:
    return {"null_experts": cast(int, router.n_routed_experts) - cast(int, router.num_experts)}


def _phimoe(router: nn.Module, _block: nn.Module) -> Mapping[str, Any]:
    return {"jitter": float(cast(float, router.router_jitter_noise))}


def _laguna(router: nn.Module, _block: nn.Module) -> Mapping[str, Any]:
    return {"softcap": float(cast(float, router.router_logit_softcapping))}


def _muse_spark(router: nn.Module, _block: nn.Module) -> Mapping[str, Any]:
    return {"multiplier": float(cast(float, router.output_multiplier))}


def _zaya(router: nn.Module, _block: nn.Module) -> Mapping[str, Any]:
    return {"num_experts": cast(int, router.num_router_classes)}


def _dbrx(_router: nn.Module, block: nn.Module) -> Mapping[str, Any]:
    order = block.moe_normalize_expert_weights
    return {
        "top_k": block.top_k,
        "normalize": None if order is None else "norm",
        "norm_order": 1.0 if order is None else float(cast(float, order)),
    }


def _doge(router: nn.Module, _block: nn.Module) -> Mapping[str, Any]:
    return {"num_experts": cast(int, router.num_keys) ** 2}


def _vitpose(router: nn.Module, _block: nn.Module) -> Mapping[str, Any]:
    return {"num_experts": cast(int, router.num_experts)}


def _as_given(_row: Row, _router: nn.Module, logits_TE: Tensor, _spec: RouterSpec) -> Tensor:
    """The block has worked the logits out."""
    return logits_TE


_SOFTMAX = {"score": "softmax", "normalize": "sum"}
_CHOSEN_LOGITS = {"score": "softmax", "select": "logit", "normalize": "sum"}
_SIGMOID = {"score": "sigmoid", "normalize": "sum"}
_BIAS = "e_score_correction_bias"

_qwen = Row(spec=_SOFTMAX, normalize_if="norm_topk_prob")
_softmax_always = Row(spec=_SOFTMAX)
_granite = Row(spec=_CHOSEN_LOGITS)
_deepseek_v2_row = Row(
    spec={"score": "softmax", "precision": "float32", "masked": 0.0}, scale="routed_scaling_factor", read=_deepseek_v2
)
_deepseek_v3 = Row(
    spec=_SIGMOID | {"precision": "float32", "eps": 1e-20},
    selection_bias=_BIAS,
    normalize_if="norm_topk_prob",
    scale="routed_scaling_factor",
    groups=("num_group", "topk_group"),
)
_ernie = Row(
    spec={"score": "softmax", "normalize": "clamp", "precision": "float32"},
    selection_bias=f"moe_statics.{_BIAS}",
    eps="norm_min",
)
_hy_v3 = Row(
    spec=_SIGMOID | {"precision": "float32", "eps": 1e-20},
    selection_bias=f"block.{_BIAS}",
    scale="router_scaling_factor",
)
_minimax_m3 = Row(spec=_SIGMOID | {"precision": "weight"}, selection_bias=_BIAS)
_gemma = Row(
    spec=_SOFTMAX,
    top_k="config.top_k_experts",
    weight="proj.weight",
    expert_scale="per_expert_scale",
    logits=_gemma_logits,
    returns_logits=False,
)

ROWS: Mapping[str, Row] = {
    "AfmoeTokenChoiceRouter": Row(
        spec=_SIGMOID | {"eps": 1e-20},
        weight="gate.weight",
        selection_bias="block.expert_bias",
        scale="route_scale",
        takes=3,
    ),
    "AriaTextTopKRouter": _granite,
    "AXK1TopkRouter": _deepseek_v3,
    "AXK2TopkRouter": Row(
        spec={**_deepseek_v3.spec, "masked": 0.0},
        selection_bias=_BIAS,
        normalize_if="norm_topk_prob",
        scale="routed_scaling_factor",
        groups=("num_group", "topk_group"),
    ),
    "BailingHybridTopkRouter": _deepseek_v3,
    "BeamTopKRouter": Row(
        spec=_deepseek_v3.spec,
        selection_bias=_BIAS,
        normalize_if="norm_topk_prob",
        groups=("num_group", "topk_group"),
    ),
    "Cohere2MoeTopKRouter": Row(spec={"select": "logit"}, read=_cohere2),
    "DbrxRouter": Row(top_k=1, weight="layer.weight", read=_dbrx, parts=0),
    "DeepseekOcr2TextTopkRouter": _deepseek_v2_row,
    "DeepseekV2TopkRouter": _deepseek_v2_row,
    "DeepseekV32TopkRouter": _deepseek_v3,
    "DeepseekV3TopkRouter": _deepseek_v3,
    "DeepseekV4HashRouter": Row(
        spec={"normalize": "sum", "eps": 1e-20, "policy": "table"}, scale="routed_scaling_factor", read=_score_fn
    ),
    "DeepseekV4TopKRouter": Row(
        spec={"normalize": "sum", "eps": 1e-20}, selection_bias=_BIAS, scale="routed_scaling_factor", read=_score_fn
    ),
    "DiffusionGemmaTextRouter": _gemma,
    "DogeCDMoE": Row(spec=_CHOSEN_LOGITS, weight="router_gate.weight", read=_doge, logits=_as_given, parts=0),
    "Dots1TopkRouter": _deepseek_v3,
    "Dots3NoteTextTopkRouter": _deepseek_v3,
    "Dots3NoteVisionTopKRouter": _hy_v3,
    "Ernie4_5_MoeTopKRouter": _ernie,
    "Ernie4_5_VLMoeMoeTopKRouter": _ernie,
    "ExaoneMoeTopkRouter": _deepseek_v3,
    "FlexOlmoTopKRouter": _qwen,
    "FlintTopKRouter": Row(spec=_SIGMOID | {"precision": "float32"}, normalize_if="norm_topk_prob"),
    "Gemma4TextRouter": _gemma,
    "Glm4MoeLiteTopkRouter": _deepseek_v3,
    "Glm4MoeTopkRouter": _deepseek_v3,
    "Glm4vMoeTextTopkRouter": _deepseek_v3,
    "Glm5NextTextTopkRouter": _deepseek_v3,
    "GlmMoeDsaTopkRouter": _deepseek_v3,
    "GptOssTopKRouter": Row(spec=_CHOSEN_LOGITS, logit_bias="bias"),
    "GraniteMoeHybridTopKRouter": _granite,
    "GraniteMoeSWATopKRouter": _granite,
    "GraniteMoeSharedTopKRouter": _granite,
    "GraniteMoeTopKRouter": _granite,
    "HYV3TopKRouter": _hy_v3,
    "HYV4TopkRouter": _deepseek_v3,
    "HunYuanMoEV1Gate": Row(spec=_SOFTMAX | {"precision": "weight"}, weight="wg.weight"),
    "Inkling2TopKRouter": Row(
        spec={"normalize": "sum", "eps": 1e-20, "precision": "float32"},
        selection_bias=_BIAS,
        scale="routed_scaling_factor",
        read=_score_fn,
    ),
    "InklingTopkRouter": Row(
        spec={"score": "sigmoid", "precision": "float32"},
        selection_bias=_BIAS,
        scale="route_scale",
        global_scale="global_scale",
        read=_inkling,
        parts=4,
    ),
    "JambaTopKRouter": Row(spec={"score": "softmax"}),
    "JetMoeTopKGating": Row(spec=_CHOSEN_LOGITS, weight="layer.weight", parts=0),
    "KimiLinearTopkRouter": _deepseek_v3,
    "Kolibri1TopKRouter": Row(
        spec=_SIGMOID | {"select": "logit", "precision": "float32"},
        selection_bias=_BIAS,
        normalize_if="norm_topk_prob",
    ),
    "LagunaTopKRouter": Row(
        spec=_SIGMOID,
        selection_bias=_BIAS,
        read=_laguna,
    ),
    "Lfm2MoeTopKRouter": Row(
        spec=_SIGMOID | {"eps": 1e-6},
        selection_bias="block.expert_bias",
        normalize_if="norm_topk_prob",
        scale="routed_scaling_factor",
        read=_lfm2,
    ),
    "Llama4Router": Row(spec={"score": "sigmoid", "select": "logit", "weigh": "input"}, parts=0),
    "LongcatFlashTopkRouter": Row(
        spec={"score": "softmax", "precision": "float32", "null": "identity"},
        weight="classifier.weight",
        selection_bias=_BIAS,
        scale="routed_scaling_factor",
        read=_longcat,
    ),
    "MellumTopKRouter": _qwen,
    "MiMoV2FlashTopkRouter": _deepseek_v3,
    "MiniMaxM2TopKRouter": Row(spec=_SIGMOID | {"precision": "weight"}, selection_bias=f"block.{_BIAS}"),
    "MiniMaxM3VLTopKRouter": _minimax_m3,
    "MiniMaxTopKRouter": _softmax_always,
    "Mistral4TopkRouter": Row(
        spec=_SOFTMAX | {"eps": 1e-20, "masked": 0.0},
        normalize_if="norm_topk_prob",
        scale="routed_scaling_factor",
        groups=("num_group", "topk_group"),
    ),
    "MistralLarge4TextTopkRouter": Row(
        spec=_SOFTMAX | {"eps": 1e-20, "masked": 0.0, "precision": "float32"},
        scale="routed_scaling_factor",
        groups=("num_group", "topk_group"),
    ),
    "MixtralTopKRouter": _softmax_always,
    "MuseSparkTopkRouter": Row(
        spec=_SIGMOID | {"precision": "float32"},
        selection_bias=_BIAS,
        scale="routed_scaling_factor",
        eps="norm_topk_prob_eps",
        read=_muse_spark,
    ),
    "NemotronHTopkRouter": _deepseek_v3,
    "NllbMoeTop2Router": Row(
        spec=_SOFTMAX | {"precision": "weight", "capacity": True}, top_k=2, weight="classifier.weight", parts=0
    ),
    "OlmoeTopKRouter": _qwen,
    "OpenAIPrivacyFilterTopKRouter": Row(
        spec=_CHOSEN_LOGITS | {"precision": "float32"}, logit_bias="bias", read=_privacy_filter
    ),
    "PhimoeTopKRouter": Row(spec={"score": "softmax", "select": "logit", "policy": "sparsemixer"}, read=_phimoe),
    "Qwen2MoeTopKRouter": _qwen,
    "Qwen3MoeTopKRouter": _qwen,
    "Qwen3NextTopKRouter": _qwen,
    "Qwen3OmniMoeTalkerTextTopKRouter": _qwen,
    "Qwen3OmniMoeTextTopKRouter": _softmax_always,
    "Qwen3OmniMoeThinkerTextTopKRouter": _qwen,
    "Qwen3VLMoeTextTopKRouter": _softmax_always,
    "Qwen3_5MoeTopKRouter": _softmax_always,
    "Qwen4ExpTextTopKRouter": _qwen,
    "SolarOpenTopkRouter": _deepseek_v3,
    "Step3p7TopKRouter": _minimax_m3,
    "SwitchTransformersTop1Router": Row(
        spec={"score": "softmax", "precision": "weight", "capacity": True},
        top_k=1,
        weight="classifier.weight",
        takes=3,
        parts=0,
    ),
    "UnlimitedOcrTextTopkRouter": _deepseek_v2_row,
    "VitPoseBackboneMoeMLP": Row(
        spec={"policy": "given"}, top_k=1, weight="fc2.weight", read=_vitpose, logits=None, parts=0
    ),
    "ZayaRouter": Row(
        spec={"score": "softmax", "null_experts": 1, "null": "skip"},
        weight="router_mlp.out_proj.weight",
        reads="down_proj.weight",
        selection_bias="balancing_biases",
        pinned_bias=-1,
        read=_zaya,
        logits=None,
        takes=3,
        parts=4,
    ),
}
"""By the name of the router's class; rows that are shared say that classes compute the same."""
