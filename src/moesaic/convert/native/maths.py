"""What the MoE layers of transformers' families can compute, as facts that a layer of ours is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesaic.convert.native.facts import LayerFacts

# What transformers calls our activations.
ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu_squared": "relu2",
}

_EXPERTS = {"gated": "gated", "plain": "plain two-layer", "biased": "biased and bounded"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Maths:
    """What the MoE layer of a family can compute.

    Attributes:
        score: from logits to scores.
        normalized: whether weights are divided by their sum; None for a family that has a flag for it.
        scale: whether weights may be multiplied by a number.
        best_per_group: experts whose sum scores a group; 0 where there are no groups.
        selection_bias: whether there is a bias that steers the choice alone.
        shared: the expert for every token: none, one with a gate, or one without.
        needs_shared: whether there is always one.
        shared_in_experts: whether its width is told as a number of experts.
        experts: gated or plain.
        top_k: the only number of choices; None for any.
    """

    score: Literal["softmax", "sigmoid"]
    normalized: bool | None
    scale: bool = False
    best_per_group: int = 0
    selection_bias: bool = False
    shared: Literal["none", "gated", "bare"] = "none"
    needs_shared: bool = False
    shared_in_experts: bool = False
    experts: Literal["gated", "plain"] = "gated"
    top_k: int | None = None

    def missing(self, facts: LayerFacts) -> list[str]:
        """Parts of a layer that have no place here."""
        groups = facts.groups
        parts = {
            f"{facts.score} scores": facts.score != self.score,
            "weights that do not add up to one": self.normalized is True and not facts.normalized,
            "weights that add up to one": self.normalized is False and facts.normalized,
            f"weights times {facts.scale:g}": facts.scale != 1 and not self.scale,
            "groups of experts": groups is not None and groups.best_per_group != self.best_per_group,
            "a selection bias": facts.selection_bias and not self.selection_bias,
            "a bias of the router's logits": facts.logit_bias,
            "a shared expert": facts.shared_hidden > 0 and self.shared == "none",
            "a shared expert with a gate": facts.shared_gate and self.shared == "bare",
            f"{_EXPERTS[facts.experts]} experts": facts.experts != self.experts,
            f"{facts.top_k} experts per token": self.top_k is not None and facts.top_k != self.top_k,
        }
        if facts.shared_hidden % facts.hidden and self.shared_in_experts:
            parts[f"a shared expert of {facts.shared_hidden}, no multiple of the experts' {facts.hidden}"] = True
        return [part for part, is_missing in parts.items() if is_missing]

    def stretches(self, facts: LayerFacts) -> list[str]:
        """What this family has and the layer lacks, and how it is made to change nothing."""
        told = []
        if self.needs_shared and not facts.shared_hidden:
            told.append("the family's shared expert is there with weights of zero")
        elif self.shared == "gated" and facts.shared_hidden and not facts.shared_gate:
            told.append(
                "the gate of the shared expert stands at one half, its weights being zero, and the expert's last map "
                "is twice as large"
            )
        return told
