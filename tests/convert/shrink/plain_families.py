"""Experts that transformers' interface does not reach, one token and one expert at a time, and who serves whom."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

Expert = Callable[[Any, int, Tensor], Tensor]
"""From a block, an expert's index and what it reads to what it gives."""


@dataclass(frozen=True)
class Plain:
    """How a family's block is read.

    Attributes:
        block: the name of its class.
        expert: what an expert computes.
        reads: what experts read, from what the block reads.
    """

    block: str
    expert: Expert
    reads: Callable[[Any, Tensor], Tensor] = lambda _block, x_D: x_D


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def llama4(block: Any, e: int, x_D: Tensor) -> Tensor:
    gate, up = (x_D @ block.experts.gate_up_proj[e]).chunk(2)
    return (silu(gate) * up) @ block.experts.down_proj[e]


def switch(block: Any, e: int, x_D: Tensor) -> Tensor:
    expert = block.experts[f"expert_{e}"]
    return expert.wo.weight @ (expert.wi.weight @ x_D).clamp_min(0)


def nllb(block: Any, e: int, x_D: Tensor) -> Tensor:
    expert = block.experts[f"expert_{e}"]
    inner = (expert.fc1.weight @ x_D + expert.fc1.bias).clamp_min(0)
    # What training drops at random, evaluation shrinks.
    return (expert.fc2.weight @ inner + expert.fc2.bias) * (1 - block.experts.moe_token_dropout)


def jetmoe(block: Any, e: int, x_D: Tensor) -> Tensor:
    gate, up = (block.input_linear.weight[e] @ x_D).chunk(2)
    return block.output_linear.weight[e] @ (silu(gate) * up)


def doge(block: Any, e: int, x_D: Tensor) -> Tensor:
    return silu(block.down_embed.weight[e] @ x_D) * block.up_embed.weight[e]


def longcat(block: Any, e: int, x_D: Tensor) -> Tensor:
    gate, up = (block.experts.gate_up_proj[e] @ x_D).chunk(2)
    return block.experts.down_proj[e] @ (silu(gate) * up)


def vitpose(block: Any, e: int, x_F: Tensor) -> Tensor:
    return block.experts[e].weight @ x_F + block.experts[e].bias


PLAIN: Mapping[str, Plain] = {
    "doge": Plain("DogeCDMoE", doge),
    "jetmoe": Plain("JetMoeMoE", jetmoe),
    "llama4": Plain("Llama4TextMoe", llama4),
    "longcat_flash": Plain("LongcatFlashMoE", longcat),
    "nllb_moe": Plain("NllbMoeSparseMLP", nllb),
    "switch_transformers": Plain("SwitchTransformersSparseMLP", switch),
    "vitpose_backbone": Plain(
        "VitPoseBackboneMoeMLP", vitpose, lambda block, x_D: gelu(block.fc1.weight @ x_D + block.fc1.bias)
    ),
}


def added(family: str, block: Any, e: int, x_D: Tensor, weight: float) -> float:
    """The length of what a row adds to the layer's output."""
    expert = PLAIN[family].expert
    # Llama 4 multiplies what goes in.
    y_D = expert(block, e, weight * x_D) if family == "llama4" else weight * expert(block, e, x_D)
    return math.sqrt(float(y_D.pow(2).sum()))
