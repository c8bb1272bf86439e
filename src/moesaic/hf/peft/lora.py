"""LoRA on chosen experts, projections and layers, as an ordinary PEFT model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from packaging.version import Version
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moesaic.core.errors import BackendError, ConfigError
from moesaic.hf.block import SparseBlock
from moesaic.hf.peft.blocks import (
    ExpertBlock,
    Stack,
    base_of,
    clean_name,
    expert_blocks,
    matrices,
    modules_of,
    weights_of,
)
from moesaic.hf.peft.choice import CHOICE, Choice, Experts, Layers, Projections, choose
from moesaic.hf.peft.limits import limit, limit_rank
from moesaic.hf.wrapped import is_wrapped
from moesaic.layer import MoELayer
from moesaic.soft import SoftMoE

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "default"

# The first version whose layout of adapters around stacks the tests have seen.
_LEAST_PEFT = "0.21.2"

# What LoraConfig calls what is said in other words here.
_OURS = frozenset({"r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "modules_to_save"})

# PEFT takes modules of these names for experts of older checkpoints in some families, and renames them as it loads.
_TAKEN = frozenset({"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"})


def lora(
    model: PreTrainedModel,
    *,
    rank: int | Mapping[int, Mapping[int, int]] = 8,
    alpha: float = 16.0,
    layers: Layers = "all",
    experts: Experts = "all",
    projections: Projections = "all",
    router: bool = False,
    shared: bool = False,
    attention: bool = False,
    dropout: float = 0.0,
    **options: Any,
) -> PeftModel:
    """Put low-rank adapters on chosen experts of a mixture, and freeze everything else.

    The result is an ordinary ``peft.PeftModel``: train it with ``transformers.Trainer`` or your own loop, save it with
    ``save_pretrained``, read it with ``PeftModel.from_pretrained(base, folder)``, merge it with ``merge_and_unload``.

    An expert that is not chosen keeps its weights to the bit: its matrices in the adapter are 0 and have gradients of
    0. That holds for an adapter that PEFT has loaded too. Where gate and up share a stack and only one is chosen, a
    gradient hook holds the other: to go on with such an adapter, call this with the same arguments on the base model,
    then ``load_adapter(folder, "default", is_trainable=True)``.

    Args:
        model: a mixture of transformers, or one that :func:`moesaic.sparsify` made.
        rank: R; or ``{layer: {expert: rank}}``, which chooses layers and experts as well.
        alpha: changes are scaled by ``alpha / rank``, where ranks differ by the largest of them.
        layers: "all", or indices of MoE layers in depth order; dense layers are not counted.
        experts: "all"; indices, in each layer; or ``{layer: [experts]}``, such as :func:`hot_experts` gives.
        projections: "all", or some of "gate", "up", "down".
        router: train the routers of these layers too, whole: they are small. The adapter has a copy of each.
        shared: adapt the experts of these layers that every token visits.
        attention: adapt the linear maps of the attention in these layers.
        dropout: of what enters an adapter; PEFT has it only for experts that are modules, not for stacks.
        **options: for ``peft.LoraConfig``, such as ``use_rslora=True``.
    Raises:
        BackendError: if PEFT is not installed, or is older than 0.21.2.
        ConfigError: if the model has no such experts, or an option cannot be.
    """
    peft = require_peft()
    require_untouched(model, "lora")
    blocks = expert_blocks(model)
    beside = {"router": router, "shared": shared, "attention": attention}
    choice = choose(blocks, layers=layers, experts=experts, projections=projections, rank=rank, **beside)
    largest = max(choice.rank.values()) if isinstance(rank, Mapping) else rank
    _check_numbers(choice, largest, alpha)
    _check_options(options)
    chosen = [blocks[layer] for layer in choice.experts]
    require_own_stacks(model, chosen)
    _require_called(model, chosen)

    routers = [path for block in chosen for path in block.routers] if choice.router else []
    frozen = [name for name, one in model.named_parameters() if not one.requires_grad]
    targets = _targets(model, chosen, choice, dropout)
    settings = {"r": largest, "lora_alpha": alpha, "lora_dropout": dropout, "modules_to_save": routers or None}
    config = peft.LoraConfig(**{**settings, **targets, "task_type": _task(model), **options})
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers something by a name that transformers 5.23 warns of.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        adapted = peft.get_peft_model(model, config, adapter_name=ADAPTER)
    _keep_frozen(adapted, routers, frozen)
    _limit(adapted, chosen, choice, largest)
    setattr(adapted, CHOICE, choice)
    return cast("PeftModel", adapted)


def _targets(model: nn.Module, blocks: Sequence[ExpertBlock], choice: Choice, dropout: float) -> dict[str, Any]:
    """What PEFT shall adapt, in its words."""
    parameters = [*_parameters(model, blocks, choice)]
    if dropout and parameters:
        raise ConfigError(
            f"dropout must be 0 where PEFT adapts a parameter, got {dropout} and {len(parameters)} parameters, the "
            f"first {parameters[0]}. Leave dropout out; a smaller rank regularises too."
        )
    # Left out, PEFT would add the family's attention to what was asked for.
    return {"target_modules": [*_modules(model, blocks, choice)], "target_parameters": parameters or None}


def require_peft() -> Any:
    """The PEFT library.

    Raises:
        BackendError: if it is not installed, or lays adapters of stacks out in a way that is not known here.
    """
    try:
        import peft
    except ImportError as error:
        raise BackendError("LoRA needs peft, which is not installed. Run: pip install 'moesaic[peft]'") from error
    if Version(peft.__version__) < Version(_LEAST_PEFT):
        raise BackendError(
            f"LoRA on experts needs peft {_LEAST_PEFT} or newer, got {peft.__version__}, in which adapters of stacked "
            "experts may lie otherwise. Run: pip install -U peft"
        )
    return peft


def require_untouched(model: nn.Module, caller: str) -> None:
    """Refuse a model whose experts are adapted or taken out of their stacks already.

    Raises:
        ConfigError: if they are.
    """
    for path, module in model.named_modules():
        if is_wrapped(module) or parametrize.is_parametrized(module):
            raise ConfigError(
                f"{caller} needs a model that is as it was loaded, got {type(model).__name__} with {path} changed "
                "already. Call merge_and_unload() where it has adapters, moesaic.hf.undo_train_only where its experts "
                "train, and name everything that shall train in one call."
            )


def require_own_stacks(model: nn.Module, blocks: Sequence[ExpertBlock]) -> None:
    """Refuse experts that two layers share, whose changes would be added twice.

    Raises:
        ConfigError: if two of the blocks have one stack.
    """
    modules, seen = modules_of(model), dict[int, str]()
    for stack in (one for block in blocks for one in block.stacks):
        weight = weights_of(modules[stack.path])[stack.name]
        if id(weight) in seen:
            raise ConfigError(
                f"Each layer must have experts of its own, but {stack.full_name} is the same tensor as "
                f"{seen[id(weight)]}. Name the layers of one of the two."
            )
        seen[id(weight)] = stack.full_name


def _check_numbers(choice: Choice, largest: int, alpha: float) -> None:
    smallest = min(choice.rank.values(), default=largest)
    if smallest < 1:
        raise ConfigError(f"rank must be at least 1, got {smallest}. Leave out experts that shall not train.")
    if alpha <= 0:
        raise ConfigError(f"alpha must be positive, got {alpha}. Twice the rank is usual.")


def _check_options(options: Mapping[str, Any]) -> None:
    taken = sorted((_OURS | {"rank_pattern", "alpha_pattern"}) & options.keys())
    if taken:
        raise ConfigError(
            f"{', '.join(taken)} of LoraConfig cannot be given beside what lora makes of its own arguments. Use rank, "
            "alpha, dropout, layers, experts, projections, router, shared and attention."
        )


def _require_called(model: nn.Module, blocks: Sequence[ExpertBlock]) -> None:
    """PEFT adapts what a module does when it is called; a layer that reads its weights would not see the change."""
    modules = modules_of(model)
    for block in blocks:
        home = modules[block.path]
        if isinstance(home, SparseBlock) and not isinstance(home.moe, MoELayer | SoftMoE):
            raise ConfigError(
                f"PEFT can adapt experts that their layer calls, but {type(home.moe).__name__} at {block.path} reads "
                "their weights to merge them. Train them whole: moesaic.hf.train_only."
            )


def _parameters(model: nn.Module, blocks: Sequence[ExpertBlock], choice: Choice) -> Iterator[str]:
    """Full names of what PEFT has to adapt as parameters."""
    modules = modules_of(model)
    for block in blocks:
        yield from (stack.full_name for stack in _chosen_stacks(block, choice))
        for path in block.shared if choice.shared else ():
            yield from matrices(path, modules)
    for path in dict.fromkeys(path for block in blocks for path in block.attention):
        if choice.attention and _as_parameter(model, path):
            yield f"{path}.weight"


def _modules(model: nn.Module, blocks: Sequence[ExpertBlock], choice: Choice) -> Iterator[str]:
    """Paths of what PEFT can adapt as linear maps."""
    for block in blocks:
        for expert in choice.experts[block.index]:
            for projection in choice.projections:
                if (expert, projection) in block.linears:
                    yield block.linears[expert, projection]
    for path in dict.fromkeys(path for block in blocks for path in block.attention):
        if choice.attention and not _as_parameter(model, path):
            yield path


def _as_parameter(model: nn.Module, path: str) -> bool:
    # A Conv1D makes PEFT change the whole adapter's settings.
    return path.rpartition(".")[2] in _TAKEN or isinstance(model.get_submodule(path), Conv1D)


def _chosen_stacks(block: ExpertBlock, choice: Choice) -> Iterator[Stack]:
    return (stack for stack in block.stacks if set(stack.where) & set(choice.projections))


def _task(model: nn.Module) -> str | None:
    return "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None


def _keep_frozen(adapted: nn.Module, routers: Sequence[str], frozen: Sequence[str]) -> None:
    """What was frozen in a router stays so in the copy that trains."""
    modules = modules_of(adapted)
    for path in routers:
        for name, parameter in modules[path].named_parameters():
            if f"{path}.{name}" in frozen:
                parameter.requires_grad_(False)


def _limit(adapted: nn.Module, blocks: Sequence[ExpertBlock], choice: Choice, largest: int) -> None:
    found = wrappers(adapted)
    for block in blocks:
        experts = choice.experts[block.index]
        ranks = {expert: choice.rank.get((block.index, expert), largest) for expert in experts}
        for stack in _chosen_stacks(block, choice):
            limit(found[stack.full_name], stack, ranks, choice.projections, ADAPTER)
        for (expert, projection), path in block.linears.items():
            if expert in experts and projection in choice.projections:
                limit_rank(found[path], ranks[expert], ADAPTER)


def wrappers(adapted: nn.Module) -> dict[str, Any]:
    """PEFT's layers by the full name of the parameter that each adapts, or by the path of its linear map."""
    if base_of(adapted) is adapted:
        return {}
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    found: dict[str, Any] = {}
    for path, module in base_of(adapted).named_modules():
        clean = clean_name(path)
        if clean is not None and isinstance(module, LoraLayer):
            found[f"{clean}.{module.parameter_name}" if isinstance(module, ParamWrapper) else clean] = module
    return found
