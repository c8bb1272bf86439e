"""A case in numbers: tokens, who goes where, and one set of weights that all contenders share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from moesaic.bench.case import Case
from moesaic.core.routing import Routing
from moesaic.experts import GatedExperts, SharedExpert

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Draw:
    """Inputs, routing and weights, in the dtype that is measured; those that get gradients are leaves.

    Attributes:
        case: what was drawn.
        x_TD: tokens.
        expert_TK: the experts of each.
        weight_TK: their weights, float32; every value is one that ``dtype`` has too, so that peers whose routers give
            weights in the model's precision compute the same function.
        logits_TE: what a router with ``router_ED`` gives for ``x_TD``, up to rounding: its choices are those above.
        grad_y_TD: what the backward begins with.
        router_ED: a router's weight, float32.
        experts: weights as our layers keep them.
        shared: the shared expert, or None.
    """

    case: Case
    x_TD: Tensor
    expert_TK: Tensor
    weight_TK: Tensor
    logits_TE: Tensor
    grad_y_TD: Tensor
    router_ED: Tensor
    experts: GatedExperts
    shared: SharedExpert | None

    @property
    def dtype(self) -> torch.dtype:
        """Of tokens and weights."""
        return self.x_TD.dtype

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.x_TD.device

    @property
    def routing(self) -> Routing:
        """The table."""
        return Routing.from_choices(self.expert_TK, self.weight_TK, self.logits_TE, self.logits_TE)

    @property
    def max_over_mean(self) -> float:
        """Rows of the busiest expert over the mean."""
        load_E = torch.bincount(self.expert_TK.flatten(), minlength=self.case.num_experts)
        return float(load_E.max() / load_E.double().mean())


def draw(
    case: Case,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    weights: Draw | None = None,
    among_TE: Tensor | None = None,
) -> Draw:
    """Draw a case.

    Experts are drawn for each token without replacement, in proportion to their popularity: the K largest of log
    popularity plus Gumbel noise. Those sums are the router's logits, and tokens are moved so that it gives them.

    Args:
        case: what to draw.
        dtype: of tokens and weights.
        device: where.
        seed: of all that is random.
        weights: a draw whose experts this one shares.
        among_TE: True for the experts that a token may choose; None for all.
    """
    random = torch.Generator(device=device).manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    popular_E = torch.arange(1, case.num_experts + 1, device=device, dtype=wide).pow(-case.zipf).log()
    order_E = torch.randperm(case.num_experts, generator=random, device=device)
    noise_TE = torch.rand(case.num_tokens, case.num_experts, generator=random, device=device, dtype=wide)
    logits_TE = popular_E[order_E] - (-noise_TE.clamp(1e-9, 1 - 1e-7).log()).log()
    if among_TE is not None:
        # Below all others, and still logits that a router can give.
        logits_TE = logits_TE - (~among_TE) * (1 + logits_TE.max() - logits_TE.min())
    top_TK, expert_TK = logits_TE.topk(case.top_k, dim=-1)
    router_ED = torch.randn(case.num_experts, case.width, generator=random, device=device, dtype=wide)
    router_ED /= case.width**0.5
    x_TD = torch.randn(case.num_tokens, case.width, generator=random, device=device, dtype=wide)
    x_TD += (logits_TE - x_TD @ router_ED.t()) @ torch.linalg.pinv(router_ED).t()
    grad_y_TD = torch.randn(case.num_tokens, case.width, generator=random, device=device, dtype=wide)
    if weights is None:
        experts = experts_of(case, dtype=dtype, device=device, random=random)
        shared = shared_of(case, dtype=dtype, device=device, random=random)
    else:
        experts, shared = weights.experts, weights.shared
    return Draw(
        case=case,
        x_TD=x_TD.to(dtype).requires_grad_(),
        expert_TK=expert_TK,
        weight_TK=top_TK.softmax(dim=-1).to(dtype).to(wide).requires_grad_(),
        logits_TE=logits_TE,
        grad_y_TD=grad_y_TD.to(dtype),
        router_ED=router_ED,
        experts=experts,
        shared=shared,
    )


def experts_of(case: Case, *, dtype: torch.dtype, device: torch.device, random: torch.Generator) -> GatedExperts:
    """Fresh experts of a case's sizes, whose outputs are about as large as their inputs."""
    with torch.device("meta"):
        experts = GatedExperts(case.num_experts, case.width, case.hidden)
    return _filled(experts, dtype, device, random)


def shared_of(case: Case, *, dtype: torch.dtype, device: torch.device, random: torch.Generator) -> SharedExpert | None:
    """The shared expert of a case, gated for each token as Qwen2-MoE's is; None if it has none."""
    if not case.shared_hidden:
        return None
    with torch.device("meta"):
        shared = SharedExpert(case.width, case.shared_hidden, token_gate=True)
    return _filled(shared, dtype, device, random)


def _filled(module: Module, dtype: torch.dtype, device: torch.device, random: torch.Generator) -> Module:
    """Give a module that was built on no device weights of variance 1 / fan-in."""
    for name, empty in list(module.named_parameters()):
        fan_in = empty.shape[-2] if empty.ndim > 1 else empty.shape[0]
        values = torch.empty(empty.shape, dtype=dtype, device=device)
        values.normal_(std=fan_in**-0.5, generator=random)
        setattr(module, name, nn.Parameter(values))
    return module
