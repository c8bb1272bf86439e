"""A whole layer in one call of C: router, table and experts, for the few tokens of generation.

What PyTorch takes for a single token's thirty small operations is as long as reading the weights of eight experts.
"""

from __future__ import annotations

import ctypes
from dataclasses import fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from moesaic.core.routing import Routing, checked_mask, register_as_routing
from moesaic.kernels.activations import Activation
from moesaic.kernels.grouped_ffn.few_rows import FEW_ROWS
from moesaic.kernels.grouped_ffn.native import ACTIVATIONS
from moesaic.kernels.native import build
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


# As in whole_layer.c.
_SCORES = {"softmax": 0, "sigmoid": 1}
_WEIGHTS = {"scores": 0, "chosen": 1, "logits": 2}
_LATER = {field.name for field in fields(Routing)} - {"sequence_T"}


def is_at_hand(x_TD: Tensor) -> bool:
    """Whether C is compiled and tokens are where it runs: asked first, since most machines have none."""
    return x_TD.is_cpu and build.compiled() is not None


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
    if valid_T is not None:
        valid_T = checked_mask(valid_T, num_tokens, x_TD.device).contiguous()
    y_TD = torch.empty_like(x_TD)
    routing = UnreadRouting.empty(num_tokens, top_k, num_experts, valid_T, sequence_T)
    tensors = (x_TD, *experts[:3], *choice[:3], valid_T, y_TD, routing.memory)
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
        *[None if tensor is None else tensor.data_ptr() for tensor in tensors],
    )
    answer = kernels.whole_layer(ctypes.byref(layer))
    return (y_TD, routing) if answer == DONE else None


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
        and weight_ED.shape == (num_experts, width)
        and weight_ED.is_contiguous()
        and up_EDF.is_contiguous()
        and down_EFD.shape == (num_experts, hidden, width)
        and down_EFD.is_contiguous()
        and (gate_EDF is None or _is_like(gate_EDF, dtype, up_EDF.shape))
        and (logit_bias_E is None or _is_like(logit_bias_E, weight_ED.dtype, up_EDF.shape[:1]))
        and (selection_bias_E is None or _is_like(selection_bias_E, torch.float32, up_EDF.shape[:1]))
        and 1 <= choice.top_k <= min(num_experts, MOST_CHOICES)
    )


def _is_like(tensor: Tensor, dtype: torch.dtype, shape: torch.Size) -> bool:
    return tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous()


class UnreadRouting(Routing):
    """A table as C wrote it, in one piece of memory, taken apart when one of its fields is read.

    In generation mostly nobody reads it, and making its eight tensors takes a third of what Python takes for a call.
    """

    __slots__ = ("_sizes", "_valid_T", "memory")

    memory: Tensor

    @classmethod
    def empty(
        cls, num_tokens: int, top_k: int, num_experts: int, valid_T: Tensor | None, sequence_T: Tensor | None
    ) -> UnreadRouting:
        """A table for C to write.

        Args:
            num_tokens: T.
            top_k: K.
            num_experts: E.
            valid_T: bool, or None: all are.
            sequence_T: see :class:`~moesaic.core.routing.Routing`.
        """
        self, keep = cls.__new__(cls), object.__setattr__
        keep(self, "_sizes", (num_tokens, top_k, num_experts))
        keep(self, "_valid_T", valid_T)
        keep(self, "sequence_T", sequence_T)
        keep(self, "memory", torch.empty(num_tokens * (29 * top_k + 8 * num_experts), dtype=torch.uint8))
        return self

    def __getattr__(self, name: str) -> Any:
        """A field, which is not there before the first of them is read."""
        if name not in _LATER:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        for field, value in self._taken_apart().items():
            object.__setattr__(self, field, value)
        return object.__getattribute__(self, name)

    def _taken_apart(self) -> dict[str, Any]:
        """Where the fields lie: ``struct table`` of whole_layer.c."""
        num_tokens, top_k, num_experts = self._sizes
        num_rows, num_scores = num_tokens * top_k, num_tokens * num_experts
        pieces = self.memory.split_with_sizes((24 * num_rows, 8 * num_scores, 4 * num_rows, num_rows))
        expert_N, token_N, choice_N = pieces[0].view(torch.int64).view(3, num_rows)
        logits_TE, scores_TE = pieces[1].view(torch.float32).view(2, num_tokens, num_experts)
        valid_T = torch.ones(num_tokens, dtype=torch.bool) if self._valid_T is None else self._valid_T
        return {
            "expert_N": expert_N,
            "token_N": token_N,
            "choice_N": choice_N,
            "logits_TE": logits_TE,
            "scores_TE": scores_TE,
            "weight_N": pieces[2].view(torch.float32),
            "kept_N": pieces[3].view(torch.bool),
            "valid_T": valid_T,
            "extras": {},
        }


register_as_routing(UnreadRouting)
