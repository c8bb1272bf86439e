"""transformers' own implementations of experts, in its own blocks, on the weights and choices of a draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from moesaic.bench.contender import Absent, Contender, Entrant
from moesaic.bench.draw import Draw
from moesaic.bench.machine import free_bytes
from moesaic.bench.ours import shared_gradients
from moesaic.hf.native.experts import IMPLEMENTATION, experts_forward

EAGER, GROUPED, BATCHED = "transformers eager", "transformers grouped_mm", "transformers batched_mm"
ADOPTED = "moesaic in transformers' block"

Weights = tuple[nn.Parameter, nn.Parameter]


class HandedGate(nn.Module):
    """Gives the choices of a draw in the form of transformers' routers: weights in the model's dtype."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self._draw = draw

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, weights and indices."""
        draw = self._draw
        return draw.logits_TE, draw.weight_TK.to(hidden_states.dtype), draw.expert_TK


def transformers_blocks(draw: Draw, *, training: bool, weights: Weights | None = None) -> list[Entrant]:
    """A block of transformers with each of its implementations, and with ours, as an adopted model has it.

    Args:
        draw: gives weights and choices.
        training: whether a backward follows, which needs more memory.
        weights: the draw's, from :func:`transformers_weights`, where they are there already.
    """
    weights = weights or transformers_weights(draw)
    found: list[Entrant] = []
    for name, implementation in ((ADOPTED, IMPLEMENTATION), (EAGER, "eager"), (GROUPED, "grouped_mm")):
        found.append(transformers_contender(name, draw, weights, implementation))
    needed = batched_bytes(draw, training=training)
    free = free_bytes(draw.device)
    if needed > free:
        why = f"copies each row's weights: {needed / 2**30:.0f} GiB, of which {free / 2**30:.0f} are free"
        found.append(Absent(name=BATCHED, why=why))
    else:
        found.append(transformers_contender(BATCHED, draw, weights, "batched_mm"))
    return found


def transformers_weights(draw: Draw) -> Weights:
    """The draw's weights as transformers lays them out, (E, 2F, D) and (E, D, F): one copy for all its contenders."""
    experts = draw.experts
    with torch.no_grad():
        gate_up_EFD = torch.cat([experts.gate_EDF.transpose(1, 2), experts.up_EDF.transpose(1, 2)], dim=1)
        down_EDF = experts.down_EFD.transpose(1, 2).contiguous()
    return nn.Parameter(gate_up_EFD), nn.Parameter(down_EDF)


def batched_bytes(draw: Draw, *, training: bool) -> int:
    """What ``batched_mm`` allocates: a copy of the weights of every row's expert; a gradient of each in training."""
    case = draw.case
    copies = 3 * case.num_rows * case.width * case.hidden * draw.dtype.itemsize
    # Without a backward the first copy is gone when the second is made.
    return copies * 2 if training else copies * 2 // 3


def transformers_block(draw: Draw, weights: Weights, implementation: str) -> Any:
    """OLMoE's block, or Qwen2-MoE's where there is a shared expert, with an implementation of its experts."""
    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS.keys():  # noqa: SIM118  (the interface iterates otherwise)
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    case = draw.case
    sizes: dict[str, Any] = {
        "hidden_size": case.width,
        "num_experts": case.num_experts,
        "num_experts_per_tok": case.top_k,
        "norm_topk_prob": True,
    }
    block: Any
    olmoe_block: Any = OlmoeSparseMoeBlock
    qwen_block: Any = Qwen2MoeSparseMoeBlock
    with torch.device("meta"):
        if draw.shared is None:
            block = olmoe_block(OlmoeConfig(intermediate_size=case.hidden, **sizes))
        else:
            hidden: dict[str, Any] = {
                "moe_intermediate_size": case.hidden,
                "shared_expert_intermediate_size": case.shared_hidden,
            }
            block = qwen_block(Qwen2MoeConfig(**hidden, **sizes))
    block.experts.config._experts_implementation = implementation
    block.experts.gate_up_proj, block.experts.down_proj = weights
    block.gate = HandedGate(draw)
    if draw.shared is not None:
        block.shared_expert, block.shared_expert_gate = SharedView(draw), TokenGateView(draw)
    return block.train()


class SharedView(nn.Module):
    """Qwen2-MoE's shared expert on the draw's weights: products of the same shapes."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self._draw = draw

    def forward(self, x_TD: Tensor) -> Tensor:
        """The network, without its gate for each token."""
        shared: Any = self._draw.shared
        hidden_TF = nn.functional.silu(x_TD @ shared.gate_DF) * (x_TD @ shared.up_DF)
        y_TD: Tensor = hidden_TF @ shared.down_FD
        return y_TD


class TokenGateView(nn.Module):
    """Qwen2-MoE's gate of the shared expert on the draw's weights."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self._draw = draw

    def forward(self, x_TD: Tensor) -> Tensor:
        """One number for each token."""
        shared: Any = self._draw.shared
        return nn.functional.linear(x_TD, shared.token_gate_D.unsqueeze(0))


def transformers_contender(name: str, draw: Draw, weights: Weights, implementation: str) -> Contender:
    """transformers' block with one implementation of its experts.

    Args:
        name: what tables call it.
        draw: gives choices.
        weights: the draw's, from :func:`transformers_weights`.
        implementation: by transformers' name.
    """
    block = transformers_block(draw, weights, implementation)
    hidden = draw.case.hidden

    def gradients() -> Mapping[str, Tensor | None]:
        gate_up, down = (weight.grad for weight in weights)
        experts: dict[str, Tensor | None] = {"gate_EDF": None, "up_EDF": None, "down_EFD": None}
        if gate_up is not None and down is not None:
            experts = {
                "gate_EDF": gate_up[:, :hidden].transpose(1, 2),
                "up_EDF": gate_up[:, hidden:].transpose(1, 2),
                "down_EFD": down.transpose(1, 2),
            }
        return {"x_TD": draw.x_TD.grad, "weight_TK": draw.weight_TK.grad, **experts, **shared_gradients(draw)}

    shared = () if draw.shared is None else tuple(draw.shared.parameters())
    return Contender(
        name=name,
        forward=lambda: block(draw.x_TD.unsqueeze(0)).squeeze(0),
        leaves=(draw.x_TD, draw.weight_TK, *weights, *shared),
        gradients=gradients,
    )
