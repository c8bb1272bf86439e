"""The loss between two passes whose experts were drawn independently (THOR)."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.errors import ShapeError
from moesaic.core.routing import checked_mask


def consistency_loss(first_TV: Tensor, second_TV: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Make two passes over the same tokens predict alike: ``(KL(p1 || p2) + KL(p2 || p1)) / 2``, mean over tokens.

    At least 0; 0 where both predict the same, so with identical experts. Not a balance loss: it compares a model's
    outputs. THOR trains on ``CE(p1, y) + CE(p2, y) + 5 * consistency``, where CE is a mean over tokens as well. A
    probability below ``exp(-10,000)`` counts as that, so that tokens forbidden in both (logits of minus infinity) add
    0.

    Args:
        first_TV: logits over the vocabulary, of one pass.
        second_TV: those of the other.
        valid_T: False where a token is padding; None when none is.
    Raises:
        ShapeError: if the two differ in shape.

    Source: Zuo et al. 2021, "Taming Sparsely Activated Transformer with Stochastic Experts". Their code adds up over
    tokens, then divides all three parts by their number: the same.
    """
    if first_TV.ndim != 2 or first_TV.shape != second_TV.shape:
        raise ShapeError(
            f"both passes must give logits (tokens, vocabulary), got {tuple(first_TV.shape)} and "
            f"{tuple(second_TV.shape)}. Flatten batch and position, and run both passes on the same tokens."
        )
    valid_T = checked_mask(valid_T, first_TV.shape[0], first_TV.device)
    wide = torch.promote_types(first_TV.dtype, torch.float32)
    first_TV = first_TV.masked_fill(~valid_T[:, None], 0).to(wide).log_softmax(dim=-1)
    second_TV = second_TV.masked_fill(~valid_T[:, None], 0).to(wide).log_softmax(dim=-1)
    gap_TV = first_TV.clamp_min(-1e4) - second_TV.clamp_min(-1e4)
    loss_T = ((first_TV.exp() - second_TV.exp()) * gap_TV).sum(dim=-1) / 2
    return loss_T.sum() / valid_T.sum().clamp_min(1)
