"""What a transformers model gets whose MoE layers are ours or ours to watch: a frame around each of its forwards."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from moesaic.core.errors import ConfigError
from moesaic.hf.loss import note_share, settle, with_balance
from moesaic.hf.scope import KeepFrame, current_frame, entered
from moesaic.hf.uncompiled import uncompiled, uncompiled_itself


class FramedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A transformers model whose forwards know their batch and gather what MoE layers report.

    In training, ``output.loss`` is the model's own loss plus the balance losses, each times its coefficient, summed
    over layers; their sum alone is ``output.aux_loss``. In evaluation ``output.loss`` is the model's own loss: a
    held-out loss contains no balance. Without labels there is no loss to add to; read ``output.aux_loss`` then, or
    :func:`moesaic.hf.balance`.

    Where a trainer passes ``num_items_in_batch`` and the model divides its loss by it, the balance losses are
    multiplied by this call's share of it: accumulated gradients are the mean over calls, weighted by predicted tokens.
    """

    dense_class: ClassVar[type[PreTrainedModel]]
    """The class of transformers that this one derives from."""

    def _set_gradient_checkpointing(  # type: ignore[override]  # newer versions have more keywords
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        function = keep_frame(gradient_checkpointing_func) if enable else gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable, function, **kwargs)

    @property
    def loss_function(self) -> Any:
        """The model's own loss; within a forward it also notes which share of the batch it is divided by."""
        return super().loss_function if current_frame().sink is None else self._noting_loss

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value

    @uncompiled_itself
    def _noting_loss(self, *args: Any, **kwargs: Any) -> Any:
        dense, sink = super().loss_function, current_frame().sink
        if sink is not None:
            note_share(sink, dense, args, kwargs)
        return dense(*args, **kwargs)

    @property
    def _is_causal(self) -> bool:
        """Whether each token predicts the next one, in the only stack that there is."""
        return super().loss_function is ForCausalLMLoss and not self.config.is_encoder_decoder

    def _get_name(self) -> str:
        # Trainer looks this name up to decide whether label smoothing shifts labels.
        return type(self).dense_class.__name__


def framed_forward(dense: type[PreTrainedModel]) -> Callable[..., Any]:
    """The forward of a class of transformers, in a frame of its own, with balance losses in what it returns."""
    dense_forward, signature = dense.forward, inspect.signature(dense.forward)

    @uncompiled
    def bound(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**signature.bind_partial(*args, **kwargs).arguments, **kwargs}

    # Trainer and generate read the signature to tell what the model accepts: it must stay the dense one. What runs
    # within may be compiled; the frame itself differs from forward to forward.
    @uncompiled_itself
    @functools.wraps(dense_forward)
    def forward(self: FramedModel, *args: Any, **kwargs: Any) -> Any:
        given = bound(self, *args, **kwargs)
        ids, mask, embeds = (given.get(name) for name in ("input_ids", "attention_mask", "inputs_embeds"))
        if ids is None and embeds is None:  # a decoder that names its own input so
            ids, mask = given.get("decoder_input_ids"), given.get("decoder_attention_mask", mask)
        with entered(self, mask, ids, embeds, given.get("past_key_values")) as sink:
            output = dense_forward(self, *args, **kwargs)
        if sink is None:
            return output
        labels = given.get("labels")
        settle(output, sink, labels, given.get("shift_labels"), is_causal=self._is_causal)
        return with_balance(output, sink, has_labels=labels is not None)

    return forward


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


def keep_frames_in(model: PreTrainedModel) -> None:
    """Let parts that recompute activations already do so as their first forward ran; all of them or, on error, none."""
    kept = {
        part: keep_frame(part.__dict__["_gradient_checkpointing_func"])
        for part in model.modules()
        if "_gradient_checkpointing_func" in part.__dict__ and getattr(part, "gradient_checkpointing", False)
    }
    for part, function in kept.items():
        part.__dict__["_gradient_checkpointing_func"] = function
