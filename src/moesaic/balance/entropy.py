"""Losses on how sure a router is: the entropy of its probabilities, for each token and on average. In nats."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.routing import Routing


def entropy_loss(routing: Routing) -> Tensor:
    """Make each token's router sure, so that few experts suffice: the mean entropy of its probabilities over tokens.

    0 where every token has one expert, ``ln E`` where none has a preference. Says nothing about balance.

    Source: Huang et al. 2024, "Harder Tasks Need More Experts", dynamic loss.
    """
    probability_TE = routing.probability_TE.masked_fill(~routing.valid_T[:, None], 0)
    return _entropy(probability_TE).sum() / routing.valid_T.sum().clamp_min(1)


def mutual_information_loss(routing: Routing) -> Tensor:
    """Make tokens sure and experts equally used: ``-H(mean p) + mean H(p)``, minus what an expert tells of a token.

    ``-ln E`` at perfect balance with one expert for each token, its least value; 0, its greatest, where every token has
    the same probabilities, even ones or one-sided.

    Source: Pan et al. 2024, "Dense Training, Sparse Inference" (DS-MoE).
    """
    probability_TE = routing.probability_TE.masked_fill(~routing.valid_T[:, None], 0)
    mean_E = probability_TE.sum(dim=0) / routing.valid_T.sum().clamp_min(1)
    return entropy_loss(routing) - _entropy(mean_E)


def _entropy(probability_E: Tensor) -> Tensor:
    """``-sum p ln p`` over the last dimension, 0 for a probability of 0, with a finite slope there."""
    # The slope -ln p - 1 is infinite at 0 and would meet softmax's slope of 0 there: a NaN.
    tiny = torch.finfo(probability_E.dtype).tiny
    return -(probability_E * probability_E.clamp_min(tiny).log()).sum(dim=-1)
