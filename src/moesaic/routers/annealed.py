"""The dense-to-sparse gate: a softmax with Gumbel noise that starts out soft and cools until few experts are left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moesaic.core.context import NO_CONTEXT, Context
from moesaic.core.errors import ConfigError
from moesaic.core.init import Init
from moesaic.core.routing import Routing
from moesaic.routers.dense import best_above
from moesaic.routers.linear import LinearRouter
from moesaic.routers.select import select_top_k
from moesaic.routers.token_choice import check_top_k


@dataclass(frozen=True, kw_only=True, slots=True)
class Cooling:
    """How a temperature falls with the optimizer's steps.

    Attributes:
        start: temperature before the first step.
        end: temperature from step ``num_steps`` on.
        num_steps: steps from start to end.
        kind: "exponential" falls by the same factor each step, "linear" by the same amount.
        hard_after: steps after which only a token's best expert stays active; None for never.
    Raises:
        ConfigError: if the temperature would not fall or not stay positive, or a number of steps is out of range.
    """

    start: float = 2.0
    end: float = 0.3
    num_steps: int = 10_000
    kind: Literal["exponential", "linear"] = "exponential"
    hard_after: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.end <= self.start:
            raise ConfigError(
                f"the end temperature must be above 0 and at most the start of {self.start}, got {self.end}. "
                "EvoMoE cools from about 2 to 0.3."
            )
        if self.num_steps < 1:
            raise ConfigError(f"num_steps must be at least 1, got {self.num_steps}. EvoMoE cools for thousands.")
        if self.kind not in ("exponential", "linear"):
            raise ConfigError(f"kind must be 'exponential' or 'linear', got {self.kind!r}. EvoMoE has both.")
        if self.hard_after is not None and self.hard_after < 0:
            raise ConfigError(f"hard_after must be at least 0, got {self.hard_after}. Use None for never.")

    def temperature(self, step: Tensor) -> Tensor:
        """The temperature after this many steps, float32."""
        done = (step.float() / self.num_steps).clamp(max=1)
        if self.kind == "linear":
            return self.start + (self.end - self.start) * done
        return self.start * (math.log(self.end / self.start) * done).exp()

    def hard(self, step: Tensor) -> Tensor:
        """Whether only the best expert stays active after this many steps, bool."""
        return step >= self.hard_after if self.hard_after is not None else torch.zeros_like(step, dtype=torch.bool)


class AnnealedRouter(LinearRouter):
    """Keep the experts whose share of ``softmax((x W + noise) / temperature)`` exceeds a small threshold.

    In training the noise is Gumbel, drawn as ``-log(exponential)`` for all (T, E) in one call; in evaluation there is
    none, and at most ``top_k`` experts stay. The shares weigh as they are, not renormalised. While hot, nearly every
    expert is active; a :class:`~moesaic.balance.AnnealingController` cools the router once per optimizer step.
    ``temperature`` (float32), ``hard`` and ``cooled``, the steps so far, are buffers that are saved with the model.

    Args:
        width: D, the width of a token.
        num_experts: E.
        top_k: most experts per token in evaluation.
        threshold: share that an active expert exceeds. A token's best expert stays active whatever its share.
        cooling: how the temperature falls.
        init: draws the initial weights.
    Shape:
        ``(T, D)`` -> Routing of at least T and at most ``T * E`` rows, a token's largest weight first. Its scores are
        the shares, its logits ``x W``.
    Raises:
        ConfigError: if ``top_k`` is not in ``1..num_experts``, or ``threshold`` not in ``[0, 1)``.

    Source: Nie et al. 2021, EvoMoE, dense-to-sparse gate, and the authors' code.
    """

    temperature: Tensor
    hard: Tensor
    cooled: Tensor

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 1,
        threshold: float = 0.001,
        cooling: Cooling | None = None,
        init: Init | None = None,
    ) -> None:
        check_top_k(top_k, num_experts)
        if not 0 <= threshold < 1:
            raise ConfigError(f"threshold must be at least 0 and less than 1, got {threshold}. EvoMoE uses 0.001.")
        super().__init__(width, num_experts, init=init)
        self.top_k = top_k
        self.threshold = threshold
        self.cooling = cooling or Cooling()
        step = torch.zeros((), dtype=torch.int64)
        self.register_exact("cooled", step)
        self.register_exact("temperature", self.cooling.temperature(step))
        self.register_exact("hard", self.cooling.hard(step))

    @property
    def experts_per_token(self) -> float:
        """The most that a token can visit: all in training, 1 once hard, ``top_k`` in evaluation."""
        # A model that only counts its parameters, on the meta device, has not cooled.
        if not self.hard.is_meta and bool(self.hard):
            return 1.0
        return float(self.num_experts if self.training else self.top_k)

    @torch.no_grad()
    def cool(self) -> None:
        """Move temperature and hardness on by one optimizer step."""
        self.cooled += 1
        self.temperature.copy_(self.cooling.temperature(self.cooled))
        self.hard.copy_(self.cooling.hard(self.cooled))

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None, context: Context = NO_CONTEXT) -> Routing:
        """Write the table for one batch of tokens."""
        logits_TE = self.logits(x_TD)
        noisy_TE = logits_TE
        if self.training:
            noisy_TE = logits_TE - exponential_like(logits_TE).log()
        # A copy: a controller moves the buffer, and the graph must not see it move.
        share_TE = (noisy_TE / self.temperature.clone().to(logits_TE.dtype)).softmax(dim=-1)
        best_TE = noisy_TE.detach()
        chosen_TE = best_above(
            best_TE, share_TE.detach(), self.threshold, self.num_experts if self.training else self.top_k
        )
        first_T1 = select_top_k(best_TE, 1)
        chosen_TE = chosen_TE & (~self.hard | torch.zeros_like(chosen_TE).scatter(1, first_T1, True))
        return Routing.from_mask(chosen_TE, share_TE, logits_TE, share_TE, valid_T)


def exponential_like(logits_TE: Tensor) -> Tensor:
    """Draw from the exponential distribution; ``-log`` of it is Gumbel noise. Never 0, whose logarithm is infinite."""
    return torch.empty_like(logits_TE).exponential_().clamp_min(torch.finfo(logits_TE.dtype).tiny)
