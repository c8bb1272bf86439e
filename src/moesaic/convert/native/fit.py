"""Find the family that computes what a sparse model of ours computes, or say what has no home."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from moesaic.convert.checkpoint.blueprint import Blueprint
from moesaic.convert.checkpoint.source import Source
from moesaic.convert.layout.layouts import moe_layouts
from moesaic.convert.native.facts import LayerFacts
from moesaic.convert.native.homes import HOMES, UNREACHABLE, Home, head_dim
from moesaic.convert.native.maths import ACTIVATIONS
from moesaic.convert.native.moving import beside_blocks
from moesaic.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fit:
    """A home with a model's numbers filled in.

    Attributes:
        home: the family.
        config: of the native model.
        target: the native model's tensors.
        stretches: what the family has and the model lacks, and how that is made to change nothing.
    """

    home: Home
    config: PreTrainedConfig
    target: Blueprint
    stretches: tuple[str, ...]


def choose(source: Source, facts: LayerFacts, family: str) -> Fit:
    """The first home that fits without a stretch, or else the first that fits.

    Args:
        source: a sparse model of ours.
        facts: of its MoE layers.
        family: the one to fit, or "auto".
    Raises:
        ConfigError: naming what has no home.
    """
    if family in UNREACHABLE:
        raise ConfigError(f"No sparse model can be exported to {family}: {UNREACHABLE[family]}. Use family='auto'.")
    names = [home.family for home in HOMES]
    if family != "auto" and family not in names:
        raise ConfigError(f"family must be 'auto' or one of {', '.join(names)}, got {family!r}. Use family='auto'.")
    fits: list[Fit] = []
    faults: dict[str, list[str]] = {}
    for home in HOMES:
        if family not in ("auto", home.family):
            continue
        found = _fit(source, facts, home)
        if isinstance(found, Fit):
            fits.append(found)
        else:
            faults[home.family] = found
    if fits:
        return min(fits, key=lambda fit: bool(fit.stretches))
    raise ConfigError(_no_home(source, faults))


def _no_home(source: Source, faults: Mapping[str, list[str]]) -> str:
    """Say what each family lacks; of those that have another attention, only that."""
    base = source.config.base_model_type
    near = {family: parts for family, parts in faults.items() if parts != [_attention(base)]}
    told = "; ".join(f"{family} has no place for {', '.join(parts)}" for family, parts in (near or faults).items())
    others = f" Other families have another attention than {base}." if near and near != faults else ""
    return (
        f"No family of transformers computes the same as this {base} with recipe {source.config.moesaic['recipe']}: "
        f"{told}.{others} Serve it with transformers and Moesaic."
    )


def _attention(base: str) -> str:
    return f"the attention of {base}"


def _fit(source: Source, facts: LayerFacts, home: Home) -> Fit | list[str]:
    """A home with this model's numbers, or the parts that have no place in it."""
    dense = source.config
    if dense.base_model_type not in home.backbones:
        return [_attention(dense.base_model_type)]
    adapted = home.backbones[dense.base_model_type](dense)
    parts = [adapted] if isinstance(adapted, str) else []
    parts += home.maths.missing(facts)
    places = _places(dense)
    placed = home.place(places, dense)
    if placed is None:
        parts.append(f"dense layers between its MoE layers ({_told(places)})")
    if parts or isinstance(adapted, str) or placed is None:
        return parts
    config = _config(dense, home, {**adapted, **home.numbers(facts), **placed}, facts)
    if isinstance(config, str):
        return [config]
    target = Blueprint.of(config)
    parts = _structure(source, home, target)
    if parts:
        return parts
    return Fit(home=home, config=config, target=target, stretches=tuple(home.maths.stretches(facts)))


def _places(dense: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Indices of the MoE layers, by stack: that of the encoder and of the decoder, or the only one."""
    places: dict[str, list[int]] = {}
    for path in dense.moesaic["layers"]:
        index = re.search(r"\.(\d+)\.", path)
        stack = path.partition(".")[0] if dense.is_encoder_decoder else ""
        places.setdefault(stack, []).append(int(index[1]) if index else 0)
    return {stack: tuple(indices) for stack, indices in places.items()}


def _told(places: Mapping[str, tuple[int, ...]]) -> str:
    return "; ".join(f"{stack} {', '.join(map(str, indices))}".strip() for stack, indices in places.items())


def _config(
    dense: PreTrainedConfig, home: Home, values: Mapping[str, Any], facts: LayerFacts
) -> PreTrainedConfig | str:
    """The native configuration: what both call the same, and what the home says; or what has no place in it."""
    from transformers import CONFIG_MAPPING

    native = CONFIG_MAPPING[home.family]
    known = {field.name for field in dataclasses.fields(native)}
    if "head_dim" not in known | set(values) and head_dim(dense) * dense.num_attention_heads != dense.hidden_size:
        return f"attention heads of width {head_dim(dense)}"
    activation, dense_act = ACTIVATIONS[facts.activation], _activation_of(dense)
    # One name is for dense networks and experts alike.
    if _has_dense_layers(dense) and dense_act is not None and dense_act not in (activation, facts.activation):
        return f"dense layers with {dense_act} beside experts with {facts.activation}"
    given = copy.deepcopy({name: value for name, value in dense.to_dict().items() if name in known})
    given |= {name: activation for name in ("hidden_act", "dense_act_fn") if name in known}
    extra = {"head_dim", "topk_method", "partial_rotary_factor", *native.attribute_map}
    config: PreTrainedConfig = native(**given | {name: values[name] for name in values if name in known | extra})
    config.dtype = dense.dtype
    config.architectures = [_class_name(dense, config)]
    return config


def _activation_of(dense: PreTrainedConfig) -> str | None:
    return getattr(dense, "hidden_act", None) or getattr(dense, "dense_act_fn", None)


def _has_dense_layers(dense: PreTrainedConfig) -> bool:
    count = dense.num_hidden_layers + (dense.num_decoder_layers if dense.is_encoder_decoder else 0)
    return len(dense.moesaic["layers"]) < int(count)


def _class_name(dense: Any, native: PreTrainedConfig) -> str:
    """The native class that stands under the same Auto class as the sparse one.

    Raises:
        ConfigError: if the family has no such head.
    """
    import transformers.models.auto.modeling_auto as auto

    wanted = [name.removeprefix("Sparse") for name in dense.architectures]
    dense_class = type(dense).dense_class
    for auto_class in vars(auto).values():
        mapping = getattr(auto_class, "_model_mapping", None)
        if mapping is None or dense_class not in mapping or type(native) not in mapping:
            continue
        if mapping[dense_class].__name__ in wanted:
            return str(mapping[type(native)].__name__)
    raise ConfigError(
        f"{native.model_type} has no class with the head of {wanted[0]}. Export the language model, or serve it with "
        "transformers and Moesaic."
    )


def _structure(source: Source, home: Home, target: Blueprint) -> list[str]:
    """Tensors outside the MoE layers that have no counterpart of their shape."""
    blocks, native = list(moe_layouts(source.blueprint)), list(moe_layouts(target))
    if native != [home.renamed_block(block) for block in blocks]:
        return [f"MoE layers at these places ({_told(_places(source.config))})"]
    inside = tuple(f"{block}." for block in blocks)
    outside = {home.renamed(name): info.shape for name, info in source.names.items() if not name.startswith(inside)}
    theirs = (*(f"{block}." for block in native), *beside_blocks(target))
    wanted = {name: info.shape for name, info in target.tensors.items() if not name.startswith(theirs)}
    left = sorted(set(outside) - set(wanted))
    lacking = sorted(name for name in set(wanted) - set(outside) if not target.may_lack(name))
    wrong = sorted(name for name in set(wanted) & set(outside) if wanted[name] != outside[name])
    return [
        *(f"{name}" for name in left[:1]),
        *(f"a model without {name}" for name in lacking[:1]),
        *(f"{name} of shape {outside[name]}, its own being {wanted[name]}" for name in wrong[:1]),
    ]
