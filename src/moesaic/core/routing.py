"""Who goes where: the table of (token, expert, weight) rows that one router wrote for one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moesaic.core.errors import ConfigError, ShapeError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Routing:
    """The table of (token, expert, weight) rows. A router writes it; everything else only reads it.

    Rows of padding stay in the table, so that its size depends on nothing but the batch's shape; ``valid_N`` tells
    them apart, and no count, loss or expert ever takes one.

    Attributes:
        expert_N: the expert of each row, int64.
        token_N: the token of each row, int64.
        weight_N: what the expert's output is multiplied by, in the router's precision (float32 or wider).
        choice_N: 0 for a token's best expert, 1 for its second, and so on, int64.
        logits_TE: the router's raw outputs.
        scores_TE: the logits after the scoring function, before any selection bias.
        valid_T: False where a token is padding, bool.
        kept_N: False where a row reaches no expert: padding, or dropped by capacity, bool.
        sequence_T: which sequence each token belongs to, int64; None reads as one sequence.
        extras: what only some routers know and only their own losses read, by name, such as the smooth load of noisy
            gates. A loss that needs one says so with a ConfigError where it is missing.
    """

    expert_N: Tensor
    token_N: Tensor
    weight_N: Tensor
    choice_N: Tensor
    logits_TE: Tensor
    scores_TE: Tensor
    valid_T: Tensor
    kept_N: Tensor
    sequence_T: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_choices(
        cls,
        expert_TK: Tensor,
        weight_TK: Tensor,
        logits_TE: Tensor,
        scores_TE: Tensor,
        valid_T: Tensor | None = None,
    ) -> Routing:
        """Build the table of a router that picks K experts for every token.

        Row ``t * K + k`` is token ``t``'s ``k``-th choice.

        Args:
            expert_TK: chosen experts, best first.
            weight_TK: their weights.
            logits_TE: raw router outputs.
            scores_TE: scores over all experts.
            valid_T: False where a token is padding; None when none is.
        Raises:
            ShapeError: if the five do not agree on T, K or E.
            ConfigError: if the experts are not whole numbers, or ``valid_T`` is a mask of floats.
        """
        if expert_TK.is_floating_point() or expert_TK.dtype == torch.bool:
            raise ConfigError(
                f"expert_TK must hold whole numbers, the chosen experts, got {expert_TK.dtype}. "
                "Pass the indices that topk gives, not the scores."
            )
        if expert_TK.ndim != 2 or expert_TK.shape != weight_TK.shape:
            raise ShapeError(
                f"expert_TK and weight_TK must both be (tokens, choices), got {tuple(expert_TK.shape)} and "
                f"{tuple(weight_TK.shape)}. Pass one weight for each chosen expert."
            )
        num_tokens, top_k = expert_TK.shape
        if logits_TE.ndim != 2 or logits_TE.shape != scores_TE.shape or logits_TE.shape[0] != num_tokens:
            raise ShapeError(
                f"logits_TE and scores_TE must both be ({num_tokens} tokens, experts), got {tuple(logits_TE.shape)} "
                f"and {tuple(scores_TE.shape)}. Pass the outputs for the same tokens as the choices."
            )
        device = expert_TK.device
        valid_T = checked_mask(valid_T, num_tokens, device)
        expert_N = expert_TK.reshape(-1)
        row_N = torch.arange(num_tokens * top_k, device=device)
        token_N = row_N.div(top_k, rounding_mode="floor")
        return cls(
            expert_N=expert_N if expert_N.dtype == torch.int64 else expert_N.to(torch.int64),
            token_N=token_N,
            weight_N=weight_TK.reshape(-1),
            choice_N=row_N.remainder(top_k),
            logits_TE=logits_TE,
            scores_TE=scores_TE,
            valid_T=valid_T,
            kept_N=valid_T.index_select(0, token_N),
        )

    @classmethod
    def from_mask(
        cls,
        chosen_TE: Tensor,
        weight_TE: Tensor,
        logits_TE: Tensor,
        scores_TE: Tensor,
        valid_T: Tensor | None = None,
        *,
        extras: Mapping[str, Tensor] | None = None,
    ) -> Routing:
        """Build the table of a router that gives each token as many experts as it likes, none included.

        Rows stand in token order, and within a token by falling weight, then rising expert: ``choice_N`` is that rank.

        Args:
            chosen_TE: True where expert e takes token t.
            weight_TE: what its output is multiplied by; read where chosen.
            logits_TE: raw router outputs.
            scores_TE: scores over all experts.
            valid_T: False where a token is padding; None when none is.
            extras: see :class:`Routing`.
        Raises:
            ShapeError: if they do not agree on T and E.
            ConfigError: if ``valid_T`` is a mask of floats.
        """
        shapes = {tuple(tensor.shape) for tensor in (chosen_TE, weight_TE, logits_TE, scores_TE)}
        if len(shapes) > 1 or chosen_TE.ndim != 2:
            raise ShapeError(
                f"chosen_TE, weight_TE, logits_TE and scores_TE must all be (tokens, experts), got {sorted(shapes)}. "
                "Pass all four for the same tokens and experts."
            )
        num_tokens, _ = chosen_TE.shape
        valid_T = checked_mask(valid_T, num_tokens, chosen_TE.device)
        # Stable sorts, least important key first: by rising expert, by falling weight, chosen before not chosen.
        order_TE = torch.argsort(weight_TE.detach(), dim=-1, descending=True, stable=True)
        order_TE = order_TE.gather(1, torch.argsort((~chosen_TE).gather(1, order_TE).int(), dim=-1, stable=True))
        token_N, choice_N = chosen_TE.gather(1, order_TE).nonzero(as_tuple=True)
        expert_N = order_TE[token_N, choice_N]
        return cls(
            expert_N=expert_N,
            token_N=token_N,
            weight_N=weight_TE[token_N, expert_N],
            choice_N=choice_N,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
            valid_T=valid_T,
            kept_N=valid_T[token_N],
            extras=extras or {},
        )

    @classmethod
    def from_mixture(
        cls,
        weight_TE: Tensor,
        logits_TE: Tensor,
        scores_TE: Tensor,
        valid_T: Tensor,
        *,
        extras: Mapping[str, Tensor] | None = None,
    ) -> Routing:
        """Describe a layer where every token meets every expert: a row for each pair, of weight 0 for padding.

        Args:
            weight_TE: what part of a token's output each expert has.
            logits_TE: raw router outputs.
            scores_TE: scores over all experts.
            valid_T: False where a token is padding.
            extras: see :class:`Routing`.
        Raises:
            ShapeError: if they do not agree on T and E.
        """
        weight_TE = weight_TE.masked_fill(~valid_T[:, None], 0)
        every_TE = torch.ones_like(weight_TE, dtype=torch.bool)
        return cls.from_mask(every_TE, weight_TE, logits_TE, scores_TE, valid_T, extras=extras)

    @property
    def num_experts(self) -> int:
        """Experts that the router chooses from."""
        return self.scores_TE.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens of the batch, padding included."""
        return self.scores_TE.shape[0]

    @property
    def num_rows(self) -> int:
        """Rows of the table, those of padding included."""
        return self.expert_N.shape[0]

    @property
    def valid_N(self) -> Tensor:
        """False on the rows of padding tokens, bool (N,)."""
        return self.valid_T.index_select(0, self.token_N)

    @property
    def load_E(self) -> Tensor:
        """Rows that the router gave each expert, int64 (E,): padding left out, rows later dropped counted.

        Dropped rows count because the router chose them: leaving them out would make an overfull expert look
        balanced (GShard Alg. 1 and Switch eq. 5 count before capacity too).
        """
        load_E = torch.zeros(self.num_experts, dtype=torch.int64, device=self.expert_N.device)
        return load_E.index_add_(0, self.expert_N, self.valid_N.to(torch.int64))

    @property
    def importance_E(self) -> Tensor:
        """Sum of each expert's weights over valid rows, differentiable (Shazeer 2017, eq. 6)."""
        importance_E = self.weight_N.new_zeros(self.num_experts)
        return importance_E.index_add(0, self.expert_N, self.weight_N.masked_fill(~self.valid_N, 0))

    @property
    def probability_TE(self) -> Tensor:
        """Scores divided by their sum over experts, so that each token's add up to 1; differentiable.

        Where every score of a token has underflowed to 0, this is the limit that the ratio tends to as logits fall,
        ``softmax(logits)``. Adding an epsilon to the sum instead would let a router lower every balance loss by
        shrinking all its scores.
        """
        total_T1 = self.scores_TE.sum(dim=-1, keepdim=True)
        tiny = torch.finfo(self.scores_TE.dtype).tiny
        ratio_TE = self.scores_TE / total_T1.clamp_min(tiny)
        return torch.where(total_T1 > tiny, ratio_TE, self.logits_TE.softmax(dim=-1).to(ratio_TE.dtype))


def checked_mask(valid_T: Tensor | None, num_tokens: int, device: torch.device) -> Tensor:
    """The mask of valid tokens as bool, all True for None.

    Raises:
        ShapeError: if it does not have one entry for each token.
        ConfigError: if it holds floats.
    """
    if valid_T is None:
        return torch.ones(num_tokens, dtype=torch.bool, device=device)
    if valid_T.shape != (num_tokens,):
        raise ShapeError(
            f"valid_T must be ({num_tokens},), one entry for each token, got {tuple(valid_T.shape)}. "
            "Flatten the attention mask as the tokens were flattened."
        )
    if valid_T.is_floating_point():
        raise ConfigError(
            f"valid_T must be bool or integer, True where a token counts, got {valid_T.dtype}. "
            "A float mask may be additive, where 0 means the opposite: pass mask == 0, or mask.bool()."
        )
    return valid_T.bool()


def missing_extra(name: str, who: str, where: str) -> ConfigError:
    """The error for a loss that needs ``routing.extras[name]`` where the router gave none.

    Args:
        name: of the extra.
        who: needs it.
        where: it comes from.
    """
    return ConfigError(
        f"{who} needs routing.extras[{name!r}], which this routing does not have. It comes from {where}: "
        "use the two together, or another loss."
    )


_FIELDS = tuple(field.name for field in fields(Routing))


def _flatten(routing: Routing) -> tuple[list[Tensor | Mapping[str, Tensor] | None], None]:
    return [getattr(routing, name) for name in _FIELDS], None


def _unflatten(leaves: object, _context: None) -> Routing:
    return Routing(**dict(zip(_FIELDS, leaves, strict=True)))  # type: ignore[call-overload]


def register_as_routing(kind: type[Routing]) -> None:
    """Let PyTorch see the tensors of a kind of table, which comes back from its hands as a plain one."""
    pytree.register_pytree_node(kind, _flatten, _unflatten, serialized_type_name=f"moesaic.{kind.__name__}")


register_as_routing(Routing)
