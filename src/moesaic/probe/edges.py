"""How close a router's choices are, and how many turn when the arithmetic is less precise."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moesaic.core.context import Context
from moesaic.hf.layers import blocks, moe_layers
from moesaic.hf.watching import Seen, adopted, observe, places
from moesaic.probe.interval import mean_per_unit
from moesaic.probe.losses import Steps, in_evaluation
from moesaic.probe.rounding import ROUNDINGS, Chooser, Read, differ, edge
from moesaic.probe.text import NO_TEXT, HeldOut

QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75)
WHOLE = "model in bfloat16"
"""The name of what is measured from end to end: each layer reads what the layers below made of it, in bfloat16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flips:
    """How many tokens go to another set of experts.

    Attributes:
        what: was rounded.
        end_to_end: whether the whole model was; otherwise each layer's inputs are those of the model as it is.
        share: of tokens.
        low: end of the 95 % interval over texts; NaN with fewer than two.
        high: the other end.
    """

    what: str
    end_to_end: bool
    share: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMargins:
    """How close the choices of one layer are.

    Attributes:
        layer: index in depth order.
        layer_name: module path.
        num_experts: E.
        top_k: K.
        scale: what the best K are taken of; margins are differences of it.
        num_tokens: that were looked at.
        num_texts: that hold them.
        quantiles: of the margin between the last chosen and the first left out, by share of tokens below.
        flips: one for each way to be less precise.
    """

    layer: int
    layer_name: str
    num_experts: int
    top_k: int
    scale: str
    num_tokens: int
    num_texts: int
    quantiles: dict[float, float]
    flips: tuple[Flips, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Margins:
    """The margins of all layers of a model."""

    layers: tuple[LayerMargins, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; None for what does not exist."""
        made: dict[str, Any] = asdict(self)
        for layer in made["layers"]:
            layer["quantiles"] = {str(share): _finite(value) for share, value in layer["quantiles"].items()}
            layer["flips"] = [{name: _finite(value) for name, value in one.items()} for one in layer["flips"]]
        return made

    def rows(self) -> list[dict[str, Any]]:
        """A line for each layer and way to be less precise, for a table."""
        return [
            {
                "layer": layer.layer,
                "layer_name": layer.layer_name,
                "num_experts": layer.num_experts,
                "top_k": layer.top_k,
                "scale": layer.scale,
                "num_tokens": layer.num_tokens,
                "num_texts": layer.num_texts,
                **{f"margin_{share:g}": _finite(value) for share, value in layer.quantiles.items()},
                **{name: _finite(value) for name, value in asdict(one).items()},
            }
            for layer in self.layers
            for one in layer.flips
        ]


@torch.no_grad()
def margins(
    model: nn.Module,
    text: HeldOut,
    *,
    end_to_end: bool = True,
    batch_size: int = 8,
    step: Steps = lambda _done, _all: None,
) -> Margins:
    """Measure the distance between the last chosen expert and the first left out, and whose choice rounding turns.

    Two questions are kept apart. With the inputs of each layer held as they are, only the router is rounded: to
    bfloat16 (inputs, weights and logits, as in a model that is cast as a whole), or its weights, or weights and inputs,
    to int8 with one scale for each expert and token. End to end, a copy of the whole model runs in bfloat16 and is
    compared with the model as it is; routers of Moesaic work in float32 in that copy too.

    Args:
        model: with MoE layers, ours or transformers'; it is left as it was.
        text: that it reads.
        end_to_end: run the copy in bfloat16, which takes half the memory of a model in float32 once more.
        batch_size: blocks of one forward.
        step: called after each batch.
    Raises:
        ConfigError: if a layer has a router in which tokens do not take the K best by one linear map.
    """
    with adopted(model), in_evaluation(model):
        places(model)  # refuses a model without layers
        looks, layers = _looks(model), moe_layers(model)
        other = _in_bfloat16(model) if end_to_end else None
        sums = [_Sums(text.num_texts) for _ in looks]
        batches = list(text.batches(batch_size))
        for index, batch in enumerate(batches):
            with _reading([chooser.module for chooser in looks.values()]) as reads:
                here = _chosen(model, batch)
            there = None if other is None else _chosen(other, batch)
            for layer, (chooser, sum_) in enumerate(zip(looks.values(), sums, strict=True)):
                sum_.add(chooser, reads[chooser.module], batch)
                if there is not None:
                    sum_.flip(WHOLE, differ(here[layer], there[layer]), batch)
            step(index + 1, len(batches))
        return Margins(
            layers=tuple(
                sum_.result(index, path, layers[path].num_experts, chooser)
                for index, ((path, chooser), sum_) in enumerate(zip(looks.items(), sums, strict=True))
            )
        )


def _in_bfloat16(model: nn.Module) -> nn.Module:
    """A copy whose parameters are bfloat16; tables of positions and selection biases stay, as when it is loaded so."""
    other = copy.deepcopy(model)
    for weight in other.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(torch.bfloat16)
    return other


def _looks(model: nn.Module) -> dict[str, Chooser]:
    layers = moe_layers(model)
    return {path: Chooser(block, layers[path], path) for path, block in blocks(model).items()}


def _chosen(model: Any, batch: HeldOut) -> list[Tensor]:
    """What each layer's router chooses on a batch (T, K), in depth order."""
    device = next(model.parameters()).device
    chosen: dict[int, Tensor] = {}

    def see(one: Seen) -> None:
        chosen[one.index] = one.routing.expert_N.view(one.routing.num_tokens, -1).cpu()

    with observe(model, see):
        model(
            input_ids=batch.input_ids_BP.to(device),
            attention_mask=batch.valid_BP.to(device).long(),
            use_cache=False,
        )
    return [chosen[index] for index in sorted(chosen)]


@contextmanager
def _reading(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Read]]:
    reads: dict[nn.Module, Read] = {}
    thread = threading.get_ident()

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            given = (*args, *kwargs.values())
            x = given[0]
            context = given[2] if len(given) > 2 and isinstance(given[2], Context) else None
            reads[module] = Read(x_TD=x.reshape(-1, x.shape[-1]).detach(), context=context)

    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_pre_hook(look, with_kwargs=True)
            stack.callback(handle.remove)
        yield reads


class _Sums:
    """Adds up one layer's margins and flips over batches."""

    def __init__(self, num_texts: int) -> None:
        self.num_texts = num_texts
        self.edges: list[npt.NDArray[np.float32]] = []
        self.tokens = np.zeros(num_texts)
        self.flips: dict[str, npt.NDArray[np.float64]] = {}

    def add(self, chooser: Chooser, read: Read, batch: HeldOut) -> None:
        """Take in one batch."""
        text_T = batch.text_BP.reshape(-1)
        own = chooser.choose(read)
        self.edges.append(edge(own).cpu()[text_T != NO_TEXT].numpy())
        self._count(self.tokens, torch.ones_like(text_T, dtype=torch.float64), text_T)
        for name, rounding in ROUNDINGS.items():
            self.flip(name, differ(own.expert_TK, chooser.choose(read, rounding).expert_TK), batch)

    def flip(self, name: str, differs_T: Tensor, batch: HeldOut) -> None:
        """Take in which tokens go elsewhere."""
        into = self.flips.setdefault(name, np.zeros(self.num_texts))
        self._count(into, differs_T.double().cpu(), batch.text_BP.reshape(-1))

    @staticmethod
    def _count(into: npt.NDArray[np.float64], value_T: Tensor, text_T: Tensor) -> None:
        real_T = text_T != NO_TEXT
        np.add.at(into, text_T[real_T].numpy(), value_T[real_T].numpy())

    def result(self, index: int, path: str, num_experts: int, chooser: Chooser) -> LayerMargins:
        """What was seen."""
        edges = np.concatenate(self.edges).astype(np.float64)
        finite = edges[np.isfinite(edges)]
        flips = []
        for name, turned in self.flips.items():
            mean = mean_per_unit(turned, self.tokens)
            flips.append(
                Flips(what=name, end_to_end=name == WHOLE, share=mean.value, low=max(0.0, mean.low), high=mean.high)
            )
        return LayerMargins(
            layer=index,
            layer_name=path,
            num_experts=num_experts,
            top_k=chooser.top_k,
            scale=chooser.scale,
            num_tokens=len(edges),
            num_texts=int((self.tokens > 0).sum()),
            quantiles={share: float(np.quantile(finite, share)) if len(finite) else math.inf for share in QUANTILES},
            flips=tuple(flips),
        )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
