"""A whole layer in one call of C: router, table and experts, for the few tokens of generation.

What PyTorch takes for a single token's thirty small operations is as long as reading the weights of eight experts.
"""

from __future__ import annotations

import ctypes
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from moesaic.core.routing import Routing, checked_mask
from moesaic.kernels.activations import Activation
from moesaic.kernels.grouped_ffn.few_rows import FEW_ROWS
from moesaic.kernels.grouped_ffn.native import ACTIVATIONS
from moesaic.kernels.native.build import Layer
from moesaic.kernels.native.calls import DONE, MOST_CHOICES, callable_on

_DTYPES = (torch.float32, torch.bfloat16)


class TopKChoice(NamedTuple):
    """What a router does that takes the K best experts by one linear map.

    Attributes:
        weight_ED: the map.
        logit_bias_E: added to the logits, or None.
        selection_bias_E: added to scores for selection, or None: then logits are compared.
        score: over all experts.
        weights: of the chosen: their scores as they are, divided by their sum, or of their logits alone.
        top_k: K.
        scale: of all weights.
    """

    weight_ED: Tensor
    logit_bias_E: Tensor | None
    selection_bias_E: Tensor | None
    score: Literal["softmax", "sigmoid"]
    weights: Literal["scores", "chosen", "logits"]
    top_k: int
    scale: float


class ExpertStacks(NamedTuple):
    """What experts do that are stacked matrices: ``(act(x gate) * (x up)) down``, without a gate ``act(x up) down``."""

    gate_EDF: Tensor | None
    up_EDF: Tensor
    down_EFD: Tensor
    activation: Activation


_SCORES = {"softmax": 0, "sigmoid": 1}
_WEIGHTS = {"scores": 0, "chosen": 1, "logits": 2}


def are_bare(*modules: nn.Module) -> bool:
    """Whether calling modules does what their classes do and no more: nobody hooked in or gave them another forward."""
    return not _has_any_global_hook() and all(map(_is_bare, modules))  # type: ignore[no-untyped-call]


def _is_bare(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def whole_layer(
    x_TD: Tensor, valid_T: Tensor | None, sequence_T: Tensor | None, choice: TopKChoice, experts: ExpertStacks
) -> tuple[Tensor, Routing] | None:
    """Outputs and table of a few tokens, without a graph; None where C cannot.

    Logits are summed in another order than PyTorch's: scores that round together there may be told apart here.

    Args:
        x_TD: tokens.
        valid_T: False where a token is padding; None when none is.
        sequence_T: for the table.
        choice, experts: what the layer's parts do.
    """
    (num_experts, width, hidden), num_tokens, top_k = experts.up_EDF.shape, x_TD.shape[0], choice.top_k
    if num_tokens * top_k > FEW_ROWS * num_experts or torch.is_autocast_enabled("cpu"):
        return None
    kernels = callable_on(*[one for one in (x_TD, valid_T, *choice[:3], *experts[:3]) if one is not None])
    if kernels is None or not _fit(x_TD, choice, experts):
        return None
    y_TD = torch.empty_like(x_TD)
    routing = _empty_table(num_tokens, top_k, num_experts, valid_T, sequence_T)
    biases = _as_floats(choice.logit_bias_E), _as_floats(choice.selection_bias_E)
    layer = Layer(
        num_experts,
        num_tokens,
        width,
        hidden,
        top_k,
        x_TD.stride(0),
        ACTIVATIONS[experts.activation.name],
        experts.gate_EDF is not None,
        torch.get_num_threads(),
        x_TD.dtype == torch.bfloat16,
        choice.weight_ED.dtype == torch.bfloat16,
        _SCORES[choice.score],
        _WEIGHTS[choice.weights],
        choice.scale,
        *_addresses(x_TD, *experts[:3], choice.weight_ED, *biases, routing.valid_T, y_TD),
        *_addresses(routing.logits_TE, routing.scores_TE, routing.weight_N),
        *_addresses(routing.expert_N, routing.token_N, routing.choice_N, routing.kept_N),
    )
    answer = kernels.whole_layer(ctypes.byref(layer))
    return (y_TD, routing) if answer == DONE else None


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _fit(x_TD: Tensor, choice: TopKChoice, experts: ExpertStacks) -> bool:
    """Whether C can read them, and each is what the others need it to be."""
    weight_ED, logit_bias_E, selection_bias_E, *_ = choice
    gate_EDF, up_EDF, down_EFD, _ = experts
    (num_experts, width, hidden), dtype = up_EDF.shape, x_TD.dtype
    return (
        dtype in _DTYPES
        and weight_ED.dtype in _DTYPES
        and dtype == up_EDF.dtype == down_EFD.dtype
        and x_TD.shape == (x_TD.shape[0], width)
        and x_TD.stride(1) == 1
        and weight_ED.is_contiguous()
        and up_EDF.is_contiguous()
        and down_EFD.is_contiguous()
        and weight_ED.shape == (num_experts, width)
        and (logit_bias_E is None or logit_bias_E.shape == (num_experts,))
        and (selection_bias_E is None or selection_bias_E.shape == (num_experts,))
        and 1 <= choice.top_k <= min(num_experts, MOST_CHOICES)
        and down_EFD.shape == (num_experts, hidden, width)
        and (gate_EDF is None or (gate_EDF.dtype, gate_EDF.shape) == (dtype, up_EDF.shape))
        and (gate_EDF is None or gate_EDF.is_contiguous())
    )


def _as_floats(bias_E: Tensor | None) -> Tensor | None:
    return None if bias_E is None else bias_E.to(torch.float32).contiguous()


def _empty_table(
    num_tokens: int, top_k: int, num_experts: int, valid_T: Tensor | None, sequence_T: Tensor | None
) -> Routing:
    """A table that C will fill."""
    num_rows = num_tokens * top_k
    if valid_T is None:
        valid_T = torch.ones(num_tokens, dtype=torch.bool)
    else:
        valid_T = checked_mask(valid_T, num_tokens, valid_T.device).contiguous()
    # Tensors like others are made in two thirds of the time.
    expert_N = torch.empty(num_rows, dtype=torch.int64)
    logits_TE = torch.empty(num_tokens, num_experts, dtype=torch.float32)
    return Routing(
        expert_N=expert_N,
        token_N=torch.empty_like(expert_N),
        weight_N=torch.empty(num_rows, dtype=torch.float32),
        choice_N=torch.empty_like(expert_N),
        logits_TE=logits_TE,
        scores_TE=torch.empty_like(logits_TE),
        valid_T=valid_T,
        kept_N=torch.empty(num_rows, dtype=torch.bool),
        sequence_T=sequence_T,
    )
