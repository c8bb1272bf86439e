"""Where the tokens of a forward stand: in which sequence of a recording, at which place of it."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.hf.scope import Frame


class SequenceNumbers:
    """Numbers the sequences of forwards, on from each other; steps with a cache go on in those that they began with."""

    def __init__(self) -> None:
        self.first = 0
        self.next = 0

    def begin(self, *, continues: bool) -> int:
        """A new forward; gives the number of its first sequence."""
        if not continues or not self.next:
            self.first = self.next
        return self.first

    def see(self, num_sequences: int) -> None:
        """A layer of the forward had so many."""
        self.next = max(self.next, self.first + num_sequences)


def tokens_before(frame: Frame, num_sequences: int, num_positions: int) -> Tensor | None:
    """How many tokens of each sequence a cache holds, (B, 1); None if there is no cache."""
    mask = frame.attention_mask
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > num_positions:
        return (mask[:, : mask.shape[1] - num_positions] != 0).sum(dim=1, keepdim=True)
    return torch.full((num_sequences, 1), frame.past) if frame.past else None


def positions(valid_BP: Tensor, before_B1: Tensor | None) -> Tensor:
    """The place of each token in its sequence, padding not counted (B, P)."""
    place_BP = (valid_BP.cumsum(dim=1) - 1).clamp_min(0)
    return place_BP if before_B1 is None else place_BP + before_B1.to(place_BP.device)
