"""The dense model that a mixture becomes when its experts are one network: which configuration that is."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedConfig

from moesaic.convert.checkpoint.blueprint import Blueprint, model_class
from moesaic.convert.checkpoint.source import Source
from moesaic.convert.layout.dense import Network, networks
from moesaic.convert.layout.layouts import MoELayout, config_is_ours, configs
from moesaic.core.errors import ConfigError

SIBLINGS: Mapping[str, str] = {
    "ernie4_5_moe": "ernie4_5",
    "flex_olmo": "olmo2",
    "granitemoe": "granite",
    "mixtral": "mistral",
    "qwen2_moe": "qwen2",
    "qwen3_moe": "qwen3",
    **{
        family: family
        for family in (
            *("afmoe", "bailing_hybrid", "deepseek_ocr2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1"),
            *("exaone_moe", "flint", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hy_v3", "hy_v4"),
            *("kimi_k25", "kimi_linear", "lfm2_moe", "mellum", "mimo_v2_flash", "mistral4"),
            *("mistral_large4", "qwen3_next", "qwen3_vl_moe"),
        )
    },
}
"""The dense family with the same blocks but for the feed-forward network; itself where every layer may be dense.

Each was tried: experts that are all the same give the same logits as the dense model.
"""

_HIDDEN = ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "ffn_hidden_size")
_HEAD = re.compile(r"(For[A-Z]\w*|Model)$")


def dense_config(source: Source) -> PreTrainedConfig:
    """The configuration of a mixture's dense sibling.

    For our models that of the model that they were made from. For others a family that differs in nothing else, or the
    family itself with no MoE layers where it can be had like that (DeepSeek, GLM-4, ...).

    Raises:
        ConfigError: if there is none.
    """
    config = source.config
    if config_is_ours(config):
        return _ours(config)
    if config.model_type not in SIBLINGS:
        raise ConfigError(
            f"A model of type {config.model_type} has no dense sibling with the same attention that is known. "
            f"Families that have one: {', '.join(SIBLINGS)}; and models made with moesaic.sparsify or upcycle."
        )
    sibling = SIBLINGS[config.model_type]
    dense = _all_dense(config) if sibling == config.model_type else _other(config, sibling)
    dense.architectures = [_class_name(type(source.blueprint.model).__name__, dense)]
    return dense


def stacks(layouts: Mapping[str, MoELayout], found: Sequence[Network]) -> list[Network]:
    """The networks that stand in the same stacks of layers as the MoE layers, not those of another modality."""
    mine = {_stack(layout.block) for layout in layouts.values()}
    return [network for network in found if _stack(network.prefix) in mine]


def with_hidden(config: PreTrainedConfig, hidden: int, prefixes: Collection[str]) -> PreTrainedConfig:
    """A copy of a dense model's configuration whose feed-forward networks have so many neurons.

    Args:
        config: of the dense model.
        hidden: neurons.
        prefixes: names of the networks that are meant.
    Raises:
        ConfigError: if it is not known where the configuration keeps that.
    """

    def fits(candidate: PreTrainedConfig) -> bool:
        found = networks(Blueprint.of(candidate).model)
        return all(one.hidden == hidden for one in found if one.prefix in prefixes)

    if fits(config):
        return config
    for name in _HIDDEN:
        for index, part in enumerate(configs(config)):
            if name in vars(part):
                changed = copy.deepcopy(config)
                setattr(list(configs(changed))[index], name, hidden)
                if fits(changed):
                    return changed
    raise ConfigError(
        f"Where a model of type {config.model_type} keeps the size of its feed-forward networks is not known: tried "
        f"{', '.join(_HIDDEN)}. Keep the size by leaving hidden out."
    )


def network_of(layout: MoELayout, found: list[Network]) -> Network:
    """The dense network that stands where a MoE layer stood: in the same transformer block.

    Raises:
        ConfigError: if there is none.
    """
    around = layout.block.rpartition(".")[0]
    for network in found:
        if network.prefix == layout.block or network.prefix.rpartition(".")[0] == around:
            return network
    raise ConfigError(f"The dense model has no feed-forward network at {layout.block}. Its layers do not correspond.")


def _ours(config: PreTrainedConfig) -> PreTrainedConfig:
    dense = copy.deepcopy(config)
    dense.__class__ = cast(Any, config).dense_class
    for name in ("base_model_type", "moesaic"):
        delattr(dense, name)
    # What was read from a folder says again what its class says.
    vars(dense).pop("model_type", None)
    dense.architectures = [name.removeprefix("Sparse") for name in config.architectures or ()] or None
    return dense


def _other(config: PreTrainedConfig, sibling: str) -> PreTrainedConfig:
    """The configuration of another family, with all values that it knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if sibling not in CONFIG_MAPPING:
        raise ConfigError(
            f"The dense sibling of {config.model_type} is {sibling}, which this transformers lacks. "
            "Update transformers."
        )
    kind = CONFIG_MAPPING[sibling]
    has = kind().to_dict()
    values = {name: value for name, value in config.to_dict().items() if name in has and name != "model_type"}
    if "head_dim" in has and values.get("head_dim") is None:
        values["head_dim"] = config.hidden_size // config.num_attention_heads
    return kind(**values)


def _all_dense(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same family's configuration without a MoE layer."""
    dense = copy.deepcopy(config)
    text = dense.get_text_config()
    layers = text.num_hidden_layers
    switches: dict[str, Any] = {
        "first_k_dense_replace": layers,
        "num_dense_layers": layers,
        "mlp_only_layers": list(range(layers)),
        "mlp_layer_types": ["dense"] * layers,
    }
    for name, value in switches.items():
        if name in vars(text):
            setattr(text, name, value)
    return dense


def _stack(path: str) -> str:
    """The list of layers that a module stands in: its path up to the first number."""
    parts = path.split(".")
    return ".".join(parts[: next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))])


def _class_name(mixture: str, config: PreTrainedConfig) -> str:
    """The dense family's class with the same head."""
    bare = copy.deepcopy(config)
    bare.architectures = None
    first = model_class(bare).__name__
    head, other = _HEAD.search(mixture), _HEAD.search(first)
    return first if head is None or other is None else first[: other.start()] + head.group()
