"""Find the feed-forward networks of a transformer by their structure, whatever their classes are called."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moesaic.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedForward:
    """A feed-forward network that a sparse layer can take the place of.

    Attributes:
        path: of the module, below the model that was searched.
        width: D, what it reads and writes.
        hidden: F, what it works in.
    """

    path: str
    width: int
    hidden: int


def find_feed_forwards(model: PreTrainedModel) -> list[FeedForward]:
    """The feed-forward network of each transformer block that has one, in depth order.

    A feed-forward network is a module of one input whose only weights are linear maps, one or two from D to F (or one
    to 2F) and one from F to D. A block is the nearest child of an ``nn.ModuleList`` around it that holds other linear
    maps too, the attention, or an LSTM. Encoder blocks come before decoder blocks, and indices count on.

    Raises:
        ConfigError: if there is none, or a block has several, as a model that is a mixture already has.
    """
    modules = dict(model.named_modules())
    found: dict[str, list[FeedForward]] = {}
    for path, module in modules.items():
        shape = _shape(module)
        if shape is None or any(_shape(child) for child in module.children()):
            continue
        block = _block_around(path, modules)
        if block is not None:
            found.setdefault(block, []).append(FeedForward(path=path, width=shape[0], hidden=shape[1]))
    if not found:
        _refuse_mixture({path: [] for path in _block_paths(modules)}, modules)
        raise ConfigError(
            f"No feed-forward network was found in {type(model).__name__}: what is needed is a module of its own that "
            "maps D to F and F back to D, inside a repeated block with attention. "
            f"The repeated blocks found are: {_blocks_in_words(modules)}. Use a model whose feed-forward networks are "
            "modules of their own, such as Llama, Qwen3, GPT-2, T5 or ViT."
        )
    _refuse_mixture(found, modules)
    ordered = [inside[0] for inside in found.values()]
    if model.config.is_encoder_decoder:
        encoder = next((path for path, module in modules.items() if module is model.get_encoder()), "")
        ordered.sort(key=lambda one: not one.path.startswith(encoder + "."))
    return ordered


def choose(found: list[FeedForward], layers: str | list[int]) -> list[FeedForward]:
    """The feed-forward networks that ``layers`` names.

    Args:
        found: all of them, in depth order.
        layers: "all"; "every-2", the second of each pair as in GShard and Switch; or indices into ``found``.
    Raises:
        ConfigError: if ``layers`` is something else, or names what is not there.
    """
    if layers == "all":
        return found
    if layers == "every-2" and len(found) > 1:
        return found[1::2]
    indices = layers if isinstance(layers, list | tuple | range) else ()
    in_range = all(isinstance(index, int) and 0 <= index < len(found) for index in indices)
    if not indices or not in_range or len(set(indices)) < len(indices):
        raise ConfigError(
            f"layers must be 'all', 'every-2' or a list of different indices in 0..{len(found) - 1}, got {layers!r}. "
            f"The model has {len(found)} feed-forward networks, the first is {found[0].path}."
        )
    return [found[index] for index in sorted(indices)]


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """D and F if the module looks like a feed-forward network."""
    maps = [_in_out(leaf) for leaf in _linear_leaves(module)]
    if not 2 <= len(maps) <= 3 or not _only_linear(module) or not _has_one_input(module):
        return None
    # A network is defined in the order in which it runs: the first map leads into it, never out.
    for index, (hidden, width) in list(enumerate(maps))[:0:-1]:
        others = maps[:index] + maps[index + 1 :]
        if all(other == (width, hidden) for other in others) or others == [(width, 2 * hidden)]:
            return width, hidden
    return None


def _linear_leaves(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.Linear | Conv1D):
        return []
    return [leaf for leaf in module.modules() if isinstance(leaf, nn.Linear | Conv1D)]


def _in_out(linear: nn.Module) -> tuple[int, int]:
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return cast(int, linear.nx), cast(int, linear.nf)


def _only_linear(module: nn.Module) -> bool:
    """No weight outside linear maps: with a norm of its own the module does more than feed forward."""
    return all(
        isinstance(part, nn.Linear | Conv1D) or not any(True for _ in part.parameters(recurse=False))
        for part in module.modules()
    )


def _has_one_input(module: nn.Module) -> bool:
    """Attention also takes a mask, positions or a cache; other modules take the residual and add it."""
    named = [
        parameter
        for parameter in inspect.signature(type(module).forward).parameters.values()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    return len(named) == 2 and not isinstance(module, nn.ModuleList)  # self and the input


def _block_around(path: str, modules: dict[str, nn.Module]) -> str | None:
    feed_forward = modules[path]
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        outer, parent = ".".join(parts[:end]), ".".join(parts[: end - 1])
        if isinstance(modules[parent], nn.ModuleList) and _mixes_positions(modules[outer], feed_forward):
            return outer
    return None


def _mixes_positions(block: nn.Module, feed_forward: nn.Module) -> bool:
    """Whether there is more in a block than its feed-forward network: attention, a state space, a recurrence."""
    has_other_maps = len(_linear_leaves(block)) > len(_linear_leaves(feed_forward))
    return has_other_maps or any(isinstance(part, nn.RNNBase) for part in block.modules())


def _block_paths(modules: dict[str, nn.Module]) -> list[str]:
    return [
        f"{path}.{index}"
        for path, module in modules.items()
        if isinstance(module, nn.ModuleList)
        for index in range(len(module))
    ]


def _refuse_mixture(found: dict[str, list[FeedForward]], modules: dict[str, nn.Module]) -> None:
    for block, inside in found.items():
        stacked = _stacked_weight(modules[block])
        if len(inside) > 1 or stacked:
            what = f"the stacked weight {stacked}" if stacked else ", ".join(one.path for one in inside)
            raise ConfigError(
                f"Each block must have one feed-forward network, but {block} has {what}: this model seems to be a "
                "mixture already. Start from its dense sibling."
            )


def _stacked_weight(block: nn.Module) -> str | None:
    """The name of a weight with three dimensions: experts, stacked."""
    for path, module in block.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and not isinstance(module, _ConvNd):
                return f"{path}.{name}"
    return None


def _blocks_in_words(modules: dict[str, nn.Module]) -> str:
    described = list(_described(modules))
    return "; ".join(described) if described else "none"


def _described(modules: dict[str, nn.Module]) -> Iterator[str]:
    for path, module in modules.items():
        if isinstance(module, nn.ModuleList) and len(module) and _linear_leaves(module[0]):
            kinds = Counter(type(block).__name__ for block in module)
            named = [f"{count} {kind}" for kind, count in kinds.items()]
            linear = [
                f"{name} {' -> '.join(map(str, _in_out(leaf)))}"
                for name, leaf in module[0].named_modules()
                if isinstance(leaf, nn.Linear | Conv1D)
            ]
            yield f"{path} ({', '.join(named)}, each with {', '.join(linear)})"
