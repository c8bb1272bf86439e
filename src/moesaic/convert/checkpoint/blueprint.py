"""What a configuration's model is made of, learnt by building it without memory."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic.core.errors import CheckpointError
from moesaic.hf.auto import join_auto_classes
from moesaic.hf.config import MODEL_TYPE

_HEADS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageClassification", "AutoModel")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Blueprint:
    """The tensors that a model holds under its configuration; the model is built on the meta device.

    Attributes:
        model: without memory.
        tensors: what its ``state_dict`` holds, by name; of tied weights one name only, that under which they are saved.
        tied: the other names of tied weights, with the one that is in ``tensors``.
    """

    model: PreTrainedModel
    tensors: Mapping[str, TensorInfo]
    tied: Mapping[str, str]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Blueprint:
        """Build the model that a configuration describes.

        Raises:
            CheckpointError: if transformers knows no class for it.
        """
        with torch.device("meta"):
            model = model_class(config)(copy.deepcopy(config))
        return cls.from_model(model)

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> Blueprint:
        """Describe a model that has been built."""
        state = model.state_dict(keep_vars=True)
        # transformers saves tied weights under the names that are not the keys here.
        targets = getattr(model, "all_tied_weights_keys", {})
        first: dict[int, str] = {}
        for name in sorted(state, key=lambda name: name in targets):
            first.setdefault(id(state[name]), name)
        tied = {name: first[id(tensor)] for name, tensor in state.items() if first[id(tensor)] != name}
        tensors = {
            name: TensorInfo(shape=tuple(tensor.shape), dtype=tensor.dtype)
            for name, tensor in state.items()
            if name not in tied and not _matches(name, getattr(model, "_keys_to_ignore_on_save", None))
        }
        return cls(model=model, tensors=tensors, tied=tied)

    @property
    def num_params(self) -> int:
        """Parameters of the model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def ignores(self, name: str) -> bool:
        """Whether the model's class passes over a tensor of that name, as it does for what it computes itself."""
        if _matches(name, self.model._keys_to_ignore_on_load_unexpected):
            return True
        return any(name == own for own, _ in self.model.named_buffers()) and name not in self.tensors

    def may_lack(self, name: str) -> bool:
        """Whether the model's class can do without a tensor of that name."""
        return _matches(name, self.model._keys_to_ignore_on_load_missing)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that ``architectures`` of a configuration names, or else the first of the Auto classes that knows it.

    Raises:
        CheckpointError: if there is none.
    """
    wanted = {name.removeprefix("Sparse") for name in getattr(config, "architectures", None) or ()}
    candidates: dict[str, type[PreTrainedModel]] = {}
    for auto_class, model in _known(config):
        if model.__name__.removeprefix("Sparse") in wanted:
            return model
        candidates.setdefault(auto_class, model)
    if not wanted:
        for head in _HEADS:
            if head in candidates:
                return candidates[head]
    import transformers

    for name in sorted(wanted):
        found = getattr(transformers, name, None)
        if config.model_type != MODEL_TYPE and isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise CheckpointError(
        f"No class of transformers is named by architectures={sorted(wanted) or None} of model_type "
        f"{config.model_type!r}. Update transformers, or convert a model that it has."
    )


def _known(config: PreTrainedConfig) -> Iterator[tuple[str, type[PreTrainedModel]]]:
    import transformers.models.auto.modeling_auto as auto

    if config.model_type == MODEL_TYPE:
        join_auto_classes(type(config))
    for name, auto_class in vars(auto).items():
        mapping: Any = getattr(auto_class, "_model_mapping", None)
        if mapping is not None and type(config) in mapping:
            known = mapping[type(config)]
            for model in known if isinstance(known, tuple | list) else (known,):
                yield name, model


def _matches(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def info_of(tensor: Tensor) -> TensorInfo:
    """Describe a tensor."""
    return TensorInfo(shape=tuple(tensor.shape), dtype=tensor.dtype)
