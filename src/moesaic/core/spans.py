"""A batch of tokens cut into spans: whole sequences, or segments of a fixed number of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.core.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Spans:
    """Which valid tokens belong together, in their order. Padding belongs nowhere.

    A sequence's spans stand side by side, sequences by rising id. There is always a span: an empty one if there is no
    valid token, so that what is computed per span keeps its graph.

    Attributes:
        token_N: valid tokens, span after span, int64.
        span_N: the span of each, int64.
        place_N: its place within the span, int64.
        count_S: tokens of each span, int64.
        first_S: True where a span is the first of its sequence, bool.
    """

    token_N: Tensor
    span_N: Tensor
    place_N: Tensor
    count_S: Tensor
    first_S: Tensor

    @classmethod
    def of(cls, sequence_T: Tensor, valid_T: Tensor, length: int | None = None) -> Spans:
        """Cut a batch into spans.

        Args:
            sequence_T: which sequence each token belongs to; any whole numbers.
            valid_T: False where a token is padding: it counts for no length.
            length: tokens of a span, the last of a sequence may be shorter; None for whole sequences.
        """
        token_N = valid_T.nonzero(as_tuple=True)[0]
        _, sequence_N, count_B = torch.unique(sequence_T[token_N], return_inverse=True, return_counts=True)
        order_N = sequence_N.argsort(stable=True)
        token_N, sequence_N = token_N[order_N], sequence_N[order_N]
        place_N = torch.arange(len(token_N), device=token_N.device) - (count_B.cumsum(0) - count_B)[sequence_N]
        length = max(length or len(token_N), 1)
        spans_B = (count_B + length - 1) // length
        start_B = spans_B.cumsum(0) - spans_B
        num_spans = max(int(spans_B.sum()), 1)
        span_N = start_B[sequence_N] + place_N // length
        count_S = torch.zeros(num_spans, dtype=torch.int64, device=token_N.device)
        first_S = torch.zeros(num_spans, dtype=torch.bool, device=token_N.device)
        first_S[start_B] = True
        return cls(
            token_N=token_N,
            span_N=span_N,
            place_N=place_N % length,
            count_S=count_S.index_add_(0, span_N, torch.ones_like(span_N)),
            first_S=first_S,
        )

    @property
    def num_spans(self) -> int:
        """How many there are, an empty one counted."""
        return self.count_S.shape[0]

    def mean(self, x_TD: Tensor) -> Tensor:
        """The mean of each span's tokens, (S, D); zeros for an empty span."""
        sum_SD = x_TD.new_zeros(self.num_spans, x_TD.shape[1]).index_add(0, self.span_N, x_TD[self.token_N])
        return sum_SD / self.count_S.clamp_min(1)[:, None]

    def spread(self, value_SE: Tensor, num_tokens: int) -> Tensor:
        """Give every token its span's values, (T, E); padding gets zeros."""
        value_TE = value_SE.new_zeros(num_tokens, value_SE.shape[1])
        return value_TE.index_put((self.token_N,), value_SE[self.span_N])

    def stack(self, x_TD: Tensor) -> Tensor:
        """Lay the spans side by side, (S, P, D), short ones filled up with zeros."""
        num_places = max(int(self.count_S.max()), 1)
        x_SPD = x_TD.new_zeros(self.num_spans, num_places, x_TD.shape[1])
        return x_SPD.index_put((self.span_N, self.place_N), x_TD[self.token_N])

    def unstack(self, y_SPD: Tensor, num_tokens: int) -> Tensor:
        """Undo :meth:`stack`, (T, D); padding gets zeros."""
        y_TD = y_SPD.new_zeros(num_tokens, y_SPD.shape[2])
        return y_TD.index_put((self.token_N,), y_SPD[self.span_N, self.place_N])

    def plan(self, weight_N: Tensor) -> Plan:
        """A plan in which each span is an expert that works on its own tokens.

        Args:
            weight_N: what the output of each place is multiplied by.
        """
        return Plan(
            row_N=torch.arange(len(self.token_N), device=self.token_N.device),
            token_N=self.token_N,
            weight_N=weight_N,
            load_E=self.count_S,
            offset_E=self.count_S.cumsum(0),
            kept_N=torch.ones_like(self.token_N, dtype=torch.bool),
        )
