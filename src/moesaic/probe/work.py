"""What the experts of a model read, and what each of them would make of it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from moesaic.core.errors import ConfigError
from moesaic.experts import BiasedExperts, GatedExperts, MLPExperts
from moesaic.hf.block import SparseBlock
from moesaic.hf.layers import blocks
from moesaic.hf.native.experts import Form, interface_views, run
from moesaic.hf.native.found import is_interface, native_class
from moesaic.hf.native.layer import NativeLayer
from moesaic.hf.native.surgery import SURGERY
from moesaic.hf.native.table import attribute
from moesaic.hf.native.work import Each, Work, alone, looking
from moesaic.hf.wrapped import plain_path
from moesaic.layer import MoELayer


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AtWork:
    """The experts of one layer.

    Attributes:
        x_TD: tokens that they read, padding left out.
        each: runs rows by themselves, from (rows, expert of each, weight of each).
        random: the same with experts whose weights have been shuffled entry by entry; None where the family's experts
            cannot be run apart from their layer.
        num_experts: E, those that compute nothing left out.
    """

    x_TD: Tensor
    each: Each
    random: Each | None
    num_experts: int


@contextmanager
def at_work(model: nn.Module, valid_T: Tensor, seed: int = 0) -> Iterator[dict[str, AtWork]]:
    """Look at the experts of every layer in the forward that runs within, in this thread; by the layer's path.

    Args:
        model: ours, or adopted on our kernels.
        valid_T: which tokens of the forward are no padding.
        seed: of the shuffled weights.
    """
    found: dict[str, AtWork] = {}
    layers = blocks(model)
    path_of = {module: plain_path(path) for path, module in model.named_modules()}

    def see(path: str, work: Work, random: Each | None) -> None:
        same = work.x_TD.shape[0] == len(valid_T)
        x_TD = work.x_TD[valid_T.to(work.x_TD.device)] if same else work.x_TD
        found.setdefault(
            path, AtWork(x_TD=x_TD.detach(), each=work.each, random=random, num_experts=work.plan.num_experts)
        )

    def look(work: Work) -> None:
        path = path_of[work.experts]
        around = max((layer for layer in layers if f"{path}.".startswith(f"{layer}.")), key=len)
        if around not in found:
            see(around, work, _shuffled_native(work.experts, seed))

    with ExitStack() as stack:
        stack.enter_context(looking(look))
        for path, block in layers.items():
            if isinstance(block, SparseBlock):
                if not isinstance(block.moe, MoELayer):
                    raise ConfigError(
                        f"Experts can be told apart where a layer is a MoELayer, got {type(block.moe).__name__} at "
                        f"{path}. Use a recipe in which tokens choose experts."
                    )
                handle = block.moe.experts.register_forward_pre_hook(_before(path, see, seed))
                stack.callback(handle.remove)
        yield found


def _before(
    path: str, see: Callable[[str, Work, Each | None], None], seed: int
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    thread = threading.get_ident()

    def look(experts: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() != thread:
            return
        x_TD, plan = args
        twin = shuffled(experts, seed)
        each, random = (_apart(cast(Any, one).forward, plan.num_experts) for one in (experts, twin))
        see(path, Work(experts=experts, x_TD=x_TD, plan=plan, each=each), random)

    return look


def _apart(forward: Callable[..., Tensor], num_experts: int) -> Each:
    return lambda rows_ND, expert_N, weight_N: forward(rows_ND, alone(expert_N, weight_N, num_experts))


def _shuffled_native(experts: nn.Module, seed: int) -> Each | None:
    form = experts.__dict__.get("_moesaic")
    if not isinstance(form, Form):
        return None
    twin = shuffled(experts, seed)
    return lambda rows_ND, expert_N, weight_N: run(form, twin, rows_ND, expert_N[:, None], weight_N[:, None])


def shuffled(module: nn.Module, seed: int) -> nn.Module:
    """A copy whose parameters hold the same numbers in random places: what it does is chance."""
    twin = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in twin.parameters():
            flat = weight.reshape(-1)
            order = torch.randperm(flat.numel(), generator=generator).to(flat.device)
            weight.copy_(flat[order].view_as(weight))
    return twin


def routes_attention(layer: Any) -> bool:
    """Whether the experts of a layer are heads of attention (JetMoE), and no networks."""
    return isinstance(layer, NativeLayer) and native_class(layer.block).__name__ == "JetMoeMoA"


def matrices(layer: Any, path: str) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gate (E, D, F), up (E, D, F) and down (E, F, D) of a layer's experts, as views; biases are left out.

    Args:
        layer: of :func:`moesaic.hf.moe_layers`.
        path: for the message.
    Raises:
        ConfigError: if the experts are not three or two stacks of matrices.
    """
    if isinstance(layer, MoELayer):
        experts = layer.experts
        if isinstance(experts, GatedExperts | BiasedExperts):
            return experts.gate_EDF, experts.up_EDF, experts.down_EFD
        if isinstance(experts, MLPExperts):
            return None, experts.up_EDF, experts.down_EFD
        raise _no_matrices(type(experts).__name__, path)
    if isinstance(layer, NativeLayer):
        for part in layer.block.modules():
            surgery = SURGERY.get(native_class(part).__name__)
            if surgery is not None and surgery.form is not None:
                holder = attribute(part, surgery.holder) if surgery.holder else part
                return surgery.form(holder, "auto").views(holder)
            if is_interface(part):
                return interface_views(part)
        raise _no_matrices(type(layer.block).__name__, path)
    raise _no_matrices(type(layer).__name__, path)


def _no_matrices(name: str, path: str) -> ConfigError:
    return ConfigError(
        f"Weights can be compared where experts are stacks of matrices, got {name} at {path}. "
        "Compare outputs alone, with weights=False."
    )
