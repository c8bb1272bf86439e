"""From a model of transformers, built without memory, to its shape."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic.core.errors import ConfigError
from moesaic.hf.block import SparseBlock
from moesaic.hf.native.found import Found, find, row_of
from moesaic.hf.shape.build import on_meta, read_config
from moesaic.hf.shape.layer import layer_of
from moesaic.hf.shape.weights import in_products, numel, sort_weights
from moesaic.zoo import ModelShape, Other
from moesaic.zoo.layers import Layer

_TOWER = re.compile(r"vision|visual|audio|image|tower")


def shape_of_config(source: str | Path | PreTrainedConfig) -> ModelShape:
    """The shape of the model that a configuration of transformers describes; nothing is fetched, no weight is made.

    Args:
        source: a ``config.json``, a folder that holds one, or a configuration.

    Raises:
        CheckpointError: if there is no such file, or it is not JSON.
        ConfigError: if transformers cannot build a model of it.
    """
    config = source if isinstance(source, PreTrainedConfig) else read_config(source)
    return shape_of(on_meta(config))


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The shape of a model: every parameter is counted in exactly one part.

    The biases that steer selection count too, though transformers keeps most of them in buffers: they are saved with
    the weights. What mixes positions in a way that the zoo has no form for is counted by its weights, and its FLOPs
    leave out what it does between positions; ``open`` says where.

    Args:
        model: of transformers, on any device; a Mixture-of-Experts model or a dense one.

    Raises:
        ConfigError: if it has no repeated layers, or routers that are not known.
    """
    ends = _Ends(model)
    routers = _routers(model)
    stacks = _stacks(model, routers)
    width = _width(model)
    final = _final_norms(model, stacks, width)
    norm: Literal["rms", "layer"] = "layer" if any(name.endswith("bias") for name in final) else "rms"
    norm_params = {"rms": 1, "layer": 2}[norm] * width
    seen = ends.seen | {id(one) for one in final.values()}
    built: dict[str, tuple[Layer, ...]] = {}
    for path, layers in stacks.items():
        weights = [sort_weights(layer, f"{path}.{index}", routers, width, seen) for index, layer in enumerate(layers)]
        built[path] = tuple(
            layer_of(layer, held, width=width, norm=norm_params) for layer, held in zip(layers, weights, strict=True)
        )
    near, products, far = _rest(model, seen, list(stacks), routers)
    encoder, decoder = _roles(built, model)
    final_norms, over = divmod(numel(final), norm_params)
    return ModelShape(
        name=str(model.config.model_type),
        width=width,
        vocab=ends.vocab,
        layers=decoder,
        encoder=encoder,
        tied=ends.head is None,
        norm=norm,
        final_norms=final_norms,
        head_bias=ends.head_bias is not None,
        embedding_extra=0 if ends.table is None else ends.table.numel() - ends.vocab * width,
        other=near + over,
        other_products=products,
        writes=ends.writes,
        towers=far,
        activation=str(getattr(model.config.get_text_config(), "hidden_act", "")),
        source=f"{type(model).__name__} of transformers {transformers.__version__}, built without weights",
        open=_open(encoder + decoder),
    )


@dataclass(slots=True)
class _Ends:
    """Where tokens come in and go out.

    Args:
        table: of tokens; None for a model that takes none.
        head: the map to the vocabulary, if it has weights of its own.
        head_bias: its bias.
        writes: whether there is such a map at all.
    """

    table: Tensor | None
    head: Tensor | None
    head_bias: Tensor | None
    writes: bool

    def __init__(self, model: PreTrainedModel) -> None:
        try:
            into = model.get_input_embeddings()
        except RuntimeError:
            # What transformers raises for a model that has none is one of these.
            into = None
        heads = [part for path, part in model.named_modules() if path.rpartition(".")[2] == "lm_head"]
        out: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        out = out or (heads[0] if heads else None)
        # What takes images has a convolution there.
        self.table = into.weight if isinstance(into, nn.Embedding) else None
        self.writes = out is not None
        weight, bias = getattr(out, "weight", None), getattr(out, "bias", None)
        own = weight is not None and weight is not self.table
        fits = own and self.table is not None and weight.numel() == self.table.numel()  # type: ignore[union-attr]
        self.head = weight if fits else None
        self.head_bias = bias if bias is not None and bias.numel() == self.vocab else None

    @property
    def vocab(self) -> int:
        """Tokens in the table."""
        return 0 if self.table is None else int(self.table.shape[0])

    @property
    def seen(self) -> set[int]:
        """Which weights these are."""
        return {id(one) for one in (self.table, self.head, self.head_bias) if one is not None}


def _width(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    # A model of images keeps it in the configuration of what it stands on.
    return int(getattr(config, "backbone_config", config).hidden_size)


def _routers(model: PreTrainedModel) -> list[Found]:
    try:
        return find(model)[0]
    except ConfigError:
        # A dense model has none, and those that sparsify put in tell of themselves.
        if any(isinstance(part, SparseBlock) for part in model.modules()):
            return []
        if any(".experts." in name for name, _ in model.named_parameters()):
            raise
        return []


def _stacks(model: PreTrainedModel, routers: Iterable[Found]) -> dict[str, nn.ModuleList]:
    """The lists of layers that write or read text: those with routers in them, or the largest one."""
    lists = {path: part for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    outer = {path: part for path, part in lists.items() if not any(path.startswith(f"{other}.") for other in lists)}
    text = {path: part for path, part in outer.items() if not _TOWER.search(path)} or outer
    found = {path: part for path, part in text.items() if any(one.path.startswith(f"{path}.") for one in routers)}
    if not found:
        if not text:
            raise ConfigError(
                f"A model must have layers in an nn.ModuleList, got {type(model).__name__} without one. "
                "Give the configuration of a transformer."
            )
        sizes = {path: sum(one.numel() for one in part.parameters()) for path, part in text.items()}
        largest = max(sizes, key=lambda path: sizes[path])
        found = {largest: text[largest]}
        if model.config.is_encoder_decoder:
            found = {path: part for path, part in text.items() if re.search("encoder|decoder", path)}
    return found


def _final_norms(model: PreTrainedModel, stacks: Iterable[str], width: int) -> dict[str, Tensor]:
    """Weights of norms that stand beside a stack, not in it."""
    found: dict[str, Tensor] = {}
    for path in stacks:
        outer = path.rpartition(".")[0]
        for name, part in model.get_submodule(outer).named_children():
            if "norm" in type(part).__name__.lower():
                inside = {f"{outer}.{name}.{key}": one for key, one in part.named_parameters()}
                taken = {id(one) for one in found.values()}
                found |= {key: one for key, one in inside.items() if one.shape == (width,) and id(one) not in taken}
    return found


def _rest(model: PreTrainedModel, seen: set[int], stacks: list[str], routers: Iterable[Found]) -> tuple[int, int, int]:
    """Count what is left over: of the text, as factors of products too, and of what sees and hears, routers or not."""
    left = {name: one for name, one in model.named_parameters() if id(one) not in seen}
    if model.config.get_text_config() is model.config:
        return numel(left), in_products(left), 0
    places = [path.rpartition(".")[0] for path in stacks]
    near = {name: one for name, one in left.items() if any(name.startswith(f"{place}.") for place in places)}
    near = {name: one for name, one in near.items() if not _TOWER.search(name)}
    far = [row_of(one) for one in routers if not any(one.path.startswith(f"{path}.") for path in stacks)]
    held = [one.block for one in routers if not any(one.path.startswith(f"{path}.") for path in stacks)]
    biases = [row.bias_of(router, block) for (router, row), block in zip(far, held, strict=True)]
    buffers = sum(one.numel() for one in biases if one is not None and not one.requires_grad)
    return numel(near), in_products(near), numel(left) - numel(near) + buffers


def _roles(
    built: Mapping[str, tuple[Layer, ...]], model: PreTrainedModel
) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    """Layers that read and layers that write."""
    reads = [path for path in built if model.config.is_encoder_decoder and "encoder" in path]
    encoder = tuple(layer for path in reads for layer in built[path])
    decoder = tuple(layer for path, layers in built.items() if path not in reads for layer in layers)
    return encoder, decoder


def _open(layers: tuple[Layer, ...]) -> str:
    unknown = {part.name for layer in layers for part in (*layer.mixers, *layer.feeds) if isinstance(part, Other)}
    if any(layer.experts is not None and not layer.experts.hidden for layer in layers):
        # No form of the zoo's: counted as weights that do not multiply.
        return "The products of these experts are not counted: their maps have no form that the zoo knows."
    if not unknown:
        return ""
    return (
        f"Of {', '.join(sorted(unknown))} the zoo knows the weights alone: FLOPs count each weight once per token and "
        "leave out products between positions, and nothing is counted in the cache."
    )
