"""Sparse models: a subclass of the dense model's class, made when it is needed, that opens a frame for each forward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from moesaic.core.errors import ConfigError
from moesaic.hf.base_weights import load_base
from moesaic.hf.block import SparseBlock
from moesaic.hf.causality import refusing
from moesaic.hf.config import made_once, sparse_config_class
from moesaic.hf.load import load_checked
from moesaic.hf.loss import noting_share, settle, with_balance
from moesaic.hf.scope import KeepFrame, current_frame, entered
from moesaic.hf.spec import SparseSpec


class SparseModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """What sparse models add to the transformers model that they derive from.

    In training, ``output.loss`` is the model's own loss plus the balance losses, each times its coefficient, summed
    over layers; their sum alone is ``output.aux_loss``. In evaluation ``output.loss`` is the model's own loss: a
    held-out loss contains no balance. Without labels there is no loss to add to; read ``output.aux_loss`` then, or
    :func:`moesaic.hf.balance`.

    Where a trainer passes ``num_items_in_batch`` and the model divides its loss by it, the balance losses are
    multiplied by this call's share of it: accumulated gradients are the mean over calls, weighted by predicted tokens.
    """

    dense_class: ClassVar[type[PreTrainedModel]]

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

    def _set_gradient_checkpointing(  # type: ignore[override]  # newer versions have more keywords
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        function = keep_frame(gradient_checkpointing_func) if enable else gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable, function, **kwargs)

    @property
    def loss_function(self) -> Any:
        """The model's own loss; within a forward it also notes which share of the batch it is divided by."""
        dense, sink = super().loss_function, current_frame().sink
        return dense if sink is None else noting_share(dense, sink)

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value

    @property
    def _is_causal(self) -> bool:
        """Whether each token predicts the next one, in the only stack that there is."""
        return super().loss_function is ForCausalLMLoss and not self.config.is_encoder_decoder

    def _get_name(self) -> str:
        # Trainer looks this name up to decide whether label smoothing shifts labels.
        return type(self).dense_class.__name__

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return _new_model, (type(self).dense_class,), self.__dict__


@made_once
def sparse_class(dense: type[PreTrainedModel]) -> type[Any]:
    """The class of sparse models whose dense sibling is of class ``dense``."""
    dense_forward, signature = dense.forward, inspect.signature(dense.forward)

    # Trainer and generate read the signature to tell what the model accepts: it must stay the dense one.
    @functools.wraps(dense_forward)
    def forward(self: SparseModel, *args: Any, **kwargs: Any) -> Any:
        given = {**signature.bind_partial(self, *args, **kwargs).arguments, **kwargs}
        with entered(self, given.get("attention_mask"), given.get("input_ids")) as sink:
            output = dense_forward(self, *args, **kwargs)
        if sink is None:
            return output
        labels = given.get("labels")
        settle(output, sink, labels, given.get("shift_labels"), is_causal=self._is_causal)
        return with_balance(output, sink, has_labels=labels is not None)

    namespace = {
        "__module__": __name__,
        "__doc__": f"{dense.__name__} with MoE layers.",
        "config_class": sparse_config_class(dense.config_class),  # type: ignore[arg-type]
        "dense_class": dense,
        "forward": forward,
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
    checkpointed = {
        part: keep_frame(part.__dict__["_gradient_checkpointing_func"])
        for part in model.modules()
        if "_gradient_checkpointing_func" in part.__dict__ and getattr(part, "gradient_checkpointing", False)
    }
    for path, block in blocks.items():
        parent, _, name = path.rpartition(".")
        setattr(base.get_submodule(parent), name, block)
    lend_logits(base)
    for part, function in checkpointed.items():
        part.__dict__["_gradient_checkpointing_func"] = function
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


def keep_frame(function: Callable[..., Any]) -> KeepFrame:
    """Make a checkpoint function recompute as the first forward ran.

    Raises:
        ConfigError: if it is the reentrant kind, whose forward has no graph for the balance losses.
    """
    if isinstance(function, KeepFrame):
        return function
    if getattr(function, "keywords", {}).get("use_reentrant") is not False:
        raise ConfigError(
            "Activation checkpointing of a sparse model needs use_reentrant=False: the reentrant kind cuts the balance "
            'losses off from the router. Pass {"use_reentrant": False} as its keyword arguments, or leave them out.'
        )
    return KeepFrame(function)


def _new_model(dense: type[PreTrainedModel]) -> SparseModel:
    model_class: type[SparseModel] = sparse_class(dense)
    return model_class.__new__(model_class)
