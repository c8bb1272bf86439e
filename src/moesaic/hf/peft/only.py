"""Train the weights of chosen experts themselves, and nothing else of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from moesaic.core.errors import ConfigError
from moesaic.hf.peft.blocks import ExpertBlock, Stack, expert_blocks, find_blocks, modules_of, parameters_of
from moesaic.hf.peft.choice import CHOICE, Choice, Experts, Layers, Projections, choose
from moesaic.hf.peft.lora import require_own_stacks, require_untouched

Model = TypeVar("Model", bound=PreTrainedModel)

_TRAINED_BEFORE = "_moesaic_trained_before"
_OPEN = "_moesaic_open_caches"
_HANDLES = "_moesaic_handles"


class OnlyChosen(nn.Module):
    """A parametrization in which chosen experts of a stack are a parameter, and the stack itself is frozen.

    Args:
        weight: the stack.
        experts: which of it train.
        dim: the dimension along which its projections lie.
        places: which places along it train.
    """

    def __init__(self, weight: Tensor, experts: Sequence[int], dim: int, places: Sequence[int]) -> None:
        super().__init__()
        self.dim = dim
        self.size = weight.shape[dim]
        self.register_buffer("experts", torch.tensor(experts, device=weight.device), persistent=False)
        self.register_buffer("places", torch.tensor(places, device=weight.device), persistent=False)
        self.chosen = nn.Parameter(self.taken(weight.detach()))

    experts: Tensor
    places: Tensor

    def taken(self, stack: Tensor) -> Tensor:
        """What of a stack trains."""
        return stack.index_select(0, self.experts).index_select(self.dim, self.places)

    def forward(self, stack: Tensor) -> Tensor:
        """The stack with what trains in its place."""
        return stack.index_copy(0, self.experts, self._experts_of(stack))

    @torch.no_grad()
    def put_back(self, stack: Tensor) -> Tensor:
        """Write what has trained into the stack, in whose forward that changes nothing."""
        stack.data.index_copy_(0, self.experts, self._experts_of(stack))
        return stack

    def _experts_of(self, stack: Tensor) -> Tensor:
        """The chosen experts, whole."""
        if len(self.places) == self.size:
            return self.chosen
        return stack.index_select(0, self.experts).index_copy(self.dim, self.places, self.chosen)

    def placed(self, chosen: Tensor, expert: int) -> Tensor:
        """One expert's part of ``chosen`` in a matrix of its size in the stack, 0 elsewhere."""
        shape = list(chosen.shape[1:])
        shape[self.dim - 1] = self.size
        placed = chosen.new_zeros(shape)
        experts = self.experts.tolist()
        if expert not in experts:
            return placed
        return placed.index_copy(self.dim - 1, self.places, chosen[experts.index(expert)])


def train_only(
    model: Model,
    *,
    layers: Layers = "all",
    experts: Experts = "all",
    projections: Projections = "all",
    router: bool = False,
    shared: bool = False,
    attention: bool = False,
) -> Model:
    """Freeze everything of a mixture but the weights of chosen experts, in place.

    Within a stack, the chosen experts become a parameter of their own and the rest is frozen, so that no optimizer
    sees the others: weight decay and momentum leave them to the bit, and the optimizer's state is as small as what
    trains. ``save_pretrained`` and ``state_dict`` go on to have whole stacks under their usual names.
    :func:`undo_train_only` puts the model back as it was, with the weights that were trained.

    Args:
        model: a mixture of transformers, or one that :func:`moesaic.sparsify` made.
        layers: "all", or indices of MoE layers in depth order; dense layers are not counted.
        experts: "all"; indices, in each layer; or ``{layer: [experts]}``, such as :func:`hot_experts` gives.
        projections: "all", or some of "gate", "up", "down", with their biases.
        router: train the routers of these layers too.
        shared: train the experts of these layers that every token visits.
        attention: train the linear maps of the attention in these layers.
    Returns:
        The same model.
    Raises:
        ConfigError: if the model has no such experts, or is trained in this way or with adapters already.

    Source: Wang et al. 2024, "Let the Expert Stick to His Last: Expert-Specialized Fine-Tuning for Sparse
    Architectural Large Language Models".
    """
    require_untouched(model, "train_only")
    blocks = expert_blocks(model)
    choice = choose(
        blocks,
        layers=layers,
        experts=experts,
        projections=projections,
        router=router,
        shared=shared,
        attention=attention,
    )
    chosen = [blocks[layer] for layer in choice.experts]
    require_own_stacks(model, chosen)

    trained_before = frozenset(name for name, one in model.named_parameters() if one.requires_grad)
    model.requires_grad_(False)
    modules = modules_of(model)
    for block in chosen:
        for path in _whole_modules(block, choice):
            for name, parameter in modules[path].named_parameters():
                parameter.requires_grad_(f"{path}.{name}" in trained_before)
        for stack in (*block.stacks, *block.biases):
            if set(stack.where) & set(choice.projections):
                _take_out(modules[stack.path], stack, choice.experts[block.index], choice.projections)
    setattr(model, CHOICE, choice)
    setattr(model, _TRAINED_BEFORE, trained_before)
    return model


def undo_train_only(model: Model) -> Model:
    """Undo :func:`train_only`: trained experts go back into their stacks, and what trained before trains again.

    Raises:
        ConfigError: if the model was not made so.
    """
    trained_before = getattr(model, _TRAINED_BEFORE, None)
    if trained_before is None:
        raise ConfigError(
            "undo_train_only needs a model on which moesaic.hf.train_only was called, got "
            f"{type(model).__name__} as it was loaded. There is nothing to undo."
        )
    for module in list(model.modules()):
        if not hasattr(module, _HANDLES):
            continue
        for name, one in list(cast(Any, module).parametrizations.items()):
            one[0].put_back(one.original)
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        for handle in getattr(module, _HANDLES):
            handle.remove()
        delattr(module, _HANDLES)
        delattr(module, _OPEN)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained_before)
    delattr(model, CHOICE)
    delattr(model, _TRAINED_BEFORE)
    return model


def freeze_routers(model: Model) -> Model:
    """Freeze every router of a mixture, in place; what else trains goes on to train.

    Selection biases that a controller moves are no parameters: leave the controllers out to keep those too.

    Raises:
        ConfigError: if the model has no routers.
    """
    paths = {path for block in find_blocks(model) for path in block.routers}
    # Also those beside experts that cannot be chosen, as in DBRX, and in JetMoE's attention.
    paths |= {path for path in modules_of(model) if path.rpartition(".")[2].startswith("router")}
    found = [one for name, one in parameters_of(model) if any(name.startswith(f"{path}.") for path in paths)]
    if not found:
        raise ConfigError(
            f"freeze_routers needs routers with parameters, and {type(model).__name__} has none. "
            "Freeze what you mean with requires_grad_(False)."
        )
    for parameter in found:
        parameter.requires_grad_(False)
    return model


def _whole_modules(block: ExpertBlock, choice: Choice) -> list[str]:
    """Paths of what trains with all its parameters."""
    paths = [
        path
        for (expert, projection), path in block.linears.items()
        if expert in choice.experts[block.index] and projection in choice.projections
    ]
    paths += block.routers if choice.router else ()
    paths += block.shared if choice.shared else ()
    return paths + list(block.attention if choice.attention else ())


def _take_out(module: nn.Module, stack: Stack, experts: Sequence[int], projections: Sequence[str]) -> None:
    weight = cast(nn.Parameter, getattr(module, stack.name))
    every = torch.arange(weight.shape[stack.dim])
    places = torch.cat([every[stack.where[one]] for one in projections if one in stack.where]).sort().values
    if len(experts) == weight.shape[0] and len(places) == len(every):
        weight.requires_grad_(True)
        return
    chosen = OnlyChosen(weight, experts, stack.dim, places.tolist())
    parametrize.register_parametrization(module, stack.name, chosen)
    if not hasattr(module, _HANDLES):
        setattr(module, _OPEN, [])
        handles = (
            module.register_forward_pre_hook(_open_cache),
            module.register_forward_hook(_close_cache, always_call=True),
            module.register_state_dict_post_hook(_whole_names),  # type: ignore[no-untyped-call]
            module.register_load_state_dict_pre_hook(_split_names),  # type: ignore[no-untyped-call]
        )
        setattr(module, _HANDLES, handles)


# Experts may read their stack once for each expert: it is put together once for each call.


def _open_cache(module: nn.Module, _args: Any) -> None:
    context = parametrize.cached()
    context.__enter__()
    getattr(module, _OPEN).append(context)


def _close_cache(module: nn.Module, _args: Any, _output: Any) -> None:
    getattr(module, _OPEN).pop().__exit__(None, None, None)


def _keys(prefix: str, name: str) -> tuple[str, str]:
    start = f"{prefix}parametrizations.{name}"
    return f"{start}.original", f"{start}.0.chosen"


def _whole_names(module: Any, state_dict: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    for name, one in module.parametrizations.items():
        stack, chosen = _keys(prefix, name)
        state_dict[f"{prefix}{name}"] = one[0].put_back(state_dict.pop(stack))
        del state_dict[chosen]


def _split_names(module: Any, state_dict: dict[str, Tensor], prefix: str, *_rest: Any) -> None:
    for name, one in module.parametrizations.items():
        whole = state_dict.pop(f"{prefix}{name}", None)
        if whole is not None:
            stack, chosen = _keys(prefix, name)
            state_dict[stack] = whole
            state_dict[chosen] = one[0].taken(whole)
