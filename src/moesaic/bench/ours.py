"""Our layer as a contender, once with each kernel that can run, and the dense layer that bounds them all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moesaic.bench.contender import Absent, Contender, Entrant
from moesaic.bench.draw import Draw
from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.routing import Routing
from moesaic.experts import GatedExperts
from moesaic.kernels.grouped_ffn import KERNELS, Kernel, choose
from moesaic.kernels.grouped_ffn.triton import IS_INTERPRETED, grouped_ffn_triton
from moesaic.layer import MoELayer
from moesaic.routers import TopKRouter

DENSE = "dense"
WITH_ROUTER = "moesaic with its router"


class HandedRouter(nn.Module):
    """Gives the choices of a draw, so that contenders differ in dispatch and experts alone."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.num_experts = draw.case.num_experts
        self.experts_per_token = float(draw.case.top_k)
        self._draw = draw

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """The table of the draw."""
        return self._draw.routing


def ours(draw: Draw, *, training: bool = True) -> list[Entrant]:
    """Our layer with each kernel, in training or in evaluation."""
    stacks = (draw.experts.gate_EDF, draw.experts.up_EDF, draw.experts.down_EFD)
    chosen = choose("auto", draw.device, draw.dtype, stacks).kernel
    found: list[Entrant] = []
    for kernel in KERNELS:
        why_not = kernel.why_not(draw.device, draw.dtype, stacks)
        name = f"moesaic {kernel.name}"
        if why_not is None and kernel.run is grouped_ffn_triton and IS_INTERPRETED:
            why_not = "runs in Triton's interpreter, which shows what it computes and not how fast"
        if why_not is not None:
            found.append(Absent(name=name, why=why_not))
        else:
            layer = MoELayer(HandedRouter(draw), with_kernel(draw.experts, kernel), shared=draw.shared)
            found.append(_contender(name, draw, layer, is_default=kernel is chosen, training=training))
    return found


def with_router(draw: Draw, *, training: bool = True) -> Contender:
    """Our layer with a router of its own that makes the draw's choices: what a user runs."""
    router = router_of(draw)
    layer = MoELayer(router, draw.experts, shared=draw.shared)
    return _contender(WITH_ROUTER, draw, layer, compared=False, is_default=True, training=training)


def router_of(draw: Draw) -> TopKRouter:
    """A router that makes the draw's choices."""
    case = draw.case
    router = TopKRouter(case.width, case.num_experts, top_k=case.top_k, normalize="logits")
    router.weight = nn.Parameter(draw.router_ED.clone())
    return router


def with_kernel(experts: GatedExperts, kernel: Kernel | str) -> GatedExperts:
    """Experts of the same weights, not copied, on a kernel."""
    with torch.device("meta"):
        twin = GatedExperts(*experts.up_EDF.shape, activation=experts.activation, kernel=kernel)
    twin.gate_EDF, twin.up_EDF, twin.down_EFD = experts.gate_EDF, experts.up_EDF, experts.down_EFD
    return twin


def dense(draw: Draw) -> Contender:
    """A gated layer of as many active FLOPs: no routing, three products over all tokens, by autograd."""
    width, hidden = draw.case.width, draw.case.active_hidden

    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False, dtype=draw.dtype, device=draw.device)

    layer = Dense(linear(width, hidden), linear(width, hidden), linear(hidden, width))
    leaves = (draw.x_TD, *layer.parameters())
    return Contender(name=DENSE, forward=lambda: layer(draw.x_TD), leaves=leaves, gradients=None)


class Dense(nn.Module):
    """The feed-forward network of Llama and its kin, as transformers writes it.

    Args:
        gate: D to F.
        up: D to F.
        down: F to D.
    """

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x_TD: Tensor) -> Tensor:
        """Every token through the network."""
        y_TD: Tensor = self.down(nn.functional.silu(self.gate(x_TD)) * self.up(x_TD))
        return y_TD


def shared_gradients(draw: Draw) -> dict[str, Tensor | None]:
    """Those of the shared expert, by the names that the truth has."""
    if draw.shared is None:
        return {}
    return {f"shared.{name}": parameter.grad for name, parameter in draw.shared.named_parameters()}


def _contender(
    name: str, draw: Draw, layer: MoELayer, *, compared: bool = True, is_default: bool = False, training: bool = True
) -> Contender:
    layer.train(training)

    def gradients() -> Mapping[str, Tensor | None]:
        experts = {key: parameter.grad for key, parameter in draw.experts.named_parameters()}
        return {"x_TD": draw.x_TD.grad, "weight_TK": draw.weight_TK.grad, **experts, **shared_gradients(draw)}

    leaves = (draw.x_TD, draw.weight_TK, *layer.parameters())
    return Contender(
        name=name,
        forward=lambda: layer(draw.x_TD)[0],
        leaves=leaves,
        gradients=gradients if compared else None,
        is_default=is_default,
    )
