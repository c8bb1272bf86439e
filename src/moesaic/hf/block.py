"""The module that stands where a transformer's feed-forward network stood."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from moesaic.balance import LossTerm, Rule
from moesaic.hf.scope import current_frame
from moesaic.layer import MoELayer
from moesaic.recipes.recipe import Layer


class SparseBlock(nn.Module):
    """A :class:`~moesaic.MoELayer` that reads and returns what a feed-forward network does, one tensor.

    What a transformer block has no way to pass along, it asks of the forward that it runs in: which tokens are padding,
    to which sequences and domains they belong, their ids, and the logits of the MoE layer below. What a transformer
    block has no way to return, the routing, it reports there.

    Args:
        moe: the layer.
        terms: balance losses that belong to it.
        rules: build the controllers that belong to it.
    Attributes:
        lends_logits: whether the next layer of the stack reads this one's logits.
    Shape:
        ``(B, P, D)`` -> ``(B, P, D)``.
    """

    def __init__(self, moe: Layer, *, terms: tuple[LossTerm, ...] = (), rules: tuple[Rule, ...] = ()) -> None:
        super().__init__()
        self.moe = moe
        self.terms = terms
        self.rules = rules
        self.lends_logits = False
        self._frozen = [name for name, part in cast(nn.Module, moe).named_parameters() if not part.requires_grad]

    def freeze(self) -> None:
        """Freeze again what the layer was built with frozen; transformers forgets it when it loads weights."""
        for name in self._frozen:
            cast(nn.Module, self.moe).get_parameter(name).requires_grad_(False)

    @property
    def uses_below(self) -> bool:
        """Whether a part of the layer reads the logits of the MoE layer below."""
        return any(getattr(part, "uses_below", False) for part in cast(nn.Module, self.moe).modules())

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Send every token of the batch through its experts."""
        frame = current_frame()
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        valid_T, context = frame.tokens(hidden_states)
        if frame.replay is not None:
            choice_TK = frame.replay.choices(self, frame, hidden_states)
            # What a replay does not tell is padding, which reaches no expert here.
            context = replace(context, choice_TK=None if choice_TK is None else choice_TK.clamp_min(0))
        edits = frame.edits.get(self)
        moe = self.moe if edits is None else edits.around(cast(MoELayer, self.moe))
        y_TD, routing = moe(x_TD, valid_T, context)
        if self.lends_logits:
            frame.lend(routing.logits_TE)
        frame.report(self, routing, self.terms)
        output: Tensor = y_TD.reshape(hidden_states.shape)
        return output
