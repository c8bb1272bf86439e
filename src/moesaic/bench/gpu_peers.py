"""Kernels of other libraries, which need a GPU: each takes part where it can be imported, and says why where not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.bench.contender import Absent, Contender, Entrant
from moesaic.bench.draw import Draw
from moesaic.bench.ours import shared_gradients
from moesaic.bench.peers import Weights, transformers_contender, transformers_weights

SCATTERMOE, MEGABLOCKS, SONICMOE = "ScatterMoE", "MegaBlocks", "SonicMoE"


def gpu_peers(drawn: Draw, *, weights: Weights | None = None) -> list[Entrant]:
    """The peers of a draw; none at all on a CPU, where none of them runs.

    Args:
        drawn: gives weights and choices.
        weights: the draw's as transformers lays them out, where they are there already.
    """
    if drawn.device.type != "cuda":
        return []
    builders: dict[str, Callable[[], Contender]] = {
        SCATTERMOE: lambda: scattermoe(drawn),
        MEGABLOCKS: lambda: megablocks(drawn),
        SONICMOE: lambda: sonicmoe(drawn, weights or transformers_weights(drawn)),
    }
    return [_built(name, build) for name, build in builders.items()]


def scattermoe(drawn: Draw) -> Contender:
    """``GLUMLP`` of ScatterMoE (Tan et al. 2024): its first product gives the up half, then the gate.

    Raises:
        ImportError: if the library is not there.
    """
    case, experts = drawn.case, drawn.experts
    with torch.device("meta"):
        module: Any = import_module("scattermoe.mlp").GLUMLP(
            input_size=case.width,
            hidden_size=case.hidden,
            num_experts=case.num_experts,
            top_k=case.top_k,
            activation=nn.SiLU(),
        )
    with torch.no_grad():
        up_gate_EFD = torch.cat([experts.up_EDF, experts.gate_EDF], dim=-1).transpose(1, 2).contiguous()
        down_EDF = experts.down_EFD.transpose(1, 2).contiguous()
    module.experts.weight, module.output_experts.weight = nn.Parameter(up_gate_EFD), nn.Parameter(down_EDF)

    def routed(x_TD: Tensor) -> Tensor:
        y_TD: Tensor = module(x_TD, drawn.weight_TK.to(x_TD.dtype), drawn.expert_TK)
        return y_TD

    def gradients() -> Mapping[str, Tensor | None]:
        up_gate, down = module.experts.weight.grad, module.output_experts.weight.grad
        return {
            "up_EDF": up_gate[:, : case.hidden].transpose(1, 2),
            "gate_EDF": up_gate[:, case.hidden :].transpose(1, 2),
            "down_EFD": down.transpose(1, 2),
        }

    return _contender(SCATTERMOE, drawn, routed, tuple(module.parameters()), gradients)


def megablocks(drawn: Draw) -> Contender:
    """The dropless experts of MegaBlocks (Gale et al. 2022), by grouped products.

    Raises:
        ImportError: if the library is not there.
    """
    case, experts = drawn.case, drawn.experts
    arguments = import_module("megablocks.layers.arguments").Arguments(
        hidden_size=case.width,
        ffn_hidden_size=case.hidden,
        moe_num_experts=case.num_experts,
        moe_top_k=case.top_k,
        moe_loss_weight=0.0,
        activation_fn=nn.functional.silu,
        mlp_type="glu",
        mlp_impl="grouped",
        bias=False,
        return_bias=False,
        fp16=drawn.dtype == torch.float16,
        bf16=drawn.dtype == torch.bfloat16,
        device=drawn.device,
    )
    module: Any = import_module("megablocks.layers.dmoe").ParallelDroplessMLP(arguments)
    flat = (case.num_experts * case.hidden, case.width)
    with torch.no_grad():
        module.mlp.w1 = nn.Parameter(experts.gate_EDF.transpose(1, 2).reshape(flat))
        module.mlp.v1 = nn.Parameter(experts.up_EDF.transpose(1, 2).reshape(flat))
        module.mlp.w2 = nn.Parameter(experts.down_EFD.reshape(flat))
    module.train()

    def routed(x_TD: Tensor) -> Tensor:
        y_BTD: Tensor = module(
            x_TD.unsqueeze(0), drawn.logits_TE.to(x_TD.dtype), drawn.weight_TK.to(x_TD.dtype), drawn.expert_TK
        )
        return y_BTD.squeeze(0)

    def gradients() -> Mapping[str, Tensor | None]:
        stacked = (case.num_experts, case.hidden, case.width)
        gate, up, down = (weight.grad.view(stacked) for weight in (module.mlp.w1, module.mlp.v1, module.mlp.w2))
        return {"gate_EDF": gate.transpose(1, 2), "up_EDF": up.transpose(1, 2), "down_EFD": down}

    return _contender(MEGABLOCKS, drawn, routed, (module.mlp.w1, module.mlp.v1, module.mlp.w2), gradients)


def sonicmoe(drawn: Draw, weights: Weights) -> Contender:
    """SonicMoE (Guo et al. 2025) through transformers' interface, which knows how to load it.

    Raises:
        ImportError: if it cannot be loaded.
    """
    import_module("transformers.integrations.sonicmoe").is_sonicmoe_loadable(raise_error=True)
    return transformers_contender(SONICMOE, drawn, weights, "sonicmoe")


def _built(name: str, build: Callable[[], Contender]) -> Entrant:
    try:
        return build()
    except ImportError as error:
        return Absent(name=name, why=f"cannot be imported: {' '.join(str(error).split())[:160]}")
    except Exception as error:
        return Absent(name=name, why=f"cannot be built: {type(error).__name__}: {' '.join(str(error).split())[:160]}")


def _contender(
    name: str,
    drawn: Draw,
    routed: Callable[[Tensor], Tensor],
    weights: tuple[Tensor, ...],
    gradients: Callable[[], Mapping[str, Tensor | None]],
) -> Contender:
    """One whose library has experts alone: the shared expert is added as in all other rows."""
    shared = drawn.shared

    def forward() -> Tensor:
        y_TD = routed(drawn.x_TD)
        return y_TD if shared is None else y_TD + shared(drawn.x_TD)

    def all_gradients() -> Mapping[str, Tensor | None]:
        own = {"x_TD": drawn.x_TD.grad, "weight_TK": drawn.weight_TK.grad}
        return {**own, **gradients(), **shared_gradients(drawn)}

    of_shared = () if shared is None else tuple(shared.parameters())
    leaves = (drawn.x_TD, drawn.weight_TK, *weights, *of_shared)
    return Contender(name=name, forward=forward, leaves=leaves, gradients=all_gradients)
