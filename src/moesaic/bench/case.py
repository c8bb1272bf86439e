"""What is measured: sizes of a layer and a batch, and how evenly tokens choose."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moesaic.core.errors import ConfigError
from moesaic.routers.token_choice import check_top_k


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One layer and one batch.

    Attributes:
        name: what tables and options call it.
        num_experts: E.
        top_k: K.
        hidden: F, the hidden width of one expert.
        width: D.
        num_tokens: T.
        shared_hidden: hidden width of the expert that every token visits; 0 for none.
        zipf: how uneven the load is: expert number r in popularity is drawn in proportion to ``r ** -zipf``; 0 draws
            all alike.
    Raises:
        ConfigError: if a size is below 1, or there are more experts than a token is wide: a linear router could then
            not be made to choose as drawn.
    """

    name: str
    num_experts: int
    top_k: int
    hidden: int
    width: int = 512
    num_tokens: int = 4096
    shared_hidden: int = 0
    zipf: float = 0.0

    def __post_init__(self) -> None:
        check_top_k(self.top_k, self.num_experts)
        for name in ("hidden", "width", "num_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}. Give the case a size.")
        if self.num_experts > self.width:
            raise ConfigError(
                f"a case needs no more experts than its width of {self.width}, got {self.num_experts}. "
                "Raise --width, or lower --experts."
            )
        if self.zipf < 0:
            raise ConfigError(f"zipf must be at least 0, got {self.zipf}. 0 is balanced, 1 is Zipf's own law.")

    @property
    def active_hidden(self) -> int:
        """Hidden width of the dense layer of equal active FLOPs."""
        return self.top_k * self.hidden + self.shared_hidden

    @property
    def num_rows(self) -> int:
        """Rows of the table, T * K."""
        return self.num_tokens * self.top_k

    @property
    def load(self) -> str:
        """How even the load is, in words."""
        return f"Zipf {self.zipf:g}" if self.zipf else "balanced"

    @property
    def flops(self) -> int:
        """Of the products of one forward; a training step has three times as many."""
        return 6 * self.num_tokens * self.width * self.active_hidden

    def with_shared(self) -> Case:
        """The same with a shared expert as wide as a routed token's experts together, under the same name."""
        return replace(self, shared_hidden=self.top_k * self.hidden)

    def tiny(self, num_tokens: int = 96) -> Case:
        """A small draw of the same kind: as many experts and choices, little of all else."""
        return replace(
            self,
            num_tokens=min(self.num_tokens, num_tokens),
            width=min(self.width, max(32, self.num_experts)),
            hidden=min(self.hidden, 24),
            shared_hidden=min(self.shared_hidden, 40),
        )


COARSE = Case(name="coarse", num_experts=8, top_k=2, hidden=1024)
FINE = Case(name="fine", num_experts=64, top_k=8, hidden=256)
VERY_FINE = Case(name="very-fine", num_experts=256, top_k=8, hidden=256)
BIG_COARSE = Case(name="big-coarse", num_experts=8, top_k=2, hidden=14336, width=4096, num_tokens=16384)
BIG_FINE = Case(name="big-fine", num_experts=64, top_k=8, hidden=1024, width=2048, num_tokens=16384)

CASES = {case.name: case for case in (COARSE, FINE, VERY_FINE, BIG_COARSE, BIG_FINE)}
"""By name; the last two are for GPUs."""


def variants(base: Case) -> tuple[Case, ...]:
    """What else is measured of one case: with a shared expert, and with Zipf's load."""
    return base.with_shared(), replace(base, zipf=1.0)


def case(name: str) -> Case:
    """The case of a name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in CASES:
        raise ConfigError(f"case must be one of {', '.join(CASES)}, got {name!r}. Pick one, and change its sizes.")
    return CASES[name]
