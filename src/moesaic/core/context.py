"""What is known about the tokens of a batch beside their vectors. Most routers need none of it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moesaic.core.errors import ConfigError, ShapeError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Context:
    """Who the tokens are and where they stand; None where nobody said.

    Attributes:
        sequence_T: which sequence each token belongs to, int64, tokens of a sequence in their order; None reads as one
            sequence.
        id_T: token ids of the vocabulary, int64; hash routing needs them.
        domain_T: which domain or task each token's text belongs to, int64.
        below_TE: router logits of the MoE layer below, for gating residuals (MoE++).
        choice_TK: the experts of each token, where they are known already: routers in which tokens choose the best K
            take them in the place of their own choice, and weigh them as their scores say.
    """

    sequence_T: Tensor | None = None
    id_T: Tensor | None = None
    domain_T: Tensor | None = None
    below_TE: Tensor | None = None
    choice_TK: Tensor | None = None

    def check(self, num_tokens: int) -> None:
        """Refuse what does not have one entry for each token.

        Raises:
            ShapeError: naming the field.
        """
        for name in _FIELDS:
            value: Tensor | None = getattr(self, name)
            if value is not None and value.shape[:1] != (num_tokens,):
                raise ShapeError(
                    f"Context.{name} must have one entry for each of {num_tokens} tokens, got shape "
                    f"{tuple(value.shape)}. Flatten it as the tokens were flattened."
                )

    def need(self, name: str, who: str) -> Tensor:
        """The field of that name.

        Raises:
            ConfigError: if nobody gave it, naming who needs it.
        """
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ConfigError(
                f"{who} needs Context.{name}, got none. Call layer(x_TD, valid_T, Context({name}=...)); a model of "
                "moesaic.sparsify passes token ids and sequences by itself, and domains within moesaic.hf.domains(...)."
            )
        return value

    def sequences(self, like_TD: Tensor) -> Tensor:
        """``sequence_T``, zeros where nobody gave it."""
        if self.sequence_T is not None:
            return self.sequence_T
        return torch.zeros(like_TD.shape[0], dtype=torch.int64, device=like_TD.device)


_FIELDS = tuple(field.name for field in fields(Context))
NO_CONTEXT = Context()
