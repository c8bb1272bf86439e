"""Which part of a layer each weight belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from moesaic.hf.block import SparseBlock
from moesaic.hf.native.found import Found, row_of
from moesaic.hf.native.router_spec import RouterSpec
from moesaic.hf.native.surgery import SURGERY
from moesaic.hf.native.table import Row
from moesaic.recipes.recipe import Layer

Weights = Mapping[str, Tensor]

_EXPERTS = re.compile(r"(^|\.)(experts|input_linear|output_linear|down_embed|up_embed)\.")
_SHARED = re.compile(r"shared")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MIXER = re.compile(r"attn|attention|mamba|mixer|conv|temporal", re.IGNORECASE)
# What stands around a mixer and is named after it.
_AROUND = re.compile(r"norm|residual|hyper|_hc$", re.IGNORECASE)
_FEED = re.compile(r"^(mlp|mlps|feed_forward|ffn|ff|fc1|fc2|layer\.\d+\.(mlp|DenseReluDense))(\.|$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """The weights of one mixture, by part, with their paths below the layer.

    Args:
        spec: how its router chooses.
        routers: weights that choose.
        selection_bias: of the router, which may be a buffer; None for none.
        experts: weights of all experts.
        shared: weights of shared experts.
        rest: weights of the block that every token passes.
    """

    spec: RouterSpec
    routers: Weights
    selection_bias: Tensor | None
    experts: Weights
    shared: Weights
    rest: Weights


@dataclass(slots=True)
class LayerWeights:
    """The weights of one layer, by part, with their paths below it.

    Args:
        mixtures: routers and experts.
        mixers: of each module that mixes positions.
        feeds: of each dense feed-forward network.
        norms: over the model's width.
        other: what is none of these.
        routed_mixers: how the experts of mixers are chosen, where they are mixtures too (JetMoE).
        blocks: layers that ``sparsify`` put in, and their weights.
    """

    mixtures: list[Mixture] = field(default_factory=list)
    mixers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    feeds: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    other: dict[str, Tensor] = field(default_factory=dict)
    routed_mixers: dict[str, RouterSpec] = field(default_factory=dict)
    blocks: list[tuple[Layer, Weights]] = field(default_factory=list)


def sort_weights(layer: nn.Module, path: str, routers: Iterable[Found], width: int, seen: set[int]) -> LayerWeights:
    """Sort a layer's weights by part.

    Args:
        layer: the module.
        path: of it in the model.
        routers: of the whole model, adopted or not.
        width: D of the model.
        seen: ids of weights that were counted, so that one that stands twice counts once; this layer's are added.
    """
    sorted_ = LayerWeights()
    left: dict[str, Tensor] = {name: one for name, one in layer.named_parameters() if id(one) not in seen}
    seen |= {id(one) for one in left.values()}
    for found in routers:
        if not found.path.startswith(path + "."):
            continue
        inside = found.path[len(path) + 1 :]
        router, row = row_of(found)
        surgery = SURGERY.get(found.native.__name__)
        block, block_path = found.block, inside.rpartition(".")[0]
        if surgery is not None and found.native.__name__ != "JetMoeTopKGating":
            # The module routes and holds its experts.
            block, block_path = found.module, inside
        spec = row.spec_of(router, block)
        if _ATTENTION.search(block_path):
            sorted_.routed_mixers[block_path.partition(".")[0]] = spec
            continue
        prefix = f"{block_path}." if block_path else ""
        names = {id(module): name for name, module in layer.named_modules()}
        own = names[id(router)] if router is not block else f"{prefix}router_gate"
        sorted_.mixtures.append(_mixture(left, spec, row, router, block, prefix, own))
    for name, part in layer.named_modules():
        if isinstance(part, SparseBlock):
            own = {key.removeprefix(f"{name}.moe."): one for key, one in left.items() if key.startswith(f"{name}.")}
            left = {key: one for key, one in left.items() if not key.startswith(f"{name}.")}
            sorted_.blocks.append((part.moe, own))
    _sort_rest(layer, left, sorted_, width)
    return sorted_


def _mixture(
    left: dict[str, Tensor], spec: RouterSpec, row: Row, router: nn.Module, block: nn.Module, prefix: str, own: str
) -> Mixture:
    """Take a mixture's weights out of those that are left."""
    bias = row.bias_of(router, block)
    # Where router and experts stand in the layer itself (Gemma 4), nothing else there belongs to them.
    inside = {name: left[name] for name in left if name.startswith(prefix)}
    routers = {name: one for name, one in inside.items() if name.startswith(f"{own}.") or _is_bias(name)}
    experts = {name: one for name, one in inside.items() if _EXPERTS.search(name) and not _SHARED.search(name)}
    # Shared experts may stand beside the block.
    shared = {name: one for name, one in left.items() if _SHARED.search(name) and not _MIXER.search(name)}
    rest = {name: one for name, one in inside.items() if not (name in routers or name in experts or name in shared)}
    rest = {name: one for name, one in rest.items() if prefix and "norm" not in name}
    for part in (routers, experts, shared, rest):
        for name in part:
            del left[name]
    biases = [name for name in routers if bias is not None and routers[name].numel() == bias.numel() and _is_bias(name)]
    routers = {name: one for name, one in routers.items() if name not in biases}
    return Mixture(spec=spec, routers=routers, selection_bias=bias, experts=experts, shared=shared, rest=rest)


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] in ("expert_bias", "e_score_correction_bias", "balancing_biases")


def _sort_rest(layer: nn.Module, left: Mapping[str, Tensor], sorted_: LayerWeights, width: int) -> None:
    modules = dict(layer.named_modules())
    for name, weight in left.items():
        owner = type(modules[name.rpartition(".")[0]]).__name__
        is_mixer = any(_MIXER.search(part) and not _AROUND.search(part) for part in name.split("."))
        # A norm within a mixer is the mixer's, if it does not stand beside it (T5).
        if "norm" in owner.lower() and weight.shape == (width,) and (not is_mixer or _is_beside(name)):
            sorted_.norms[name] = weight
        elif _FEED.match(name):
            sorted_.feeds.setdefault(_top(name), {})[name] = weight
        elif is_mixer:
            sorted_.mixers.setdefault(_top(name), {})[name] = weight
        else:
            sorted_.other[name] = weight


def _top(name: str) -> str:
    """The module below the layer that a weight is of; one deeper where that is only a place in a list."""
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 and parts[1].isdigit() else parts[0]


def _is_beside(name: str) -> bool:
    """Whether a norm with a mixer in its path stands beside the mixer, not in it."""
    return name.split(".")[-2] == "layer_norm"


def numel(weights: Weights) -> int:
    """How many numbers the weights have."""
    return sum(weight.numel() for weight in weights.values())


def in_products(weights: Weights) -> int:
    """How many of them are factors of matrix products: all but vectors."""
    return sum(weight.numel() for weight in weights.values() if weight.ndim > 1)
