"""Hash routing: a fixed table says which expert each token id of the vocabulary goes to."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError, ShapeError
from moesaic.core.exact import ExactBuffers
from moesaic.core.routing import Routing
from moesaic.routers.fixed import given_choices
from moesaic.routers.hash_tables import random_table


class HashRouter(ExactBuffers):
    """Send each token to the expert that its id has in a fixed table; no parameters, every weight 1.

    The table is drawn at random when built; :meth:`load_table` puts another in its place, such as a
    :func:`~moesaic.routers.hash_tables.balanced_table` of the corpus. It is saved with the model.

    Args:
        num_experts: E.
        vocab_size: V.
        seed: of the random table. Layers with the same seed have the same table.
    Shape:
        ``(T, D)`` -> Routing of T rows; row ``t`` is token ``t``'s expert. Scores and logits are those of
        :func:`~moesaic.routers.fixed.given_choices`: no balance loss can train anything here.
    Raises:
        ConfigError: if ``num_experts`` or ``vocab_size`` is below 1.

    Source: Roller et al. 2021, "Hash Layers For Large Sparse Models".
    """

    table_V: Tensor

    def __init__(self, num_experts: int, *, vocab_size: int, seed: int = 0) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.register_exact("table_V", random_table(vocab_size, num_experts, seed))

    @property
    def experts_per_token(self) -> float:
        """1."""
        return 1.0

    def load_table(self, table_V: Tensor) -> None:
        """Put another table in the place of the random one.

        Raises:
            ShapeError: if it is for another vocabulary.
            ConfigError: if it names experts that there are none of.
        """
        _check_table(table_V, self.table_V, self.num_experts)
        self.table_V.copy_(table_V)

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Look up each token's expert.

        Raises:
            ConfigError: if nobody gave the tokens' ids, or one lies outside the vocabulary.
        """
        id_T = _within(context.need("id_T", "Hash routing"), self.table_V.shape[0], "token ids", "vocab_size")
        return given_choices(self.table_V[id_T, None], self.num_experts, x_TD, valid_T)


class DomainHashRouter(ExactBuffers):
    """Random routed experts: each domain of text has experts of its own, and a fixed random table among them.

    Expert ``domain * (E / Q) + table[domain, id]`` takes the token, so a domain's model can be cut out whole.

    Args:
        num_experts: E, of all domains together.
        vocab_size: V.
        num_domains: Q. With 1 nobody needs to say which domain a token is of.
        seed: of the random tables.
    Shape:
        ``(T, D)`` -> Routing of T rows; row ``t`` is token ``t``'s expert. Scores and logits as of
        :class:`HashRouter`.
    Raises:
        ConfigError: if a number is below 1, or the domains do not divide the experts.

    Source: Ren et al. 2023, "PanGu-Σ", random routed experts.
    """

    table_QV: Tensor

    def __init__(self, num_experts: int, *, vocab_size: int, num_domains: int, seed: int = 0) -> None:
        super().__init__()
        if num_domains < 1 or num_experts % num_domains:
            raise ConfigError(
                f"num_domains must divide num_experts={num_experts}, got {num_domains}. "
                "Change one so that every domain has as many experts."
            )
        if vocab_size < 1:
            raise ConfigError(
                f"vocab_size must be at least 1, got {vocab_size}. Pass the size of the tokenizer's vocabulary."
            )
        self.num_experts = num_experts
        per_domain = num_experts // num_domains
        # One long draw, a line for each domain: tables of different domains are independent.
        table_V = random_table(num_domains * vocab_size, per_domain, seed)
        first_Q = torch.arange(num_domains, device="cpu") * per_domain
        self.register_exact("table_QV", first_Q[:, None] + table_V.view(num_domains, vocab_size))

    @property
    def num_domains(self) -> int:
        """Q."""
        return self.table_QV.shape[0]

    @property
    def experts_per_token(self) -> float:
        """1."""
        return 1.0

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Look up each token's expert among those of its domain.

        Raises:
            ConfigError: if nobody gave ids or, with more than one, domains; or one lies outside the tables.
        """
        num_domains, vocab_size = self.table_QV.shape
        id_T = _within(context.need("id_T", "Domain hash routing"), vocab_size, "token ids", "vocab_size")
        domain_T = torch.zeros_like(id_T)
        if num_domains > 1:
            domain_T = context.need("domain_T", f"Domain hash routing with {num_domains} domains")
            domain_T = _within(domain_T, num_domains, "domains", "num_domains")
        return given_choices(self.table_QV[domain_T, id_T, None], self.num_experts, x_TD, valid_T)


def _within(index_T: Tensor, limit: int, what: str, option: str) -> Tensor:
    if index_T.numel() and (int(index_T.min()) < 0 or int(index_T.max()) >= limit):
        raise ConfigError(
            f"{what} must be between 0 and {limit - 1}, got {int(index_T.min())} to {int(index_T.max())}. "
            f"Build the router with a larger {option}."
        )
    return index_T


def _check_table(table_V: Tensor, old_V: Tensor, num_experts: int) -> None:
    if table_V.shape != old_V.shape:
        raise ShapeError(
            f"table_V must be ({old_V.shape[0]},), one expert for each token id, got {tuple(table_V.shape)}. "
            "Build the router with the vocab_size of the table."
        )
    if table_V.is_floating_point() or int(table_V.min()) < 0 or int(table_V.max()) >= num_experts:
        raise ConfigError(
            f"table_V must hold whole numbers from 0 to {num_experts - 1}, got {table_V.dtype} from "
            f"{table_V.min().item()} to {table_V.max().item()}. Make the table for num_experts={num_experts}."
        )
