"""How the router classes of transformers are read: a row for each, from attributes of a loaded model to its spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.hf.native.router_spec import RouterSpec
from moesaic.routers.groups import GroupLimit


def linear_logits(row: Row, router: nn.Module, x_TD: Tensor, spec: RouterSpec) -> Tensor:
    """Logits of a router that is one linear map, in the precision that its spec names."""
    weight_ED = cast(Tensor, attribute(router, row.weight))
    bias_E = None if row.logit_bias is None else cast(Tensor, attribute(router, row.logit_bias))
    if spec.precision == "float32":
        # Within autocast too, whose products are in half precision.
        with torch.autocast(x_TD.device.type, enabled=False):
            return spec.finish(F.linear(x_TD.float(), weight_ED.float(), None if bias_E is None else bias_E.float()))
    if spec.precision == "weight":
        x_TD = x_TD.to(weight_ED.dtype)
    return spec.finish(F.linear(x_TD, weight_ED, bias_E))


Logits = Callable[["Row", nn.Module, Tensor, RouterSpec], Tensor]
Reader = Callable[[nn.Module, nn.Module], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Where a router class keeps what its spec needs. Names are attribute paths on the router.

    Attributes:
        spec: fields of the spec that hold for every model of the class.
        top_k: where K is; a number where it is fixed.
        weight: where the linear map is.
        reads: where a weight is whose second dimension is the width of what the router reads; None for ``weight``.
        logit_bias: where its bias is; None if it has none.
        selection_bias: where the bias is that steers selection; begins with ``block.`` where the block around the
            router keeps it and passes it on. None if there is none.
        normalize_if: a flag that turns normalisation off.
        scale: where the factor of all weights is.
        eps: where the epsilon is.
        expert_scale: where the learned factor of each expert is.
        groups: where number of groups and groups kept are; a group's score is the sum of its two best.
        read: more fields of the spec, from router and block.
        logits: how logits come from tokens, one linear map unless said; None where they need more than the tokens.
        takes: dimensions of the tokens that the router's forward takes: 2 (T, D), or 3 with a batch before.
        returns_logits: whether what the router's forward returns first are logits.
        parts: how many the router's forward returns, of which the first three are logits, weights and experts; 0 where
            it returns something else, which a class in ``blocks.py`` understands.
    """

    spec: Mapping[str, Any] = field(default_factory=dict)
    top_k: str | int = "top_k"
    weight: str = "weight"
    reads: str | None = None
    logit_bias: str | None = None
    selection_bias: str | None = None
    normalize_if: str | None = None
    scale: str | None = None
    eps: str | None = None
    expert_scale: str | None = None
    groups: tuple[str, str] | None = None
    read: Reader | None = None
    logits: Logits | None = linear_logits
    takes: int = 2
    returns_logits: bool = True
    parts: int = 3

    def spec_of(self, router: nn.Module, block: nn.Module) -> RouterSpec:
        """The spec of a loaded router.

        Args:
            router: of the class that the row is of.
            block: the module around it.
        Raises:
            ConfigError: if its numbers contradict each other.
        """
        fields: dict[str, Any] = dict(self.spec)
        fields["num_experts"] = attribute(router, self.weight).shape[0]
        fields["top_k"] = self.top_k if isinstance(self.top_k, int) else int(attribute(router, self.top_k))
        if self.normalize_if is not None and not attribute(router, self.normalize_if):
            fields["normalize"] = None
        if self.scale is not None:
            fields["scale"] = float(attribute(router, self.scale))
        if self.eps is not None:
            fields["eps"] = float(attribute(router, self.eps))
        fields["expert_scale"] = self.expert_scale is not None
        fields["selection_bias"] = self.selection_bias is not None
        if self.groups is not None:
            num_groups, kept = (attribute(router, name) for name in self.groups)
            fields["groups"] = _groups(num_groups, kept, 2)
        if self.read is not None:
            fields |= self.read(router, block)
        return RouterSpec(**fields)

    def width_of(self, router: nn.Module) -> int:
        """The width of the tokens that the router reads."""
        return cast(Tensor, attribute(router, self.reads or self.weight)).shape[1]

    def bias_of(self, router: nn.Module, block: nn.Module) -> Tensor | None:
        """The selection bias (E,), a view of what the model keeps; None where there is none."""
        if self.selection_bias is None:
            return None
        inside, name = (block, self.selection_bias.removeprefix("block.")), self.selection_bias
        module, path = inside if name.startswith("block.") else (router, name)
        # A model whose configuration turns the bias off has none.
        bias: Tensor | None = module.state_dict(keep_vars=True).get(path)
        return None if bias is None else bias.reshape(-1)

    def scale_of(self, router: nn.Module) -> Tensor | None:
        """The learned factor of each expert (E,); None where there is none."""
        return None if self.expert_scale is None else cast(Tensor, attribute(router, self.expert_scale))


def attribute(module: nn.Module, path: str) -> Any:
    """What stands at a dotted path of attributes."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _groups(num_groups: Any, kept: Any, best: int) -> GroupLimit | None:
    if num_groups is None or kept is None or num_groups == 1:
        return None  # one group is all
    return GroupLimit(num_groups=num_groups, groups_kept=kept, best_per_group=best)  # type: ignore[arg-type]


def _gemma_logits(row: Row, router: nn.Module, x_TD: Tensor, spec: RouterSpec) -> Tensor:
    """Gemma 4 norms and scales the tokens first."""
    x_TD = router.norm(x_TD) * router.scale * router.scalar_root_size  # type: ignore[operator]
    return linear_logits(row, router, x_TD, spec)


def _deepseek_v2(router: nn.Module, _block: nn.Module) -> Mapping[str, Any]:
    if router.topk_method == "greedy":
        return {"groups": None}
    return {"groups": _groups(cast(int, router.num_group), cast(int, router.topk_group), 1)}


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
    scale = float(cast(float, router.route_scale)) * cast(Tensor, router.global_scale).item()
    return {"num_experts": router.num_experts, "shared_gates": router.n_shared_experts, "scale": scale}


def _privacy_filter(router: nn.Module, _block: nn.Module) -> Mapping[str, Any]:
    return {"scale": 1 / cast(int, router.top_k)}


def _longcat(router: nn.Module, _block: nn.Module) -> Mapping[str, Any]:
    return {"null_experts": cast(int, router.n_routed_experts) - cast(int, router.num_experts)}


def _phimoe(router: nn.Module, _block: nn.Module) -> Mapping[str, Any]:
    return {"jitter": float(cast(float, router.router_jitter_noise))}


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
        spec={"score": "sigmoid", "precision": "float32"}, selection_bias=_BIAS, read=_inkling, parts=4
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
        read=lambda router, _: {"softcap": float(cast(float, router.router_logit_softcapping))},
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
        read=lambda router, _: {"multiplier": float(cast(float, router.output_multiplier))},
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
        read=_zaya,
        logits=None,
        takes=3,
        parts=4,
    ),
}
"""By the name of the router's class; rows that are shared say that classes compute the same."""
