"""Configurations of sparse models: a subclass of the dense model's, made when it is needed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

from transformers import PreTrainedConfig

from moesaic.core.errors import ConfigError

MODEL_TYPE = "moesaic"
"""What ``config.json`` says in ``model_type``; ``base_model_type`` there names the dense model."""


_Maker = TypeVar("_Maker", bound=Callable[..., Any])


def made_once(maker: _Maker) -> _Maker:
    """``functools.cache`` for functions of classes, which mypy takes for unhashable."""
    return cast(_Maker, cache(maker))


@made_once
def sparse_config_class(dense: type[PreTrainedConfig]) -> type[Any]:
    """The configuration class of sparse models whose dense sibling has ``dense``.

    Beside the dense model's fields, its objects have ``base_model_type`` and ``moesaic``, the dictionary that
    :class:`~moesaic.hf.spec.SparseSpec` reads.
    """

    def reduce(self: PreTrainedConfig, _protocol: int) -> tuple[Any, ...]:
        return _new_config, (dense,), self.__dict__

    namespace = {
        "__module__": __name__,
        "__doc__": f"{dense.__name__}, and where which MoE layers stand.",
        "__reduce_ex__": reduce,
        "model_type": MODEL_TYPE,
        "dense_class": dense,
    }
    return type(f"Sparse{dense.__name__}", (dense,), namespace)


def sparse_config(dense: PreTrainedConfig, spec: dict[str, Any]) -> PreTrainedConfig:
    """A copy of a dense model's configuration that also tells its MoE layers.

    Raises:
        ConfigError: if transformers could not find the dense class again by its name.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if dense.model_type not in CONFIG_MAPPING or CONFIG_MAPPING[dense.model_type] is not type(dense):
        raise ConfigError(
            f"The model's class must be one that transformers knows by its model_type, got {type(dense).__name__} "
            f"with model_type {dense.model_type!r}. Register it with AutoConfig.register first."
        )
    config = copy.deepcopy(dense)
    config.__class__ = sparse_config_class(type(dense))
    # One that was read from a folder carries the dense model's name besides that of its class.
    config.__dict__.pop("model_type", None)
    config.base_model_type = dense.model_type
    config.moesaic = spec
    return config


def _new_config(dense: type[PreTrainedConfig]) -> PreTrainedConfig:
    config_class: type[PreTrainedConfig] = sparse_config_class(dense)
    return config_class.__new__(config_class)
