"""What a recipe's layer has room for: which of its tensors hold networks, and which stay as the recipe draws them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from moesaic.convert.layout.dense import Network
from moesaic.convert.steps import Step
from moesaic.convert.weights.stack import DenseFFN, ExpertStack
from moesaic.core.errors import ConfigError
from moesaic.experts import BiasedExperts, GatedExperts, MLPExperts
from moesaic.hf.spec import SparseSpec

SMALL_HIDDEN = 2
"""Hidden width of the small layers from which routers are taken, and which are tried before a large one is filled."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Filled:
    """The networks of one layer.

    Attributes:
        experts: routed.
        shared: the one that every token visits; None to let it start without a voice where the layer has one.
    """

    experts: ExpertStack
    shared: DenseFFN | None = None


Fill = Callable[[DenseFFN], Filled]
"""From the dense network to the networks of the layer that takes its place."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Room:
    """The layer that takes the place of one network.

    Attributes:
        spec: of the model.
        network: the dense one.
        seed: draws what is fresh.
    Raises:
        ConfigError: if the layer's experts are not such networks.
    """

    spec: SparseSpec
    network: Network
    seed: int

    def __post_init__(self) -> None:
        experts = getattr(self._without_memory, "experts", None)
        network, recipe = self.network, self.spec.recipe
        if not isinstance(experts, GatedExperts | MLPExperts | BiasedExperts):
            raise ConfigError(
                f"Experts must be networks like those of the dense model, got recipe {recipe}, whose experts are "
                f"{type(experts).__name__}. Use a recipe as mixtral; for low-rank experts moesaic.sparsify keeps the "
                "dense networks."
            )
        if network.biases and not isinstance(experts, BiasedExperts):
            raise ConfigError(
                f"The network at {network.path} has biases ({', '.join(network.biases)}), and the experts of recipe "
                f"{recipe} have none. Only gpt-oss has experts with biases, for networks with a gate and silu."
            )
        if (network.gate is None) != isinstance(experts, MLPExperts):
            mine, theirs = ("no gate", "have one") if network.gate is None else ("a gate", "have none")
            fitting = "switch, gshard or shazeer-2017" if network.gate is None else "mixtral, qwen3-moe or deepseek-v3"
            raise ConfigError(
                f"The network at {network.path} has {mine}, and the experts of recipe {recipe} {theirs}. "
                f"Use a recipe as {fitting}."
            )

    @property
    def hidden(self) -> int:
        """F of one expert."""
        return self.spec.layers[self.network.path].hidden

    @cached_property
    def shapes(self) -> Shapes:
        """Every tensor of the layer."""
        return shapes_of(self._without_memory)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.shapes["experts.up_EDF"][0]

    @property
    def shared_hidden(self) -> int:
        """F of the network that every token visits; 0 where there is none."""
        return self.shapes.get("shared.up_DF", (0, 0))[1]

    def built(self, device: str, hidden: int) -> nn.Module:
        """The layer with experts of another width; for one seed always with the same router."""
        is_small = (device, hidden) == ("cpu", SMALL_HIDDEN)
        return copy.deepcopy(self._small) if is_small else self._built(device, hidden)

    def fresh(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the recipe draws and no network fills: routers, gates and buffers."""
        state = self.built("cpu", SMALL_HIDDEN).to(dtype).state_dict()
        return {name: tensor for name, tensor in state.items() if not holds_network(name)}

    @cached_property
    def _small(self) -> nn.Module:
        return self._built("cpu", SMALL_HIDDEN)

    @cached_property
    def _without_memory(self) -> nn.Module:
        return self._built("meta", self.hidden)

    def _built(self, device: str, hidden: int) -> nn.Module:
        one = {self.network.path: replace(self.spec.layers[self.network.path], hidden=hidden)}
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.default_generator.manual_seed(self.seed)
            return cast(nn.Module, replace(self.spec, layers=one).block(self.network.path).moe)

    def step(self, fill: Fill, move: Fill, router: Mapping[str, Tensor] | None = None) -> Step:
        """The step that turns the network into the layer.

        Args:
            fill: from the network's weights to those of the layer.
            move: the same for moments of an optimizer.
            router: tensors of the layer that a method sets in place of what the recipe draws.
        """
        network, shapes, prefix = self.network, self.shapes, f"{self.network.prefix}.moe"

        def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            ffn = network.read(tensors)
            made = self.fresh(ffn.up_DF.dtype)
            made |= {name: tensor.to(made[name].dtype) for name, tensor in (router or {}).items()}
            made |= network_tensors(shapes, fill(ffn), ffn)
            return {f"{prefix}.{name}": made[name].contiguous() for name in shapes}

        def moments(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            ffn = network.read(tensors)
            made = network_tensors(shapes, move(ffn), ffn, moments=True)
            return {
                f"{prefix}.{name}": made[name].contiguous() if name in made else ffn.up_DF.new_zeros(shape)
                for name, shape in shapes.items()
            }

        gives = tuple(f"{prefix}.{name}" for name in shapes)
        return Step(takes=network.names, gives=gives, run=run, moments=moments)


def shapes_of(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of everything that a layer saves."""
    return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}


def holds_network(name: str) -> bool:
    """Whether a tensor of a layer is a weight of a network, which no method may leave as it was drawn."""
    part, _, weight = name.rpartition(".")
    return part == "experts" or (part in _EVERY_TOKEN and weight != "token_gate_D")


def network_tensors(shapes: Shapes, filled: Filled, dense: DenseFFN, *, moments: bool = False) -> dict[str, Tensor]:
    """A layer's tensors that hold networks.

    Args:
        shapes: of the layer.
        filled: the networks.
        dense: what a network for every token that was not given takes its neurons from; it starts without a voice.
        moments: they are an optimizer's, not weights.
    """
    made = _of_experts(filled.experts, "experts.up_bias_EF" in shapes, moments)
    for part in _EVERY_TOKEN:
        if f"{part}.up_DF" not in shapes:
            continue
        given = filled.shared if part == "shared" else None
        network = given if given is not None else _voiceless(dense, shapes[f"{part}.up_DF"][1])
        made |= {f"{part}.up_DF": network.up_DF, f"{part}.down_FD": network.down_FD}
        if network.gate_DF is not None:
            made[f"{part}.gate_DF"] = network.gate_DF
    return made


_EVERY_TOKEN = ("shared", "after.ffn")


def _of_experts(stack: ExpertStack, has_bias: bool, moments: bool) -> dict[str, Tensor]:
    made = {"experts.up_EDF": stack.up_EDF, "experts.down_EFD": stack.down_EFD}
    if stack.gate_EDF is not None:
        made["experts.gate_EDF"] = stack.gate_EDF
    if has_bias:
        zeros_EF, zeros_ED = torch.zeros_like(stack.up_EDF[:, 0]), torch.zeros_like(stack.down_EFD[:, 0])
        up_EF = zeros_EF if stack.up_EF is None else stack.up_EF
        # These experts add 1 to the up branch.
        made["experts.up_bias_EF"] = up_EF if moments else up_EF - 1
        made["experts.gate_bias_EF"] = zeros_EF if stack.gate_EF is None else stack.gate_EF
        made["experts.down_bias_ED"] = zeros_ED if stack.down_ED is None else stack.down_ED
    return made


def _voiceless(dense: DenseFFN, hidden: int) -> DenseFFN:
    """Neurons of the dense network, over and over if it has too few, that nobody hears yet."""
    neuron_F = torch.arange(hidden, device=dense.up_DF.device) % dense.hidden
    return DenseFFN(
        gate_DF=None if dense.gate_DF is None else dense.gate_DF[:, neuron_F],
        up_DF=dense.up_DF[:, neuron_F],
        down_FD=torch.zeros_like(dense.down_FD[:1]).expand(hidden, -1),
    )
