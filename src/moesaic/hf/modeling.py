"""Sparse models: a subclass of the dense model's class, made when it is needed, that opens a frame for each forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from moesaic.hf.base_weights import load_base
from moesaic.hf.block import SparseBlock
from moesaic.hf.causality import refusing
from moesaic.hf.config import made_once, sparse_config_class
from moesaic.hf.framed import FramedModel, framed_forward, keep_frames_in
from moesaic.hf.load import load_checked
from moesaic.hf.spec import SparseSpec


class SparseModel(FramedModel):  # type: ignore[no-untyped-call]
    """What sparse models add to the dense model that they derive from: layers, built and loaded by their spec."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        install(self, SparseSpec.from_dict(config.moesaic))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As in transformers, but every tensor of the folder is used exactly once, or this fails.

        Raises:
            CheckpointError: if tensors are missing, left over or of another shape, or the folder has no safetensors.
        """
        load = super().from_pretrained
        return load_checked(load, cls.__name__, pretrained_model_name_or_path, *model_args, **kwargs)

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return _new_model, (type(self).dense_class,), self.__dict__


@made_once
def sparse_class(dense: type[PreTrainedModel]) -> type[Any]:
    """The class of sparse models whose dense sibling is of class ``dense``."""
    namespace = {
        "__module__": __name__,
        "__doc__": f"{dense.__name__} with MoE layers.",
        "config_class": sparse_config_class(dense.config_class),  # type: ignore[arg-type]
        "dense_class": dense,
        "forward": framed_forward(dense),
    }
    if hasattr(dense, "generate"):
        namespace["generate"] = refusing(dense.generate)
    return type(f"Sparse{dense.__name__}", (SparseModel, dense), namespace)


def install(model: PreTrainedModel, spec: SparseSpec, *, keep_base: bool = False, **unsaved: Any) -> None:
    """Put freshly drawn blocks where ``spec`` says, and let every model around them open frames.

    Args:
        model: dense; or sparse already, where its base model was built from the same configuration.
        spec: what goes where.
        keep_base: let low-rank experts start from the dense network; without it its weights are to be loaded.
        unsaved: options of the recipe that belong to this process, not to the model.
    """
    base = model.base_model
    dense = {path: base.get_submodule(path) for path in spec.layers}
    # All are built before the first is put in: a bad option leaves the model as it was.
    blocks = {
        path: _in_place_of(module, spec.block(path, **unsaved))
        for path, module in dense.items()
        if not isinstance(module, SparseBlock)
    }
    if keep_base:
        for path, block in blocks.items():
            load_base(dense[path], block, path)
    keep_frames_in(model)
    for path, block in blocks.items():
        parent, _, name = path.rpartition(".")
        setattr(base.get_submodule(parent), name, block)
    lend_logits(base)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and not isinstance(part, SparseModel):
            _open_frames_in(part)


def lend_logits(model: nn.Module) -> None:
    """Let layers keep their logits if any layer of the model reads those of the one below."""
    found = [part for part in model.modules() if isinstance(part, SparseBlock)]
    wanted = any(block.uses_below for block in found)
    for block in found:
        block.lends_logits = wanted


def _open_frames_in(model: PreTrainedModel) -> None:
    if any(isinstance(part, SparseBlock) for part in model.modules()):
        model.__class__ = sparse_class(type(model))
        # transformers keeps what it can record of a model (hidden states, attentions) under its class's name: in a
        # plain dict in older versions (5.17), in one that is set by model in newer ones (5.23).
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(model)), model._can_record_outputs)


def _in_place_of(dense: nn.Module, block: SparseBlock) -> SparseBlock:
    like = next(dense.parameters())
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    block = block.to(device=like.device, dtype=dtype).train(dense.training)
    for part in block.modules():
        # transformers draws what does not carry this mark again.
        part._is_hf_initialized = True  # type: ignore[assignment]
    return block


def _new_model(dense: type[PreTrainedModel]) -> SparseModel:
    model_class: type[SparseModel] = sparse_class(dense)
    return model_class.__new__(model_class)
