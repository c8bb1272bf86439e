"""Small layers of every recipe, in the settings that every law is tried on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic import MoELayer, Routing, balance, recipes
from moesaic.recipes import Recipe

WIDTH, HIDDEN = 8, 6


@dataclass(frozen=True)
class Setting:
    """A recipe and the options that it is built with; weights wide enough that no result is near 0 by accident."""

    recipe_name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        return recipes.get(self.recipe_name)

    @property
    def top_k(self) -> int:
        return self.options["top_k"]

    @property
    def num_experts(self) -> int:
        return self.options["num_experts"]

    @property
    def losses(self) -> list[balance.LossTerm]:
        return [term for term in self.recipe.balance if isinstance(term, balance.LossTerm)]

    def layer(self, width: int = WIDTH, **changes: Any) -> MoELayer:
        options = {"init_std": 0.5, **self.options, **changes}
        layer = self.recipe.layer(width, hidden=HIDDEN, **options)
        if layer.router.bias_E is not None:  # large enough to change what is chosen, and partly negative
            layer.router.bias_E.copy_(torch.linspace(-0.6, 0.5, layer.router.num_experts).roll(2))
        return layer

    def deterministic_layer(self, **changes: Any) -> MoELayer:
        """In training, without noise."""
        return self.layer(**({"jitter": 0.0} if "jitter" in self.recipe.options else {}), **changes)

    def aux_loss(self, routing: Routing) -> Tensor:
        return sum((term(routing) for term in self.losses), start=routing.logits_TE.new_zeros(()))

    @property
    def is_dropless(self) -> bool:
        return not hasattr(self.layer().dispatch, "capacity")

    def __str__(self) -> str:
        return "-".join([self.recipe_name, *(f"{name}={value}" for name, value in self.options.items())])


def plain(recipe_name: str) -> Setting:
    """The setting that any recipe, one added tomorrow too, can be built in: 8 experts, 1 choice or 2."""
    few = recipes.get(recipe_name).options["top_k"] == 1
    return Setting(recipe_name, {"num_experts": 8, "top_k": 1 if few else 2})


MORE = [
    Setting("switch", {"num_experts": 4, "top_k": 1, "capacity_factor": 0.5, "min_capacity": 1, "jitter": 0.3}),
    Setting("switch", {"num_experts": 6, "top_k": 3, "capacity_factor": 0.75, "min_capacity": 0, "activation": "gelu"}),
    Setting("mixtral", {"num_experts": 7, "top_k": 4, "jitter": 0.3, "activation": "gelu_tanh"}),
    Setting("mixtral", {"num_experts": 3, "top_k": 3}),
    Setting("deepseek-v3", {"num_experts": 16, "top_k": 3, "num_groups": 4, "groups_kept": 2, "num_shared": 2}),
    Setting("deepseek-v3", {"num_experts": 6, "top_k": 2, "num_shared": 0, "scale": 1.0}),
]
SETTINGS = [*(plain(name) for name in recipes.names()), *MORE]


def every_setting(*settings: Setting) -> pytest.MarkDecorator:
    """Run a test on each setting; on those given, or on all."""
    return pytest.mark.parametrize("setting", settings or SETTINGS, ids=str)


def tokens(num_tokens: int, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_tokens, width, dtype=torch.float64).to(dtype)


def some_padding(num_tokens: int) -> Tensor:
    """About a third of the tokens, never the same pattern twice, never all of them."""
    valid_T = torch.rand(num_tokens) > 0.35
    valid_T[num_tokens // 2 : num_tokens // 2 + 1] = True
    return valid_T


def gradients(layer: MoELayer) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in layer.named_parameters()}


def rows(routing: Routing) -> set[tuple[int, int]]:
    """The (token, expert) pairs of valid rows."""
    keep_N = routing.valid_N
    return set(zip(routing.token_N[keep_N].tolist(), routing.expert_N[keep_N].tolist(), strict=True))
