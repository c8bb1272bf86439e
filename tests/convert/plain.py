"""What experts did, said in plain loops over float64 numbers: the truth that calibration is held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from moesaic.convert.shrink.saliency import ExpertStats

VOCABULARY = 61
E, K = 8, 3
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

Rows = list[tuple[int, int, float]]
"""(token, expert, weight) of every choice."""


def native(family: str, **changes: Any) -> PreTrainedModel:
    """A tiny random model of a family, in evaluation mode and float64, every parameter drawn."""
    if family == "mixtral":
        own = {"num_local_experts": E, "num_experts_per_tok": K, "intermediate_size": 12, "head_dim": 8}
        model: Any = MixtralForCausalLM(MixtralConfig(**_SIZES | own | changes))
    elif family == "qwen2_moe":
        own = {"num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": 12, "norm_topk_prob": False}
        own |= {"shared_expert_intermediate_size": 20, "intermediate_size": 24}
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**_SIZES | own | changes))
    elif family == "gpt_oss":
        own = {"num_local_experts": E, "num_experts_per_tok": K, "intermediate_size": 12, "head_dim": 8}
        model = GptOssForCausalLM(GptOssConfig(**_SIZES | own | changes))
    else:
        own = {
            "n_routed_experts": E,
            "num_experts_per_tok": K,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 0,
        }
        own |= {
            "moe_intermediate_size": 12,
            "intermediate_size": 24,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
        }
        own |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**_SIZES | own | changes))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" not in name and "inv_freq" not in name:
                tensor.normal_(std=0.4)
    model.set_experts_implementation("eager")
    return model.double().eval()  # type: ignore[no-any-return]


def block_of(family: str, model: PreTrainedModel, layer: int) -> nn.Module:
    """The MoE block of a layer."""
    return model.model.layers[layer].mlp  # type: ignore[no-any-return,union-attr]


def experts_path(layer: int) -> str:
    """Where its experts stand."""
    return f"model.layers.{layer}.mlp.experts"


# --- routers, one token at a time -----------------------------------------------------------------------------------


def _softmax(values: list[float]) -> list[float]:
    highest = max(values)
    powers = [float(torch.tensor(value - highest, dtype=torch.float64).exp()) for value in values]
    return [power / sum(powers) for power in powers]


def _best(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]


def mixtral_choices(block: Any, x_D: Tensor) -> list[tuple[int, float]]:
    scores = _softmax((block.gate.weight @ x_D).tolist())
    chosen = _best(scores, K)
    total = sum(scores[e] for e in chosen)
    return [(e, scores[e] / total) for e in chosen]


def qwen2_moe_choices(block: Any, x_D: Tensor) -> list[tuple[int, float]]:
    scores = _softmax((block.gate.weight @ x_D).tolist())
    return [(e, scores[e]) for e in _best(scores, K)]


def gpt_oss_choices(block: Any, x_D: Tensor) -> list[tuple[int, float]]:
    logits = (block.router.weight @ x_D + block.router.bias).tolist()
    chosen = _best(logits, K)
    return list(zip(chosen, _softmax([logits[e] for e in chosen]), strict=True))


def deepseek_v3_choices(block: Any, x_D: Tensor) -> list[tuple[int, float]]:
    # The family's router works in float32, whatever the model's dtype.
    logits = block.gate.weight.float() @ x_D.float()
    scores = logits.sigmoid().tolist()
    biased = (logits.sigmoid() + block.gate.e_score_correction_bias).tolist()
    group_scores = [sum(sorted(biased[2 * g : 2 * g + 2])) for g in range(4)]
    kept = _best(group_scores, 2)
    allowed = [biased[e] if e // 2 in kept else float("-inf") for e in range(E)]
    chosen = _best(allowed, K)
    total = sum(scores[e] for e in chosen)
    return [(e, 2.5 * scores[e] / total) for e in chosen]


CHOICES: dict[str, Callable[[Any, Tensor], list[tuple[int, float]]]] = {
    "mixtral": mixtral_choices,
    "qwen2_moe": qwen2_moe_choices,
    "gpt_oss": gpt_oss_choices,
    "deepseek_v3": deepseek_v3_choices,
}


# --- experts, one token at a time -----------------------------------------------------------------------------------


def plain_expert(family: str, experts: Any, e: int, x_D: Tensor) -> Tensor:
    """What one expert makes of one token."""
    if family == "gpt_oss":
        both = x_D @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
        gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return (gate * torch.sigmoid(1.702 * gate) * (up + 1)) @ experts.down_proj[e] + experts.down_proj_bias[e]
    hidden = experts.gate_up_proj.shape[1] // 2
    gate, up = experts.gate_up_proj[e, :hidden] @ x_D, experts.gate_up_proj[e, hidden:] @ x_D
    return experts.down_proj[e] @ (gate * torch.sigmoid(gate) * up)


# --- the truth ------------------------------------------------------------------------------------------------------


def plain_stats(
    tokens: list[Tensor], rows: Rows, expert_of: Callable[[int, Tensor], Tensor], num_experts: int
) -> dict[str, Any]:
    """Every statistic of a layer, row by row."""
    count, weight, norm, contribution, largest = ([0.0] * num_experts for _ in range(5))
    output = [torch.zeros_like(expert_of(0, tokens[0])) for _ in range(num_experts)]
    for token, e, w in rows:
        y_D = expert_of(e, tokens[token])
        length = float(y_D.pow(2).sum().sqrt())
        count[e] += 1
        weight[e] += w
        norm[e] += length
        contribution[e] += w * length
        largest[e] = max(largest[e], float(y_D.abs().max()))
        output[e] = output[e] + y_D
    reap = [contribution[e] / count[e] if count[e] else 0.0 for e in range(num_experts)]
    return {
        "num_tokens": len(tokens),
        "frequency": count,
        "weight": weight,
        "ean": norm,
        "reap": reap,
        "largest": largest,
        "output_ED": torch.stack(output),
    }


def largest_error(stats: ExpertStats, plain: dict[str, Any]) -> float:
    """How far statistics are from the truth, relative to the largest of each kind."""
    assert stats.num_tokens == plain["num_tokens"]
    pairs = [(stats.saliency(by), plain[by]) for by in ("frequency", "weight", "ean", "reap")]  # type: ignore[arg-type]
    pairs += [(stats.largest_E, plain["largest"]), (stats.output_ED, plain["output_ED"])]
    errors = []
    for actual, expected in pairs:
        expected = torch.as_tensor(expected, dtype=torch.float64)
        errors.append(float((actual - expected).abs().max() / expected.abs().max()))
    return max(errors)
