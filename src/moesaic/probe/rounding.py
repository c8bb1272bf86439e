"""What less precise arithmetic makes of a router's choices, from the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from moesaic.core.context import Context
from moesaic.core.errors import ConfigError
from moesaic.hf.block import SparseBlock
from moesaic.hf.layers import Block
from moesaic.hf.native.blocks import DogeBlock, JetMoeGate
from moesaic.hf.native.layer import NativeLayer
from moesaic.hf.native.router import AdoptedRouter
from moesaic.hf.native.table import Logits, attribute
from moesaic.layer import MoELayer
from moesaic.routers.linear import LinearRouter
from moesaic.routers.select import select_top_k
from moesaic.routers.token_choice import TokenChoiceRouter
from moesaic.routers.top_k import TopKRouter


def same(x: Tensor) -> Tensor:
    """As it is."""
    return x


def bfloat16(x: Tensor) -> Tensor:
    """Rounded to bfloat16."""
    return x.bfloat16().to(x.dtype)


def int8(x: Tensor) -> Tensor:
    """Rounded to 255 equal steps of its row's largest absolute value, as symmetric int8 quantisation does."""
    step = x.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / 127
    return (x / step).round() * step


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """What is rounded on the way to a router's logits; sums are float32.

    Attributes:
        weight: of the linear map.
        inputs: tokens.
        logits: what comes out.
    """

    weight: Callable[[Tensor], Tensor] = same
    inputs: Callable[[Tensor], Tensor] = same
    logits: Callable[[Tensor], Tensor] = same


EXACT = Rounding()
ROUNDINGS = {
    "router in bfloat16": Rounding(weight=bfloat16, inputs=bfloat16, logits=bfloat16),
    "router weights in bfloat16": Rounding(weight=bfloat16),
    "router weights in int8": Rounding(weight=int8),
    "router weights and inputs in int8": Rounding(weight=int8, inputs=int8),
}
"""By what a reader calls them; inputs of each layer are those of the model as it is."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Read:
    """What a router was given in one forward.

    Attributes:
        x_TD: tokens.
        context: what is known beside them; None for routers of transformers.
    """

    x_TD: Tensor
    context: Context | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Choice:
    """What a router would choose.

    Attributes:
        by_TE: what the best K are taken of: minus infinity where a group is out.
        expert_TK: the chosen.
    """

    by_TE: Tensor
    expert_TK: Tensor


class Chooser:
    """A router of one layer, in any precision.

    Args:
        block: that reports its routings.
        layer: what it shows of itself.
        path: for messages.
    Attributes:
        module: whose input is what the router reads.
        top_k: K.
        scale: what the best are taken of, in words.
    Raises:
        ConfigError: if it is not a router in which each token takes the K best by one linear map.
    """

    def __init__(self, block: Block, layer: Any, path: str) -> None:
        self.layer = layer
        self.module: nn.Module
        if isinstance(block, SparseBlock):
            router = block.moe.router if isinstance(block.moe, MoELayer) else None
            if not isinstance(router, TokenChoiceRouter):
                raise _no_margin(type(router or block.moe).__name__, path)
            self.module, self.top_k = router, router.top_k
            self.scale = _scale_of_ours(router)
        else:
            spec, row = block.adoption.spec, block.adoption.row
            if not block.takes_choices or not spec.is_learned or row.logits is None or isinstance(block, DogeBlock):
                raise _no_margin(type(block).__name__, path)
            self.module, self.top_k = block, spec.top_k
            by = "logits" if spec.select == "logit" else f"{spec.score} scores"
            self.scale = f"{by} plus bias" if spec.selection_bias else by
        self.block = block

    def choose(self, read: Read, rounding: Rounding = EXACT) -> Choice:
        """What it would choose; float32 but for what is rounded."""
        if isinstance(self.block, SparseBlock):
            return self._ours(read, rounding)
        return self._theirs(read, rounding)

    def _ours(self, read: Read, rounding: Rounding) -> Choice:
        router = copy.deepcopy(self.module)
        assert isinstance(router, TokenChoiceRouter)
        router.weight.data = rounding.weight(router.weight.data.float())

        def logits(x_TD: Tensor) -> Tensor:
            return rounding.logits(LinearRouter.logits(router, rounding.inputs(x_TD.float())))

        # An attribute of the copy hides the method.
        object.__setattr__(router, "logits", logits)
        routing = router(read.x_TD, None, read.context or Context())
        by_TE = _selection_of_ours(router, routing.logits_TE, routing.scores_TE)
        return Choice(by_TE=by_TE, expert_TK=routing.expert_N.view(-1, self.top_k))

    def _theirs(self, read: Read, rounding: Rounding) -> Choice:
        layer, block = self.layer, self.block
        assert isinstance(layer, NativeLayer)
        assert not isinstance(block, SparseBlock)
        spec, row = block.adoption.spec, block.adoption.row
        # The float32 sums of a model in float32, or of one in less whose inputs are as they came.
        own = block if isinstance(block, AdoptedRouter | JetMoeGate) else cast(nn.Module, block.router)
        router = copy.deepcopy(own).float()
        weight = attribute(router, row.weight)
        weight.data = rounding.weight(weight.data)
        logits_TE = rounding.logits(cast(Logits, row.logits)(row, router, rounding.inputs(read.x_TD.float()), spec))
        by_TE = spec.selection(logits_TE, spec.scores(logits_TE), layer.router.bias_E)
        return Choice(by_TE=by_TE, expert_TK=select_top_k(by_TE, spec.top_k))


def _scale_of_ours(router: TokenChoiceRouter) -> str:
    if router.bias_E is not None:
        return "scores plus bias"
    groups = router.groups if isinstance(router, TopKRouter) else None
    return "logits" if groups is None or groups.best_per_group == 1 else "scores"


def _selection_of_ours(router: TokenChoiceRouter, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
    """What :meth:`TokenChoiceRouter.choose` takes the best of."""
    by_TE = logits_TE if _scale_of_ours(router) == "logits" else scores_TE
    if router.bias_E is not None:
        by_TE = by_TE + router.bias_E.to(by_TE.dtype)
    groups = router.groups if isinstance(router, TopKRouter) else None
    return by_TE if groups is None else groups.mask(by_TE)


def edge(choice: Choice) -> Tensor:
    """How far the last chosen is ahead of the first left out (T,); infinite where none is left out."""
    chosen_TE = torch.zeros_like(choice.by_TE, dtype=torch.bool).scatter(1, choice.expert_TK, True)
    last_T = choice.by_TE.masked_fill(~chosen_TE, torch.inf).amin(dim=-1)
    first_out_T = choice.by_TE.masked_fill(chosen_TE, -torch.inf).amax(dim=-1)
    return last_T - first_out_T


def differ(first_TK: Tensor, second_TK: Tensor) -> Tensor:
    """Whether a token's set of experts differs (T,)."""
    return (first_TK.sort(dim=-1).values != second_TK.sort(dim=-1).values).any(dim=-1)


def _no_margin(name: str, path: str) -> ConfigError:
    return ConfigError(
        f"Margins need a router in which each token takes its K best experts by a linear map, got {name} at {path}. "
        "Measure a model of such routers, such as Mixtral's."
    )
