"""Scratch memory filled with poison: what a kernel reads before it has written it shows as NaN or as a wild index."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def _poison(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    if tensor.dtype in (torch.int32, torch.int64):
        return tensor.fill_(torch.iinfo(tensor.dtype).max // 2)
    return tensor


@contextmanager
def poisoned_scratch() -> Iterator[list[int]]:
    """Fill what ``empty``, ``empty_like`` and ``new_empty`` return; gives a list with the size of each one filled."""
    filled: list[int] = []

    def poisoning(real: Any) -> Any:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            tensor = _poison(real(*args, **kwargs))
            filled.append(tensor.numel())
            return tensor

        return empty

    with (
        mock.patch.object(torch, "empty", poisoning(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoning(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poisoning(Tensor.new_empty)),
    ):
        yield filled
