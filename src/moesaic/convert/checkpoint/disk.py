"""From the names and forms of tensors on disk to those in memory, and back, as transformers itself translates them.

A family may be saved with one tensor for each expert and be held with all of them stacked; conversions see the names
and forms in memory only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping

from moesaic.convert.checkpoint.blueprint import Blueprint, TensorInfo, info_of
from moesaic.core.errors import CheckpointError


@dataclass(kw_only=True, slots=True, eq=False)
class Group:
    """Tensors that are translated together: those on disk, those in memory, and how.

    Attributes:
        takes: names before.
        pattern_of: which of the converter's patterns each matches.
        key: transformers' name for the group.
        converter: None where the tensor stays as it is under the name ``key``.
    """

    key: str
    converter: Any
    takes: list[str] = field(default_factory=list)
    pattern_of: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, pattern: str | None) -> None:
        """Let one more tensor join."""
        self.takes.append(name)
        self.pattern_of[name] = pattern or name

    def run(self, tensors: Mapping[str, Tensor], blueprint: Blueprint) -> dict[str, Tensor]:
        """Translate."""
        if self.converter is None:
            (name,) = self.takes
            return {self.key: tensors[name]}
        converter = copy.deepcopy(self.converter)
        for name in self.takes:
            converter.add_tensor(self.key, name, self.pattern_of[name], tensors[name])
        made = converter.convert(self.key, model=blueprint.model, config=blueprint.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class FromDisk:
    """What tensors on disk become in memory.

    Args:
        blueprint: of the model that reads them.
        found: what is on disk.
    Attributes:
        tensors: what they give, by name in memory.
        group_of: where each of those comes from.
        dropped: what is on disk and the model does not read, with the reason.
    Raises:
        CheckpointError: if tensors of a group do not fit each other.
    """

    def __init__(self, blueprint: Blueprint, found: Mapping[str, TensorInfo]) -> None:
        self.blueprint = blueprint
        self.tensors: dict[str, TensorInfo] = {}
        self.group_of: dict[str, Group] = {}
        self.dropped: dict[str, str] = {}
        self._state = blueprint.model.state_dict()
        transforms = get_model_conversion_mapping(blueprint.model)
        self._renamings = [one for one in transforms if isinstance(one, loading.WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, loading.WeightConverter)]
        for group in self._grouped(found):
            self._describe(group, found)

    def _grouped(self, found: Mapping[str, TensorInfo]) -> Iterable[Group]:
        by_pattern = {pattern: one for one in self._converters for pattern in one.source_patterns}
        groups: dict[str, Group] = {}
        for name in sorted(found, key=loading.dot_natural_key):
            key, pattern = self._renamed(name)
            if pattern is None:
                yield from self._alone(name, key)
                continue
            group = groups.setdefault(key, Group(key=key, converter=by_pattern[pattern]))
            group.add(name, pattern)
        yield from groups.values()

    def _alone(self, name: str, key: str) -> Iterable[Group]:
        if key not in self._state and (self.blueprint.ignores(key) or self.blueprint.ignores(name)):
            self.dropped[name] = "the model's class does not read it"
            return
        group = Group(key=key, converter=None)
        group.add(name, None)
        yield group

    def _renamed(self, name: str) -> tuple[str, str | None]:
        prefix = self.blueprint.model.base_model_prefix
        key, pattern = loading.rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        if key not in self._state and name in self._state:
            key, pattern = loading.rename_source_key(name, [], [], prefix, self._state)
        return key, pattern

    def _describe(self, group: Group, found: Mapping[str, TensorInfo]) -> None:
        meta = {name: torch.empty(found[name].shape, dtype=found[name].dtype, device="meta") for name in group.takes}
        try:
            made = group.run(meta, self.blueprint)
        except Exception as error:  # transformers raises what it likes
            raise CheckpointError(
                f"The tensors for {group.key} on disk do not fit each other ({str(error).splitlines()[0]}); the first "
                f"is {group.takes[0]}, {found[group.takes[0]].shape}. Copy the folder again from where it was saved."
            ) from error
        for name, tensor in made.items():
            if name in self.tensors:
                raise CheckpointError(
                    f"Both {self.group_of[name].takes[0]} and {group.takes[0]} on disk would become {name}. "
                    "Remove the one that does not belong there."
                )
            self.tensors[name] = info_of(tensor)
            self.group_of[name] = group


class ToDisk:
    """What tensors in memory become on disk, group by group as they come.

    Args:
        blueprint: of the model that will read them.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        self.blueprint = blueprint
        transforms = get_model_conversion_mapping(blueprint.model, add_legacy=False)
        # As transformers does for models that were not loaded: whether a prefix was there is not known.
        kept = [one for one in transforms if not isinstance(one, loading.PrefixChange)]
        back = [one.reverse_transform() for one in reversed(kept)]
        self._renamings = [one for one in back if isinstance(one, loading.WeightRenaming)]
        self._converters = [one for one in back if isinstance(one, loading.WeightConverter)]
        by_pattern = {pattern: one for one in self._converters for pattern in one.source_patterns}
        groups: dict[str, Group] = {}
        self._group_of: dict[str, Group] = {}
        for name in sorted(blueprint.tensors, key=loading.dot_natural_key):
            key, pattern = _first_match(name, self._converters)
            if pattern is None:
                key, converter = _renamed(name, self._renamings), None
            else:
                converter = by_pattern[pattern]
            group = groups.setdefault(key, Group(key=key, converter=converter))
            group.add(name, pattern)
            self._group_of[name] = group
        self._waiting: dict[int, dict[str, Tensor]] = {}

    def add(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Take in a tensor and give what can be written now."""
        group = self._group_of[name]
        waiting = self._waiting.setdefault(id(group), {})
        waiting[name] = tensor
        if len(waiting) < len(group.takes):
            return {}
        made = group.run(self._waiting.pop(id(group)), self.blueprint)
        if group.converter is None:
            return made
        return {_renamed(name, self._renamings): tensor for name, tensor in made.items()}


def _first_match(name: str, converters: Iterable[Any]) -> tuple[str, str | None]:
    """The name of the group that the first converter that matches puts a tensor into, and the pattern that matched."""
    for converter in converters:
        key, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return key, pattern
    return name, None


def _renamed(name: str, renamings: Iterable[Any]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name
