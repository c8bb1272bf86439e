"""Where the MoE layers of a model stand and what their tensors are, in our own models and in every family."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic.convert.checkpoint.blueprint import Blueprint
from moesaic.convert.layout.forms import Form, form_of
from moesaic.convert.weights.stack import DenseFFN, ExpertStack
from moesaic.core.errors import ConfigError
from moesaic.hf.config import MODEL_TYPE
from moesaic.hf.spec import SparseSpec

# The names under which configurations keep how many experts there are, how many a token visits, and groups.
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOICES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "num_selected_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
GROUPS, GROUPS_KEPT = ("n_group", "num_expert_group"), ("topk_group",)


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedLayout:
    """The expert that every token visits.

    Attributes:
        names: its tensors, those of the gate included.
        token_gate: the tensor that gates it by token, if there is one.
        read: from tensors by their full names to the network, without the gate.
    """

    names: tuple[str, ...]
    token_gate: str | None
    path: str
    is_ours: bool

    def read(self, tensors: Mapping[str, Tensor]) -> DenseFFN:
        """The network; its weights are views."""
        if self.is_ours:
            gate = tensors.get(f"{self.path}.gate_DF")
            return DenseFFN(gate_DF=gate, up_DF=tensors[f"{self.path}.up_DF"], down_FD=tensors[f"{self.path}.down_FD"])
        gate = tensors.get(f"{self.path}.gate_proj.weight")
        return DenseFFN(
            gate_DF=None if gate is None else gate.T,
            up_DF=tensors[f"{self.path}.up_proj.weight"].T,
            down_FD=tensors[f"{self.path}.down_proj.weight"].T,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MoELayout:
    """One MoE layer of a model. All names are those of the model's ``state_dict``.

    Attributes:
        block: path of the module that holds router and experts.
        experts: path of the experts module.
        num_experts: routed experts.
        top_k: experts that a token visits; None where that is not one number.
        groups: equal groups that the experts are cut into; 1 if there are none.
        groups_kept: groups that a token may use.
        activation: of the experts, as the configuration calls it.
        form: how the experts' weights are kept.
        rows: tensors outside the experts module that have an expert dimension, the router's, and which dimensions those
            are; nearly always one.
        entangled: tensors whose shape depends on the number of experts in another way (a router's heads, groups or
            extra classes), so that no expert can be taken out by its index.
        shared: the expert that every token visits; None if there is none.
    """

    block: str
    experts: str
    num_experts: int
    top_k: int | None
    groups: int
    groups_kept: int
    activation: str | None
    form: Form
    rows: Mapping[str, tuple[int, ...]]
    entangled: tuple[str, ...]
    shared: SharedLayout | None

    @property
    def weights(self) -> tuple[str, ...]:
        """The experts' tensors."""
        return tuple(f"{self.experts}.{name}" for name in self.form.names)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor that changes with the number of experts: the experts' and the router's."""
        return (*self.weights, *self.rows)

    def read(self, tensors: Mapping[str, Tensor]) -> ExpertStack:
        """The experts, stacked; views where the form allows it. Other tensors may be among those given."""
        return self.form.read({name: tensors[f"{self.experts}.{name}"] for name in self.form.names})

    def write(self, stack: ExpertStack) -> dict[str, Tensor]:
        """The experts' tensors by name, for a stack of any number of experts."""
        return {f"{self.experts}.{name}": tensor for name, tensor in self.form.write(stack).items()}

    def written(self, num_experts: int) -> tuple[str, ...]:
        """The names that :meth:`write` would give for so many experts."""
        if not self.form.names[0].startswith("expert_"):
            return self.weights
        parts = [name.partition(".")[2] for name in self.form.names if name.startswith("expert_0.")]
        return tuple(f"{self.experts}.expert_{index}.{part}" for index in range(num_experts) for part in parts)


def moe_layouts(blueprint: Blueprint) -> dict[str, MoELayout]:
    """The MoE layers of a model by the path of their blocks, in depth order; empty for a dense model.

    Raises:
        ConfigError: if it cannot be told which tensors of a router have an expert dimension.
    """
    model = blueprint.model
    found = {path: form for path, module in model.named_modules() if (form := form_of(module)) is not None}
    if config_is_ours(model.config):
        # Experts of several kinds (MoE++) hold a stack of one kind within: that is not the layer's.
        found = {path: form for path, form in found.items() if path.endswith(".moe.experts")}
    if not found:
        return {}
    wide = _with_twice_as_many(blueprint)
    layouts = {}
    for experts, form in found.items():
        block = experts.rpartition(".")[0]
        around = block.removesuffix(".moe") if config_is_ours(model.config) else block
        mine = [name for name in wide if name.startswith(f"{block}.") and not name.startswith(f"{experts}.")]
        grown = {name: _grown(blueprint.tensors[name].shape, wide[name], form.num_experts) for name in mine}
        layouts[around] = replace(
            _numbers(model, block, form),
            block=around,
            experts=experts,
            rows={name: dims for name, dims in grown.items() if dims},
            entangled=tuple(name for name, dims in grown.items() if not dims),
        )
    return layouts


def config_is_ours(config: PreTrainedConfig) -> bool:
    """Whether a configuration is of a model that :func:`moesaic.sparsify` has made."""
    return config.model_type == MODEL_TYPE


def _numbers(model: PreTrainedModel, block: str, form: Form) -> MoELayout:
    module = model.get_submodule(block)
    config = model.config.get_text_config()
    router = getattr(module, "router", None) if config_is_ours(model.config) else None
    groups = getattr(router, "groups", None)
    if router is not None:
        top_k = getattr(router, "top_k", None)
        counts = (1, 1) if groups is None else (groups.num_groups, groups.groups_kept)
        activation = getattr(getattr(cast(Any, module).experts, "activation", None), "name", None)
    else:
        top_k = _top_k(module, config)
        counts = (_first(config, GROUPS) or 1, _first(config, GROUPS_KEPT) or 1)
        activation = _first(config, ("hidden_act", "hidden_activation", "mlp_hidden_act", "dense_act_fn"))
    return MoELayout(
        block=block,
        experts="",
        num_experts=form.num_experts,
        top_k=top_k,
        groups=counts[0],
        groups_kept=counts[1],
        activation=activation,
        form=form,
        rows={},
        entangled=(),
        shared=_shared(module, block),
    )


def _top_k(module: nn.Module, config: PreTrainedConfig) -> int | None:
    """As the block or its router says, which may differ by layer, or else as the configuration does."""
    for part in (module, *module.children()):
        value = getattr(part, "top_k", None)
        if isinstance(value, int):
            return value
    if config.model_type == "switch_transformers":
        return 1
    value = _first(config, CHOICES) or _first(getattr(config, "ffn_config", None), CHOICES)
    return value if isinstance(value, int) else None


def _first(config: Any, names: tuple[str, ...]) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)


def _shared(block: nn.Module, path: str) -> SharedLayout | None:
    for name in ("shared", "shared_expert", "shared_experts", "shared_mlp"):
        module = getattr(block, name, None)
        if not isinstance(module, nn.Module):
            continue
        home = f"{path}.{name}"
        names = tuple(f"{home}.{part}" for part, _ in module.named_parameters())
        is_ours = f"{home}.up_DF" in names
        gate = f"{home}.token_gate_D" if is_ours else f"{path}.shared_expert_gate.weight"
        has_gate = gate in names or isinstance(getattr(block, "shared_expert_gate", None), nn.Module)
        if has_gate and gate not in names:
            names = (*names, gate)
        return SharedLayout(names=names, token_gate=gate if has_gate else None, path=home, is_ours=is_ours)
    return None


def _with_twice_as_many(blueprint: Blueprint) -> dict[str, tuple[int, ...]]:
    """The tensors whose shape depends on the number of experts, as they are in a model built with twice as many."""
    config = copy.deepcopy(blueprint.model.config)
    _double(config)
    try:
        with torch.device("meta"):
            twice = type(blueprint.model)(config)
    except Exception as error:  # a family may refuse the number for reasons of its own
        raise ConfigError(
            f"Which tensors of {type(blueprint.model).__name__} belong to experts is told by building it with twice as "
            f"many, and that failed: {error}. Its layers cannot be converted."
        ) from error
    wide = {name: tuple(tensor.shape) for name, tensor in twice.state_dict().items()}
    return {
        name: wide[name]
        for name, info in blueprint.tensors.items()
        if len(wide.get(name, ())) == len(info.shape) and wide[name] != info.shape
    }


def _grown(shape: tuple[int, ...], wide: tuple[int, ...], num_experts: int) -> tuple[int, ...]:
    """The dimensions that count experts; none if another one depends on their number too."""
    changed = [dim for dim, size in enumerate(shape) if wide[dim] != size]
    counts = all(shape[dim] == num_experts and wide[dim] == 2 * num_experts for dim in changed)
    return tuple(changed) if counts else ()


def _double(config: PreTrainedConfig) -> None:
    """Twice as many experts everywhere."""
    if config_is_ours(config):
        spec = SparseSpec.from_dict(config.moesaic)
        layers = {
            path: replace(layer, options={**layer.options, "num_experts": 2 * layer.options["num_experts"]})
            for path, layer in spec.layers.items()
            if "num_experts" in layer.options
        }
        config.moesaic = replace(spec, layers={**spec.layers, **layers}).to_dict()
        return
    for one in configs(config):
        for name in EXPERT_COUNTS:
            value = vars(one).get(name)
            if isinstance(value, int):
                setattr(one, name, 2 * value)
            elif isinstance(value, list):
                setattr(one, name, [2 * each for each in value])


def configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those that it holds."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from configs(value)
