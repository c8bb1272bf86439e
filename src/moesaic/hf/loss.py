"""How balance losses join a model's own loss."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils.generic import ModelOutput

from moesaic.hf.config import made_once
from moesaic.hf.scope import Sink


def noting_share(loss_function: Callable[..., Any], sink: Sink) -> Callable[..., Any]:
    """The same loss function, which also notes in ``sink`` which share of the batch it is divided by.

    A loss that is told ``num_items_in_batch`` is a sum over this call's labels divided by the labels of all calls of
    an optimizer step. The balance losses must shrink as it does, and only then: not every model tells its loss.
    """
    signature = inspect.signature(loss_function)

    def noting(*args: Any, **kwargs: Any) -> Any:
        given = {**signature.bind_partial(*args, **kwargs).arguments, **kwargs}
        num_items, labels, shifted = (given.get(key) for key in ("num_items_in_batch", "labels", "shift_labels"))
        if num_items is not None and labels is not None:
            if shifted is not None:
                labels = shifted
            elif loss_function is ForCausalLMLoss:
                labels = labels[..., 1:]
            num_items = torch.as_tensor(num_items, device=labels.device)
            sink.share = (labels != -100).sum() / num_items
        return loss_function(*args, **kwargs)

    return noting


def with_balance(output: Any, sink: Sink, *, has_labels: bool) -> Any:
    """A model's output with the balance losses added to its loss, if it has one, and shown beside it."""
    balance = sink.balance
    if balance is None:
        return output
    if isinstance(output, tuple):
        return (_sum(output[0], sink), *output[1:]) if has_labels else output
    if dataclasses.is_dataclass(output):
        values = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        output = _with_aux_loss(type(output))(**values | {"aux_loss": balance})
    if getattr(output, "loss", None) is not None:
        output.loss = _sum(output.loss, sink)
    return output


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
