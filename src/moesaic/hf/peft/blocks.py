"""Where a model keeps its experts: stacks with a matrix of every expert, or a module for each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from moesaic.core.errors import ConfigError
from moesaic.hf.block import SparseBlock
from moesaic.hf.peft.halves import halves
from moesaic.hf.wrapped import plain_path

PROJECTIONS = ("gate", "up", "down")

# What an expert that is a module calls its linear maps.
_MAPS = {
    "wi": "up", "wi_0": "gate", "wi_1": "up", "wo": "down", "fc1": "up", "fc2": "down",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down",
}  # fmt: skip

# What stacks are called that hold one projection each: ours, and Nemotron-H's.
_SEPARATE = (
    {"gate": "gate_EDF", "up": "up_EDF", "down": "down_EFD"},
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """A parameter that holds one projection of every expert, or gate and up in one.

    Attributes:
        path: of the module that holds it, below the model.
        name: of the parameter there.
        dim: the dimension along which its projections lie.
        where: the places of each projection along ``dim``.
    """

    path: str
    name: str
    dim: int
    where: Mapping[str, slice]

    @property
    def full_name(self) -> str:
        """Path and name."""
        return f"{self.path}.{self.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertBlock:
    """The experts of one MoE layer, and what stands beside them.

    Attributes:
        index: of the MoE layer, in depth order; dense layers are not counted.
        path: of the MoE block.
        layer: path of the transformer block around it.
        experts: path of the module that is called with the routed tokens.
        num_experts: E.
        projections: those that an expert has, of gate, up and down.
        stacks: parameters that hold them.
        biases: parameters of shape (experts, outputs) that hold their biases, in the same way.
        linears: path of the linear map of each (expert, projection), where each expert is a module of its own.
        routers: paths of the modules that choose experts.
        shared: paths of the modules that every token visits beside them.
        attention: paths of the linear maps of the attention in the same transformer block.
    """

    index: int
    path: str
    layer: str
    experts: str
    num_experts: int
    projections: tuple[str, ...]
    stacks: tuple[Stack, ...]
    biases: tuple[Stack, ...]
    linears: Mapping[tuple[int, str], str]
    routers: tuple[str, ...]
    shared: tuple[str, ...]
    attention: tuple[str, ...]


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by the path that they have without PEFT; where PEFT trains a copy, that copy."""
    found = {}
    for path, module in base_of(model).named_modules():
        clean = clean_name(path)
        if clean is not None:
            found[clean] = module
    return found


def parameters_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model itself, not those of adapters, by the name that they have without PEFT."""
    for name, parameter in base_of(model).named_parameters():
        clean = clean_name(name)
        if clean is not None:
            yield clean, parameter


def clean_name(name: str) -> str | None:
    """A name without what PEFT puts into it; None for an adapter's own."""
    return None if ".lora_" in name else plain_path(name)


def home_of(name: str) -> str:
    """The path, without PEFT, of the module that a trainable parameter of any kind is for."""
    name = re.sub(r"^base_model\.model\.", "", name)
    name = plain_path(re.sub(r"\.(lora_[^.]+|parametrizations)\..*", ".", name))
    return name.rpartition(".")[0]


def expert_blocks(model: nn.Module) -> list[ExpertBlock]:
    """The experts of every MoE layer that keeps them as stacks or as modules, in depth order.

    Raises:
        ConfigError: if there are none.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise ConfigError(
            f"{type(base_of(model)).__name__} has no experts that can be chosen one by one: what is needed are weights "
            "of shape (experts, inputs, outputs) or (experts, outputs, inputs), or a module for each expert. "
            "Use a model that has them, or make one with moesaic.sparsify."
        )
    return blocks


def find_blocks(model: nn.Module) -> list[ExpertBlock]:
    """The same, if there are any."""
    modules = modules_of(model)
    blocks: list[ExpertBlock] = []
    for path, module in modules.items():
        if "shared" in path.rpartition(".")[2]:
            continue
        stacks = _stacks(path, module, modules)
        linears = {} if stacks else _linears(path, module)
        if stacks or linears:
            blocks.append(_block(len(blocks), path, stacks, linears, modules))
    return blocks


def weights_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module itself by name, also those that a parametrization has taken in."""
    own = dict(module.named_parameters(recurse=False))
    if parametrize.is_parametrized(module):
        lists = cast("Mapping[str, parametrize.ParametrizationList]", module.parametrizations)
        own |= {name: cast(nn.Parameter, one.original) for name, one in lists.items()}
    return own


def _stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in weights_of(module).items() if weight.ndim == 3}


def base_of(model: nn.Module) -> nn.Module:
    """The model that PEFT was put around, or the model itself."""
    get = getattr(model, "get_base_model", None)  # a PeftModel has it
    return cast(nn.Module, get()) if get is not None else model


def _stacks(path: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> tuple[Stack, ...]:
    own = _stacked(module)
    if {"gate_up_proj", "down_proj"} <= own.keys():
        return _fused(module, (path, "gate_up_proj", own["gate_up_proj"]), (path, "down_proj", own["down_proj"]))
    for names in _SEPARATE:
        if {names["up"], names["down"]} <= own.keys():
            return tuple(
                Stack(path=path, name=name, dim=1, where={projection: slice(None)})
                for projection, name in names.items()
                if name in own
            )
    return _in_children(path, module, modules)


def _in_children(path: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> tuple[Stack, ...]:
    """JetMoE's, whose two stacks are modules; its attention has two as well, which are no feed-forward network."""
    into, out = modules.get(f"{path}.input_linear"), modules.get(f"{path}.output_linear")
    if into is None or out is None:
        return ()
    first, second = _stacked(into).get("weight"), _stacked(out).get("weight")
    if first is None or second is None or first.shape[1] != 2 * second.shape[2]:
        return ()
    return _fused(module, (f"{path}.input_linear", "weight", first), (f"{path}.output_linear", "weight", second))


def _fused(module: nn.Module, gate_up: tuple[str, str, Tensor], down: tuple[str, str, Tensor]) -> tuple[Stack, ...]:
    # (E, 2F, D) with (E, D, F), or (E, D, 2F) with (E, F, D): no width makes the two alike.
    dim = 1 if gate_up[2].shape[1] == 2 * down[2].shape[2] else 2
    return (
        Stack(path=gate_up[0], name=gate_up[1], dim=dim, where=halves(module, gate_up[2], dim)),
        Stack(path=down[0], name=down[1], dim=1, where={"down": slice(None)}),
    )


# The names of biases, by those of their weights.
_BIASES = {
    "gate_up_proj": "gate_up_proj_bias", "up_proj": "up_proj_bias", "down_proj": "down_proj_bias",
    "gate_EDF": "gate_bias_EF", "up_EDF": "up_bias_EF", "down_EFD": "down_bias_ED",
}  # fmt: skip


def _biases(stacks: tuple[Stack, ...], modules: dict[str, nn.Module]) -> Iterator[Stack]:
    for stack in stacks:
        name = _BIASES.get(stack.name)
        if name in weights_of(modules[stack.path]):
            yield replace(stack, name=name, dim=1)


def _linears(path: str, module: nn.Module) -> dict[tuple[int, str], str]:
    """The linear maps of experts that are modules of one kind, in a list or dictionary called ``experts``."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict) or path.rpartition(".")[2] != "experts":
        return {}
    maps = {
        key: {_MAPS[name]: name for name, part in child.named_children() if name in _MAPS and hasattr(part, "weight")}
        for key, child in module.named_children()
    }
    experts = [key for key, held in maps.items() if {"up", "down"} <= held.keys()]  # NLLB keeps dropout beside them
    if len(experts) < 2:
        return {}
    return {
        (expert, projection): f"{path}.{key}.{name}"
        for expert, key in enumerate(experts)
        for projection, name in maps[key].items()
    }


def _block(
    index: int,
    experts: str,
    stacks: tuple[Stack, ...],
    linears: dict[tuple[int, str], str],
    modules: dict[str, nn.Module],
) -> ExpertBlock:
    called = bool(linears) or {one.path for one in stacks} <= {experts}
    sparse = _sparse_around(experts, modules)
    if sparse is not None:
        path, home = sparse, f"{sparse}.moe"
    else:
        path = home = experts.rpartition(".")[0] if called else experts
    layer = _layer_of(path)
    held = {one for stack in stacks for one in stack.where} | {projection for _, projection in linears}
    numbers = [weights_of(modules[one.path])[one.name].shape[0] for one in stacks] or [1 + max(e for e, _ in linears)]
    return ExpertBlock(
        index=index,
        path=path,
        layer=layer,
        experts=experts if called else stacks[-1].path,
        # LongCat-Flash counts its identity experts in one stack and not in the other.
        num_experts=min(numbers),
        projections=tuple(one for one in PROJECTIONS if one in held),
        stacks=stacks,
        biases=tuple(_biases(stacks, modules)),
        linears=linears,
        routers=tuple(f"{home}.{name}" for name in ("gate", "router") if f"{home}.{name}" in modules),
        # Granite's stand beside the MoE block, the others' in it.
        shared=tuple(
            f"{place}.{child}"
            for place in dict.fromkeys((home, layer))
            for child, module in modules[place].named_children()
            if "shared" in child and any(True for _ in module.parameters())
        ),
        attention=tuple(_attention(layer, modules)),
    )


def _sparse_around(path: str, modules: dict[str, nn.Module]) -> str | None:
    """The path of our block around a module, if it stands in one."""
    while path:
        path = path.rpartition(".")[0]
        if isinstance(modules.get(path), SparseBlock):
            return path
    return None


def _layer_of(path: str) -> str:
    match = re.match(r"(.*?\.\d+)(?=\.|$)", path)
    return match[1] if match else path


def matrices(path: str, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Full names of the matrices under a path; a gate of one number for each token is none."""
    for inner in (one for one in modules if f"{one}.".startswith(f"{path}.")):
        for name, weight in modules[inner].named_parameters(recurse=False):
            if weight.ndim >= 2 and min(weight.shape[-2:]) > 1:
                yield f"{inner}.{name}"


def _attention(layer: str, modules: dict[str, nn.Module]) -> Iterator[str]:
    for path, module in modules.items():
        rest = path.removeprefix(f"{layer}.")
        # Norms are called post_attention_layernorm; JetMoE has a router in its attention.
        if rest == path or not re.search(r"(attn|attention)\.", rest, re.IGNORECASE) or "router" in rest:
            continue
        if isinstance(module, nn.Linear | Conv1D) and min(module.weight.shape) > 1:
            yield path
