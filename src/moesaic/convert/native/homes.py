"""Families of transformers that a sparse model of ours can move into: what their MoE layers compute, and around what.

One literal table. Whether two models really compute the same is measured at each export; the table says where to try.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from moesaic.convert.native import placing
from moesaic.convert.native.facts import LayerFacts
from moesaic.convert.native.maths import ACTIVATIONS, Maths
from moesaic.convert.native.placing import Places, Values


@dataclass(frozen=True, kw_only=True, slots=True)
class Home:
    """A family to move into.

    Attributes:
        family: its ``model_type``.
        maths: what its MoE layer can compute.
        numbers: the layer's numbers under the family's names.
        place: which layers are MoE layers, under the family's names; None where they cannot be said.
        backbones: dense models with the family's attention and norms, by ``model_type``, and what of their
            configuration goes by another name; a reason where one cannot be.
        renames: parts of module paths that have another name in the family.
        block: name of the module that is the MoE layer, if not that of the network it replaced.
    """

    family: str
    maths: Maths
    numbers: Callable[[LayerFacts], Values]
    place: Callable[[Places, PreTrainedConfig], Values | None]
    backbones: Mapping[str, Callable[[PreTrainedConfig], Values | str]]
    renames: Mapping[str, str] = field(default_factory=dict)
    block: str | None = None

    def renamed(self, name: str) -> str:
        """A module path or tensor name of ours, as the family has it."""
        parts = name.split(".")
        return ".".join(self.renames.get(part, part) for part in parts)

    def renamed_block(self, path: str) -> str:
        """Where the MoE layer stands that takes the place of ours."""
        renamed = self.renamed(path)
        return renamed if self.block is None else f"{renamed.rpartition('.')[0]}.{self.block}"


def _same(**values: Any) -> Callable[[PreTrainedConfig], Values | str]:
    return lambda _config: values


def _unwindowed(**values: Any) -> Callable[[PreTrainedConfig], Values | str]:
    def adapt(config: PreTrainedConfig) -> Values | str:
        uses = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
        return f"attention within a window of {config.sliding_window} tokens" if uses else values

    return adapt


def _qwen3(**values: Any) -> Callable[[PreTrainedConfig], Values | str]:
    def adapt(config: PreTrainedConfig) -> Values | str:
        fault = _unwindowed()(config)
        return fault if isinstance(fault, str) else {"head_dim": head_dim(config), **values}

    return adapt


def _headed(config: PreTrainedConfig) -> Values | str:
    return {"head_dim": head_dim(config)}


def _lfm2(config: PreTrainedConfig) -> Values | str:
    """The dense configuration tells a width that is then adjusted; the sparse one tells the width that comes out."""
    width = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        width = int(2 * width / 3)
        if config.block_ffn_dim_multiplier is not None:
            multiple = config.block_multiple_of
            width = -(-int(config.block_ffn_dim_multiplier * width) // multiple) * multiple
    return {"intermediate_size": width}


def _granite_from_llama(config: PreTrainedConfig) -> Values | str:
    return {
        "attention_multiplier": head_dim(config) ** -0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


def _glm(use_qk_norm: bool) -> Callable[[PreTrainedConfig], Values | str]:
    def adapt(config: PreTrainedConfig) -> Values | str:
        fault = _unwindowed()(config) if use_qk_norm else ""
        if isinstance(fault, str) and fault:
            return fault
        return {
            "use_qk_norm": use_qk_norm,
            "head_dim": head_dim(config),
            "partial_rotary_factor": 1.0,
            "rope_parameters": {**config.rope_parameters, "partial_rotary_factor": 1.0},
            "num_mtp_layers": 0,
        }

    return adapt


def head_dim(config: PreTrainedConfig) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _qwen_like(facts: LayerFacts) -> dict[str, Any]:
    return {
        "num_experts": facts.num_experts,
        "num_experts_per_tok": facts.top_k,
        "moe_intermediate_size": facts.hidden,
        "norm_topk_prob": facts.normalized,
    }


def _qwen2(facts: LayerFacts) -> Values:
    # A shared expert of zeros is as wide as quantizers like it, and no wider than an expert.
    zeros = max(size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if facts.hidden % size == 0)
    return _qwen_like(facts) | {"shared_expert_intermediate_size": facts.shared_hidden or zeros}


def _olmoe(facts: LayerFacts) -> Values:
    return {
        "num_experts": facts.num_experts,
        "num_experts_per_tok": facts.top_k,
        "intermediate_size": facts.hidden,
        "norm_topk_prob": facts.normalized,
    }


def _mixtral(facts: LayerFacts) -> Values:
    return {
        "num_local_experts": facts.num_experts,
        "num_experts_per_tok": facts.top_k,
        "intermediate_size": facts.hidden,
        "router_jitter_noise": facts.jitter,
    }


def _granite(facts: LayerFacts) -> Values:
    return {
        "num_local_experts": facts.num_experts,
        "num_experts_per_tok": facts.top_k,
        "intermediate_size": facts.hidden,
        "shared_intermediate_size": facts.shared_hidden,
    }


def _deepseek(facts: LayerFacts) -> Values:
    groups = facts.groups
    return {
        "n_routed_experts": facts.num_experts,
        "num_experts_per_tok": facts.top_k,
        "moe_intermediate_size": facts.hidden,
        # Their width is that of so many experts; one of zeros where there is none.
        "n_shared_experts": max(1, facts.shared_hidden // facts.hidden),
        "routed_scaling_factor": facts.scale,
        "norm_topk_prob": facts.normalized,
        "n_group": 1 if groups is None else groups.num_groups,
        "topk_group": 1 if groups is None else groups.groups_kept,
        "topk_method": "greedy" if groups is None else "group_limited_greedy",
        "num_mtp_layers": 0,
    }


def _ernie_numbers(facts: LayerFacts) -> Values:
    return {
        "moe_num_experts": facts.num_experts,
        "moe_k": facts.top_k,
        "moe_intermediate_size": facts.hidden,
        "moe_num_shared_experts": facts.shared_hidden // facts.hidden,
    }


def _lfm(facts: LayerFacts) -> Values:
    return _qwen_like(facts) | {"routed_scaling_factor": facts.scale, "use_expert_bias": facts.selection_bias}


def _jamba_numbers(facts: LayerFacts) -> Values:
    return {
        "num_experts": facts.num_experts,
        "num_experts_per_tok": facts.top_k,
        "intermediate_size": facts.hidden,
    }


def _switch_numbers(facts: LayerFacts) -> Values:
    return {
        "num_experts": facts.num_experts,
        "d_ff": facts.hidden,
        # More than any sequence is long: nothing is dropped, as here.
        "expert_capacity": 2**30,
        "router_jitter_noise": facts.jitter,
        "dense_act_fn": ACTIVATIONS.get(facts.activation, facts.activation),
    }


_DEEPSEEK_V3 = Maths(
    score="sigmoid",
    normalized=None,
    scale=True,
    best_per_group=2,
    selection_bias=True,
    shared="bare",
    needs_shared=True,
    shared_in_experts=True,
)

HOMES: tuple[Home, ...] = (
    Home(
        family="mixtral",
        maths=Maths(score="softmax", normalized=True),
        numbers=_mixtral,
        place=placing.everywhere,
        backbones={"llama": _same(sliding_window=None), "mistral": _same()},
    ),
    Home(
        family="qwen3_moe",
        maths=Maths(score="softmax", normalized=None),
        numbers=_qwen_like,
        place=placing.listed,
        backbones={"qwen3": _qwen3(use_sliding_window=False)},
    ),
    Home(
        family="qwen2_moe",
        maths=Maths(score="softmax", normalized=None, shared="gated", needs_shared=True),
        numbers=_qwen2,
        place=placing.listed,
        backbones={
            "qwen2": _same(qkv_bias=True),
            "llama": _same(qkv_bias=False, use_sliding_window=False),
            "mistral": _unwindowed(qkv_bias=False, use_sliding_window=False),
        },
    ),
    Home(
        family="flex_olmo",
        maths=Maths(score="softmax", normalized=None),
        numbers=_olmoe,
        place=placing.everywhere,
        backbones={"olmo2": _same()},
    ),
    Home(
        family="granitemoe",
        maths=Maths(score="softmax", normalized=True),
        numbers=_granite,
        place=placing.everywhere,
        backbones={"granite": _same()},
        block="block_sparse_moe",
    ),
    Home(
        family="granitemoeshared",
        maths=Maths(score="softmax", normalized=True, shared="bare"),
        numbers=_granite,
        place=placing.everywhere,
        backbones={"granite": _same(), "llama": _granite_from_llama},
        block="block_sparse_moe",
    ),
    Home(
        family="deepseek_v3",
        maths=_DEEPSEEK_V3,
        numbers=_deepseek,
        place=placing.after("first_k_dense_replace"),
        backbones={"youtu": _same()},
    ),
    Home(
        family="deepseek_v2",
        maths=Maths(
            score="softmax",
            normalized=False,
            scale=True,
            best_per_group=1,
            shared="bare",
            needs_shared=True,
            shared_in_experts=True,
        ),
        numbers=_deepseek,
        place=placing.after("first_k_dense_replace"),
        backbones={"youtu": _same()},
    ),
    Home(
        family="dots1",
        maths=_DEEPSEEK_V3,
        numbers=_deepseek,
        place=placing.after("first_k_dense_replace"),
        backbones={"qwen3": _qwen3(sliding_window=None)},
    ),
    Home(
        family="glm4_moe",
        maths=_DEEPSEEK_V3,
        numbers=_deepseek,
        place=placing.after("first_k_dense_replace"),
        backbones={"llama": _glm(False), "qwen3": _glm(True)},
    ),
    Home(
        family="ernie4_5_moe",
        maths=Maths(score="softmax", normalized=True, selection_bias=True, shared="bare", shared_in_experts=True),
        numbers=_ernie_numbers,
        place=placing.ernie,
        backbones={"ernie4_5": _headed},
    ),
    Home(
        family="lfm2_moe",
        maths=Maths(score="sigmoid", normalized=None, scale=True, selection_bias=True),
        numbers=_lfm,
        place=placing.after("num_dense_layers"),
        backbones={"lfm2": _lfm2},
    ),
    Home(
        family="jamba",
        maths=Maths(score="softmax", normalized=False),
        numbers=_jamba_numbers,
        place=placing.jamba,
        backbones={"jamba": _same()},
    ),
    Home(
        family="switch_transformers",
        maths=Maths(score="softmax", normalized=False, experts="plain", top_k=1),
        numbers=_switch_numbers,
        place=placing.switch,
        backbones={"t5": _same()},
        renames={"DenseReluDense": "mlp"},
    ),
)

# Families that no dense model of transformers can be turned into, and why.
UNREACHABLE = {
    "olmoe": "its attention normalises queries and keys over their whole width before a norm that comes first, "
    "which no dense model does (OLMo2 has its norms after the attention: export to flex_olmo)",
    "gpt_oss": "its attention has a learned sink for each head and biases, which no dense model has",
    "minimax": "its layers of lightning attention have no dense sibling (MiniMax's MoE layer is Mixtral's)",
    "dbrx": "its LayerNorm without bias and clipped attention have no dense sibling (its MoE layer is Mixtral's)",
    "phimoe": "its router is SparseMixer, which no recipe has",
    "llama4": "its attention rotates neighbouring pairs of each head, and its MoE layer weighs what goes into experts",
}
