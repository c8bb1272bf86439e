"""The MoE layers of a model, with their routers as modules, and how to leave a model as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from moesaic.hf.layers import blocks, moe_layers
from moesaic.hf.native.found import Found, native_class, row_of
from moesaic.hf.native.layer import NativeLayer
from moesaic.hf.reports import Place, Report
from moesaic.hf.scope import domains

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Home:
    """One MoE layer and where its router is.

    Attributes:
        layer: module path.
        block: the module that holds experts and router.
        router: the module with the router's weights; None in designs without one.
        native: what it shows of itself where it is an adopted one of transformers.
    """

    layer: str
    block: nn.Module
    router: nn.Module | None
    native: NativeLayer | None

    @property
    def router_weights(self) -> list[nn.Parameter]:
        """The router's parameters; empty where its choices are fixed."""
        return [] if self.router is None else list(self.router.parameters())

    @property
    def other_weights(self) -> list[nn.Parameter]:
        """The layer's parameters that are not the router's."""
        own = {id(weight) for weight in self.router_weights}
        return [weight for weight in self.block.parameters() if id(weight) not in own]

    @property
    def bias_E(self) -> Tensor | None:
        """The router's selection bias, if it has one."""
        holder = self.router if self.native is None else self.native.router
        bias_E: Tensor | None = getattr(holder, "bias_E", None)
        return bias_E


def homes(model: nn.Module) -> list[Home]:
    """The MoE layers in depth order."""
    found = []
    for layer, moe in moe_layers(model).items():
        if isinstance(moe, NativeLayer):
            reporter = moe.reporter
            one = Found(path=layer, module=reporter, block=moe.block, native=native_class(reporter))
            found.append(Home(layer=layer, block=moe.block, router=row_of(one)[0], native=moe))
        else:
            module = cast(nn.Module, moe)
            router = dict(module.named_children()).get("router")
            found.append(Home(layer=layer, block=module, router=router, native=None))
    return found


@contextmanager
def undisturbed(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Run a model in one mode, and leave mode, buffers, gradients and random generators as they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({one.device.index for one in model.parameters() if one.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            model.train(training)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def run(model: nn.Module, batch: Batch, **more: Any) -> Any:
    """One forward; routers that ask for the domain of a sequence are told it."""
    given = {name: value for name, value in batch.items() if name != "domain"}
    if "input_ids" in given:
        # Images know no cache.
        more = {"use_cache": False, **more}
    domain_B = batch.get("domain")
    with nullcontext() if domain_B is None else domains(domain_B):
        return model(**given, **more)


class Heard:
    """Hears every layer with its graph; see :func:`moesaic.hf.scope.listening`.

    Args:
        model: whose layers.
        balance: hear of balance losses too.
    Attributes:
        reports: by layer, what it reported of each forward.
    """

    batch_load_E = None

    def __init__(self, model: nn.Module, *, balance: bool) -> None:
        self.places: Mapping[nn.Module, Place] = {
            block: Place(layer=path, index=index) for index, (path, block) in enumerate(blocks(model).items())
        }
        self.wants_balance = balance
        self.reports: dict[str, list[Report]] = {place.layer: [] for place in self.places.values()}

    def hear(self, place: Place, report: Report) -> None:
        """Keep what a layer reports."""
        self.reports[place.layer].append(report)


def chosen_TE(expert_N: Tensor, token_N: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    """Which experts each token has rows of, bool (T, E)."""
    mask_TE = torch.zeros(num_tokens, num_experts, dtype=torch.bool, device=expert_N.device)
    mask_TE[token_N, expert_N] = True
    return mask_TE


def norm(tensors: Sequence[Tensor | None]) -> float:
    """The Euclidean norm of all numbers of some gradients, those that are None left out."""
    squares = [float(one.detach().double().square().sum()) for one in tensors if one is not None]
    return math.sqrt(sum(squares))
