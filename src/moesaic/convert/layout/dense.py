"""The feed-forward networks of a dense model: where their maps lie, and what they compute, found out by trying.

A family may call its maps what it likes, join two of them in one, or store them transposed. What a network computes is
not read off names: a small twin of it is run and compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moesaic.convert.weights.stack import DenseFFN
from moesaic.core.errors import ConfigError
from moesaic.hf.find import FeedForward, choose, find_feed_forwards
from moesaic.kernels.activations import Activation, gelu, gelu_tanh, relu, relu_squared, silu

_ACTIVATIONS = (silu, gelu, gelu_tanh, relu, relu_squared)
_TWIN_WIDTH, _TWIN_HIDDEN = 6, 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Map:
    """One linear map of a network, as its model stores it.

    Attributes:
        name: of the module that holds it, below the network.
        is_transposed: stored (in, out), as GPT-2 does; torch's linear maps are (out, in).
        half: which half of the outputs it is, where gate and up projection are joined in one; None where it is alone.
        has_bias: whether it adds one.
    """

    name: str
    is_transposed: bool
    has_bias: bool
    half: int | None = None

    def of(self, tensors: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, Tensor | None]:
        """Weight (in, out) and bias."""
        weight = tensors[f"{prefix}.{self.name}.weight"]
        weight = weight if self.is_transposed else weight.T
        bias = tensors[f"{prefix}.{self.name}.bias"] if self.has_bias else None
        if self.half is None:
            return weight, bias
        return weight.chunk(2, dim=1)[self.half], None if bias is None else bias.chunk(2)[self.half]


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A feed-forward network of a dense model: ``down(act(gate x) * up x)``, or ``down(act(up x))`` without a gate.

    Attributes:
        path: of its module, below the model's ``base_model``.
        prefix: the same in names of the model's ``state_dict``.
        width: D.
        hidden: F.
        gate: None where there is none.
        up: from D to F.
        down: from F to D.
        activation: what the non-linearity is called in recipes.
    """

    path: str
    prefix: str
    width: int
    hidden: int
    gate: Map | None
    up: Map
    down: Map
    activation: str

    @property
    def maps(self) -> tuple[Map, ...]:
        """All maps, in the order gate, up, down."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    @property
    def names(self) -> tuple[str, ...]:
        """Its tensors in the model's ``state_dict``."""
        found: dict[str, None] = {}
        for one in self.maps:
            found[f"{self.prefix}.{one.name}.weight"] = None
            if one.has_bias:
                found[f"{self.prefix}.{one.name}.bias"] = None
        return tuple(found)

    @property
    def biases(self) -> tuple[str, ...]:
        """Names of its biases."""
        return tuple(name for name in self.names if name.endswith(".bias"))

    def read(self, tensors: Mapping[str, Tensor]) -> DenseFFN:
        """The network's weights, as views of the model's tensors."""
        gate, gate_bias = (None, None) if self.gate is None else self.gate.of(tensors, self.prefix)
        up, up_bias = self.up.of(tensors, self.prefix)
        down, down_bias = self.down.of(tensors, self.prefix)
        return DenseFFN(gate_DF=gate, up_DF=up, down_FD=down, gate_F=gate_bias, up_F=up_bias, down_D=down_bias)

    def write(self, ffn: DenseFFN) -> dict[str, Tensor]:
        """The model's tensors that hold these weights; the other way of :meth:`read`."""
        weights = {self.up: (ffn.up_DF, ffn.up_F), self.down: (ffn.down_FD, ffn.down_D)}
        if self.gate is not None:
            weights[self.gate] = cast(Any, (ffn.gate_DF, ffn.gate_F))
        made: dict[str, Tensor] = {}
        for name in dict.fromkeys(one.name for one in self.maps):
            parts = sorted((one for one in weights if one.name == name), key=lambda one: one.half or 0)
            weight = torch.cat([weights[one][0] for one in parts], dim=1)
            made[f"{self.prefix}.{name}.weight"] = weight if parts[0].is_transposed else weight.T.contiguous()
            biases = [weights[one][1] for one in parts]
            if parts[0].has_bias:
                made[f"{self.prefix}.{name}.bias"] = torch.cat(cast(list[Tensor], biases))
        return made


def networks(model: PreTrainedModel, layers: str | list[int] = "all") -> list[Network]:
    """The feed-forward networks of a dense model, in depth order, each with what it computes.

    Args:
        model: it may be without memory, on the meta device.
        layers: which of them; see :func:`moesaic.hf.find.choose`.
    Raises:
        ConfigError: if there is none, or one computes something else than what experts compute.
    """
    base = cast(PreTrainedModel, model.base_model)
    inside = "" if base is model else next(f"{name}." for name, part in model.named_modules() if part is base)
    return [_network(base, one, inside) for one in choose(find_feed_forwards(base), layers)]


def run_dense(ffn: DenseFFN, x_TD: Tensor, act: Activation) -> Tensor:
    """What a network gives."""
    output_TD = hidden_of(ffn, x_TD, act) @ ffn.down_FD
    return output_TD if ffn.down_D is None else output_TD + ffn.down_D


def hidden_of(ffn: DenseFFN, x_TD: Tensor, act: Activation) -> Tensor:
    """What a network's neurons give for each token, before the down projection (T, F)."""
    up_TF = x_TD @ ffn.up_DF if ffn.up_F is None else x_TD @ ffn.up_DF + ffn.up_F
    if ffn.gate_DF is None:
        return act.forward(up_TF)
    gate_TF = x_TD @ ffn.gate_DF if ffn.gate_F is None else x_TD @ ffn.gate_DF + ffn.gate_F
    return act.forward(gate_TF) * up_TF


def _network(base: PreTrainedModel, found: FeedForward, inside: str) -> Network:
    module = base.get_submodule(found.path)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        twin = _twin(module, found)
        for parameter in twin.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=parameter.dtype) * 0.7)
        x = torch.randn(1, 5, _TWIN_WIDTH, dtype=torch.float64)
        wanted = twin(x)[0]
        for gate, up, down in _readings(twin):
            for act in _ACTIVATIONS:
                network = Network(
                    path=found.path,
                    prefix=f"{inside}{found.path}",
                    width=found.width,
                    hidden=found.hidden,
                    gate=gate,
                    up=up,
                    down=down,
                    activation=act.name,
                )
                tensors = {f"{network.prefix}.{key}": value for key, value in twin.state_dict().items()}
                given = run_dense(network.read(tensors), x[0], act)
                if torch.allclose(given, wanted, rtol=0, atol=1e-9):
                    return network
    raise ConfigError(
        f"A network that becomes experts must compute down(act(gate x) * up x) or down(act(up x)), with act one of "
        f"{', '.join(act.name for act in _ACTIVATIONS)}; {type(module).__name__} at {found.path} gives something else. "
        "Convert another model, or build the mixture with moesaic.sparsify and train it from fresh weights."
    )


def _twin(module: nn.Module, found: FeedForward) -> nn.Module:
    """The module with small linear maps in float64; its own weights are not copied."""
    kept = {id(one): nn.Parameter(one.detach().to("meta"), requires_grad=False) for one in module.parameters()}
    twin = copy.deepcopy(module, cast(Any, kept)).eval().requires_grad_(False)
    leaves = _leaves(twin)
    for index, (path, leaf) in enumerate(leaves):
        inputs, outputs = _sizes(leaf)
        # The last map of a square network leads out: a network is defined in the order in which it runs.
        is_down = (inputs, outputs) == (found.hidden, found.width)
        if is_down and (found.width != found.hidden or index == len(leaves) - 1):
            small = (_TWIN_HIDDEN, _TWIN_WIDTH)
        else:
            small = (_TWIN_WIDTH, _TWIN_HIDDEN * outputs // found.hidden)
        parent, _, name = path.rpartition(".")
        setattr(twin.get_submodule(parent), name, _small(leaf, *small))
    return twin


def _small(leaf: nn.Module, inputs: int, outputs: int) -> nn.Module:
    with torch.device("cpu"):
        if isinstance(leaf, nn.Linear):
            return nn.Linear(inputs, outputs, bias=leaf.bias is not None, dtype=torch.float64).requires_grad_(False)
        conv = Conv1D(outputs, inputs)  # type: ignore[no-untyped-call]
        return cast(nn.Module, conv).double().requires_grad_(False)


def _readings(twin: nn.Module) -> Iterator[tuple[Map | None, Map, Map]]:
    """Every way in which the maps may be gate, up and down projection."""
    into, out = [], []
    for path, leaf in _leaves(twin):
        one = Map(name=path, is_transposed=not isinstance(leaf, nn.Linear), has_bias=_has_bias(leaf))
        inputs, outputs = _sizes(leaf)
        if inputs == _TWIN_HIDDEN:
            out.append(one)
        elif outputs == 2 * _TWIN_HIDDEN:
            into += [Map(name=path, is_transposed=one.is_transposed, has_bias=one.has_bias, half=h) for h in (0, 1)]
        else:
            into.append(one)
    for down in out:
        if len(into) == 1:
            yield None, into[0], down
        else:
            yield from ((gate, up, down) for gate, up in permutations(into, 2))


def _leaves(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, part) for path, part in module.named_modules() if isinstance(part, nn.Linear | Conv1D)]


def _sizes(leaf: nn.Module) -> tuple[int, int]:
    if isinstance(leaf, nn.Linear):
        return leaf.in_features, leaf.out_features
    return cast(int, leaf.nx), cast(int, leaf.nf)


def _has_bias(leaf: nn.Module) -> bool:
    return getattr(leaf, "bias", None) is not None
