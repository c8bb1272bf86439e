"""The module that stands where a transformer's feed-forward network stood."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from moesaic.balance import BiasRule, LossTerm
from moesaic.hf.scope import current_frame
from moesaic.layer import MoELayer


class SparseBlock(nn.Module):
    """A :class:`~moesaic.MoELayer` that reads and returns what a feed-forward network does, one tensor.

    What a transformer block has no way to pass along, it asks of the forward that it runs in: which tokens are padding.
    What a transformer block has no way to return, the routing, it reports there.

    Args:
        moe: the layer.
        terms: balance losses that belong to it.
        rules: bias rules that belong to it.
    Shape:
        ``(B, P, D)`` -> ``(B, P, D)``.
    """

    def __init__(self, moe: MoELayer, *, terms: tuple[LossTerm, ...] = (), rules: tuple[BiasRule, ...] = ()) -> None:
        super().__init__()
        self.moe = moe
        self.terms = terms
        self.rules = rules

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Send every token of the batch through its experts."""
        frame = current_frame()
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        valid_T, sequence_T = frame.tokens(hidden_states)
        y_TD, routing = self.moe(x_TD, valid_T)
        frame.report(self, replace(routing, sequence_T=sequence_T), self.terms)
        output: Tensor = y_TD.reshape(hidden_states.shape)
        return output
