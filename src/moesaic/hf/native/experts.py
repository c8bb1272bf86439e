"""Our kernels under the experts of transformers' families, on the model's own weights: views of them, never copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.core.errors import ConfigError
from moesaic.core.plan import Plan
from moesaic.experts.grouped import pick, run_grouped
from moesaic.hf.native.router import Adopted
from moesaic.hf.native.work import alone, show
from moesaic.hf.uncompiled import uncompiled
from moesaic.kernels.activations import Activation, gelu, gelu_tanh, relu, relu_squared, silu
from moesaic.kernels.grouped_ffn.layout import halves
from moesaic.kernels.sort_rows import sort_rows

IMPLEMENTATION = "moesaic"
"""What transformers' experts interface calls us."""

Views = Callable[[Any], tuple[Tensor | None, Tensor, Tensor]]
_ACTIVATIONS = (silu, gelu, gelu_tanh, relu, relu_squared)


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How the experts of one module are run.

    Attributes:
        kernel: "auto", or a kernel's name.
        activation: of the fused operation; None where a gate, bias or norm of the family's own wants the general way.
        views: gate (E, D, F), up (E, D, F) and down (E, F, D) of the module, for the fused operation.
        null_experts: ids from the last expert on that give the token back.
    """

    kernel: str
    activation: Activation | None
    views: Views
    null_experts: int = 0

    def report(self, experts: nn.Module) -> str:
        """Which kernel runs, and why."""
        if self.activation is None:
            return (
                "grouped, by autograd: PyTorch, rows sorted by expert; the gate, biases or norm of "
                f"{type(experts).__name__} are the family's own, which no fused kernel has"
            )
        stacks = self.views(experts)
        choice = pick(self.kernel, stacks[1], stacks)
        return f"{choice.kernel.name}: {choice.kernel.what}; {choice.reason}"


def form_of(experts: nn.Module, kernel: str) -> Form:
    """Look at a module of experts, of transformers' interface, and settle how it is run.

    What its gate computes is told by value, not by name: a family may clamp, interleave or cap.
    """
    flags: Any = experts
    plain = not (flags.has_bias or flags.has_post_expert_norm)
    return Form(kernel=kernel, activation=_activation(flags) if plain else None, views=interface_views)


def interface_views(experts: Any) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gate, up and down of a module of transformers' interface."""
    down_EFD = experts.down_proj if experts.is_transposed else experts.down_proj.transpose(1, 2)
    if not experts.has_gate:
        up_EDF = experts.up_proj if experts.is_transposed else experts.up_proj.transpose(1, 2)
        return None, up_EDF, down_EFD
    gate_up_EDF = experts.gate_up_proj if experts.is_transposed else experts.gate_up_proj.transpose(1, 2)
    gate_EDF, up_EDF = halves(gate_up_EDF)
    return gate_EDF, up_EDF, down_EFD


@uncompiled
def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run the experts of a module of transformers' interface; this is what is registered there."""
    form = self.__dict__.get("_moesaic")
    if form is None:
        form = self.__dict__["_moesaic"] = form_of(self, "auto")
    return run(form, self, hidden_states, top_k_index, top_k_weights)


def run(
    form: Form,
    experts: Any,
    x_TD: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    *,
    weigh: Literal["output", "input"] = "output",
) -> Tensor:
    """Send each token through its experts and add up.

    Args:
        form: how.
        experts: the module with the weights.
        x_TD: tokens.
        expert_TK: their experts; ids from the number of experts on are none, and add the token or nothing.
        weight_TK: their weights.
        weigh: multiply what comes out of an expert by the weight, or what goes in.
    """
    num_experts = int(experts.down_proj.shape[0] if form.activation is None else form.views(experts)[2].shape[0])
    num_tokens, top_k = expert_TK.shape
    expert_N = expert_TK.reshape(-1).to(torch.int64)
    token_N = torch.arange(num_tokens, device=x_TD.device).repeat_interleave(top_k)
    is_real_N = expert_N < num_experts
    wide_N = weight_TK.reshape(-1).to(torch.promote_types(weight_TK.dtype, torch.float32))
    plan = sort_rows(expert_N, token_N, wide_N, num_experts, is_real_N)

    def each(rows_ND: Tensor, one_N: Tensor, weight_N: Tensor) -> Tensor:
        return _through(form, experts, rows_ND, alone(one_N, weight_N, num_experts), 1, weigh)

    show(experts, x_TD, plan, each, weighs_input=weigh == "input")
    y_TD = _through(form, experts, x_TD, plan, top_k, weigh)
    if form.null_experts:
        back_T1 = weight_TK.masked_fill(is_real_N.view(num_tokens, top_k), 0).sum(dim=-1, keepdim=True)
        y_TD = y_TD + (back_T1 * x_TD).to(y_TD.dtype)
    return y_TD.to(x_TD.dtype)


def _through(
    form: Form, experts: Any, x_TD: Tensor, plan: Plan, top_k: int, weigh: Literal["output", "input"]
) -> Tensor:
    if form.activation is None:
        return run_general(experts, x_TD, plan, top_k)
    gate_EDF, up_EDF, down_EFD = form.views(experts)
    return run_grouped(x_TD, plan, gate_EDF, up_EDF, down_EFD, form.activation, form.kernel, weigh)


def run_general(experts: Any, x_TD: Tensor, plan: Plan, top_k: int) -> Tensor:
    """The grouped feed-forward with whatever gate, biases and norm the family has, by autograd.

    Args:
        experts: a module of transformers' interface.
        x_TD: tokens.
        plan: rows sorted by expert, ``top_k`` for each token.
        top_k: K.
    """
    ends: list[int] = plan.offset_E.tolist()
    # Rows left out wait behind the last expert.
    token_N = plan.token_N[: ends[-1]]
    x_ND = x_TD.index_select(0, token_N)
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    hidden_NF = _linear(x_ND, experts, name, ends)
    hidden_NF = experts._apply_gate(hidden_NF) if experts.has_gate else experts.act_fn(hidden_NF)
    y_ND = _linear(hidden_NF.to(x_ND.dtype), experts, "down_proj", ends)
    if experts.has_post_expert_norm:
        y_ND = experts.post_expert_norm(y_ND)
    y_ND = y_ND.to(plan.weight_N.dtype) * plan.weight_N[: ends[-1], None]
    # Each token's rows side by side, so that they are added up in the same order each time.
    rows_ND = y_ND.new_zeros(plan.row_N.shape[0], y_ND.shape[1]).index_copy(0, plan.row_N[: ends[-1]], y_ND)
    return rows_ND.view(-1, top_k, y_ND.shape[1]).sum(dim=1)


def _linear(x_ND: Tensor, experts: Any, name: str, ends: list[int]) -> Tensor:
    """One linear map of each expert over its own rows."""
    weights, biases = getattr(experts, name), getattr(experts, f"{name}_bias") if experts.has_bias else None
    parts, start = [], 0
    for e, end in enumerate(ends):
        if end > start:
            weight = weights[e].t() if experts.is_transposed else weights[e]
            parts.append(F.linear(x_ND[start:end], weight, None if biases is None else biases[e]))
        start = end
    if not parts:  # no rows at all; the graph keeps its weights
        width = weights.shape[-1] if experts.is_transposed else weights.shape[1]
        return x_ND.new_zeros(0, width) + 0 * cast(Tensor, weights).sum()
    return torch.cat(parts)


def _activation(experts: Any) -> Activation | None:
    """The activation of which the module's gate is the plain product, or None if it is something else."""
    probe = torch.linspace(-9, 9, 46, device="cpu")
    gate, up = probe.flip(0) * 1.1, probe
    for one in _ACTIVATIONS:
        with torch.no_grad():
            if not experts.has_gate:
                found, wanted = experts.act_fn(probe), one.forward(probe)
            else:
                found, wanted = experts._apply_gate(torch.cat([gate, up])[None])[0], one.forward(gate) * up
        if torch.allclose(found, wanted, rtol=1e-6, atol=1e-6):
            return one
    return None


class AdoptedExperts(Adopted):
    """Experts that take what transformers' interface gives, in a class that the interface does not reach."""

    has_gate, has_bias, has_post_expert_norm, is_transposed = True, False, False, False

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the experts of each token."""
        form = cast(Form, self.__dict__["_moesaic"])
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        return run(form, self, x_TD, top_k_index, top_k_weights).view(hidden_states.shape)


def longcat_form(experts: Any, kernel: str) -> Form:
    """LongCat-Flash: ids beyond the routed experts give the token back."""
    activation, count = _named(experts.act_fn), experts.zero_expert_num
    return Form(kernel=kernel, activation=activation, views=_longcat_views, null_experts=count)


def _longcat_views(experts: Any) -> tuple[Tensor | None, Tensor, Tensor]:
    # The first weight has room for experts that compute nothing.
    gate_up_EDF = experts.gate_up_proj[: experts.num_routed_experts].transpose(1, 2)
    gate_EDF, up_EDF = halves(gate_up_EDF)
    return gate_EDF, up_EDF, experts.down_proj.transpose(1, 2)


def dbrx_form(experts: Any, kernel: str) -> Form:
    """DBRX: experts one below the other in flat matrices."""
    return Form(kernel=kernel, activation=_named(experts.mlp.activation_fn), views=_dbrx_views)


def _dbrx_views(experts: Any) -> tuple[Tensor | None, Tensor, Tensor]:
    shape = (experts.num_experts, experts.ffn_hidden_size, experts.hidden_size)
    gate_EFD, up_EFD, down_EFD = (getattr(experts.mlp, name).view(shape) for name in ("w1", "v1", "w2"))
    return gate_EFD.transpose(1, 2), up_EFD.transpose(1, 2), down_EFD


def llama4_form(experts: Any, kernel: str) -> Form:
    """Llama 4: (E, D, 2F) and (E, F, D)."""
    return Form(kernel=kernel, activation=_named(experts.act_fn), views=_llama4_views)


def _llama4_views(experts: Any) -> tuple[Tensor | None, Tensor, Tensor]:
    gate_EDF, up_EDF = halves(experts.gate_up_proj)
    return gate_EDF, up_EDF, experts.down_proj


def jetmoe_form(block: Any, kernel: str) -> Form:
    """JetMoE: two stacks of linear maps in the block."""
    return Form(kernel=kernel, activation=_named(block.activation), views=_jetmoe_views)


def _jetmoe_views(block: Any) -> tuple[Tensor | None, Tensor, Tensor]:
    gate_EDF, up_EDF = halves(block.input_linear.weight.transpose(1, 2))
    return gate_EDF, up_EDF, block.output_linear.weight.transpose(1, 2)


def interface_like_form(experts: Any, kernel: str) -> Form:
    """Step 3.7: laid out as transformers' interface has it by default, with a gate of its own."""
    return Form(kernel=kernel, activation=None, views=interface_views)


def _named(activation: Callable[[Tensor], Tensor]) -> Activation:
    probe = torch.linspace(-9, 9, 46, device="cpu")
    with torch.no_grad():
        found = activation(probe)
    for one in _ACTIVATIONS:
        if torch.allclose(found, one.forward(probe), atol=1e-6):
            return one
    raise ConfigError(
        f"Experts need an activation that a kernel has ({', '.join(one.name for one in _ACTIVATIONS)}), got "
        f"{type(activation).__name__}. Adopt the model with kernel=None, which leaves its experts as they are."
    )
