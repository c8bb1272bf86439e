"""How balance losses join a model's own loss."""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils.generic import ModelOutput

from moesaic.core.errors import ConfigError
from moesaic.hf.config import made_once
from moesaic.hf.reports import Sink
from moesaic.hf.uncompiled import uncompiled

_IGNORED = -100
"""The label of what is not predicted, in transformers."""


@uncompiled
def note_share(sink: Sink, loss_function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Note which share of an optimizer step's labels a loss function divides its sum by, if it is told their number.

    A loss that is told ``num_items_in_batch`` is a sum over this call's labels divided by the labels of all calls of
    an optimizer step. The balance losses must shrink as it does, and only then: not every model tells its loss.

    Args:
        sink: where to note it.
        loss_function: the model's own, about to be called.
        args: of the call.
        kwargs: of the call.
    """
    given = {**inspect.signature(loss_function).bind_partial(*args, **kwargs).arguments, **kwargs}
    num_items, labels, shifted = (given.get(key) for key in ("num_items_in_batch", "labels", "shift_labels"))
    if num_items is None or labels is None:
        return
    if shifted is not None:
        labels = shifted
    elif loss_function is ForCausalLMLoss:
        labels = labels[..., 1:]
    num_items = torch.as_tensor(num_items, device=labels.device)
    sink.share = (labels != _IGNORED).sum() / num_items


@uncompiled
def settle(output: Any, sink: Sink, labels: Tensor | None, shift_labels: Tensor | None, *, is_causal: bool) -> None:
    """Work out the balance losses that waited for the model's output.

    Without labels there is no reward, and rewarded losses are left out; in training a warning says so.

    Raises:
        ConfigError: if a loss waits for a reward and the model is no causal language model.
    """
    reward_T = None
    if sink.waiting(for_training=True) and not is_causal:
        raise ConfigError(
            "A rewarded balance loss needs a causal language model, in which each token predicts the next one, got "
            f"{'an output' if output is None else type(output).__name__}. Use another recipe, or its coefficient 0."
        )
    if sink.waiting() and (labels is not None or shift_labels is not None):
        reward_T = token_rewards(output, labels, shift_labels)
    skipped = sink.waiting(for_training=True) if reward_T is None else []
    if skipped:
        warnings.warn(
            f"The balance losses {', '.join(sorted({term.name for term in skipped}))} need the model's loss at each "
            "token as their reward, and this forward in training had no labels: they are left out. Pass labels.",
            UserWarning,
            stacklevel=4,
        )
    sink.settle(reward_T)


@torch.no_grad()
def token_rewards(output: Any, labels: Tensor | None, shift_labels: Tensor | None) -> Tensor:
    """Minus the loss of the prediction that each token makes, in nats; NaN where its label is -100 or there is none.

    A causal language model predicts at each token the next one, so labels are shifted as its loss shifts them.

    Raises:
        ConfigError: if the output has no logits for each label.
    """
    logits_BPV = output.get("logits") if hasattr(output, "get") else output[1]
    shape = None if labels is None else tuple(labels.shape)
    if shift_labels is None and labels is not None and labels.ndim == 2:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=_IGNORED)[:, 1:]
    if shift_labels is None or logits_BPV is None or logits_BPV.shape[:-1] != shift_labels.shape:
        raise ConfigError(
            "A rewarded balance loss needs logits of shape (sequences, positions, vocabulary) and a label for each "
            f"position, got logits {None if logits_BPV is None else tuple(logits_BPV.shape)} and labels {shape}. "
            "Use it in causal language models, or another recipe."
        )
    target_BP = shift_labels.to(logits_BPV.device)
    nats_BP = torch.nn.functional.cross_entropy(
        logits_BPV.float().transpose(1, 2), target_BP, ignore_index=_IGNORED, reduction="none"
    )
    return (-nats_BP).masked_fill(target_BP == _IGNORED, math.nan).reshape(-1)


@uncompiled
def with_balance(output: Any, sink: Sink, *, has_labels: bool) -> Any:
    """A model's output with the balance losses added to its loss, if it has one, and shown beside it.

    Raises:
        ConfigError: if the model has added a balance loss of its own.
    """
    balance = sink.balance
    if balance is None:
        return output
    if has_labels and _has_own_balance(output):
        raise ConfigError(
            "The model has added a balance loss of its own to its loss, pooled over layers, since this forward has "
            "output_router_logits=True; with balance it would be balanced twice. Leave it out: moesaic.hf.observe "
            "shows the router's logits."
        )
    if isinstance(output, tuple):
        return (_sum(output[0], sink), *output[1:]) if has_labels else output
    if dataclasses.is_dataclass(output):
        values = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        output = _with_aux_loss(type(output))(**values | {"aux_loss": balance})
    if getattr(output, "loss", None) is not None:
        output.loss = _sum(output.loss, sink)
    return output


def _has_own_balance(output: Any) -> bool:
    """Whether an output has a balance loss of transformers; some models have one for each of two stacks."""
    names = output.keys() if isinstance(output, ModelOutput) else ()
    return any(name.endswith("aux_loss") and isinstance(output[name], Tensor) for name in names)


def _sum(loss: Tensor, sink: Sink) -> Tensor:
    balance = cast(Tensor, sink.balance).to(loss.device)
    return loss + (balance if sink.share is None else balance * sink.share.to(loss.device))


@made_once
def _with_aux_loss(kind: Any) -> type[ModelOutput]:
    """The output class with one more field, so that whoever takes it apart and rebuilds it keeps the field."""
    if any(field.name == "aux_loss" for field in dataclasses.fields(kind)):
        return cast(type[ModelOutput], kind)
    return dataclasses.make_dataclass(
        f"Sparse{kind.__name__}",
        [("aux_loss", Tensor | None, None)],
        bases=(kind,),
        namespace={"__module__": __name__},
    )
