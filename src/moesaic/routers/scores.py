"""Scoring functions: what turns a router's logits into scores. Routers take them as values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(dim=-1)


@dataclass(frozen=True, slots=True)
class Score:
    """A scoring function over the last dimension, with its logarithm.

    The logarithm lets chosen scores be renormalised without ever dividing by an underflowed sum.
    """

    name: str
    of: Callable[[Tensor], Tensor]
    log_of: Callable[[Tensor], Tensor]


softmax = Score("softmax", _softmax, _log_softmax)
sigmoid = Score("sigmoid", Tensor.sigmoid, F.logsigmoid)
