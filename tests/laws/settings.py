"""Small layers of every recipe, in the settings that every law is tried on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic import Context, MoELayer, Routing, balance, recipes
from moesaic.dispatch import Capacity, Sort
from moesaic.experts import GatedExperts, MLPExperts
from moesaic.recipes import Recipe
from moesaic.routers import TopKRouter

WIDTH, HIDDEN, VOCABULARY = 8, 6, 50


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
        return list(self.recipe.losses)

    def layer(self, width: int = WIDTH, **changes: Any) -> MoELayer:
        options = {"init_std": 0.5, "gate_init_std": 0.5, **self.options, **changes}
        options = {name: value for name, value in options.items() if name in self.recipe.options}
        layer = self.recipe.layer(width, hidden=HIDDEN, **options)
        if (
            getattr(getattr(layer, "router", None), "bias_E", None) is not None
        ):  # large enough to change what is chosen, and partly negative
            layer.router.bias_E.copy_(torch.linspace(-0.6, 0.5, layer.router.num_experts).roll(2))
        for parameter in layer.parameters():  # biases that start at 0 would hide what becomes of them
            if not parameter.detach().any():
                torch.nn.init.normal_(parameter, std=0.5)
        return layer

    def deterministic_layer(self, **changes: Any) -> MoELayer:
        """In training, without noise."""
        noise = ("jitter", "dropout", "expert_dropout", "noise_std")
        return self.layer(**{name: 0.0 for name in noise if name in self.recipe.options}, **changes)

    def aux_loss(self, routing: Routing) -> Tensor:
        routing = self.rewarded(routing)
        return sum((term(routing) for term in self.losses), start=routing.logits_TE.new_zeros(()))

    def rewarded(self, routing: Routing) -> Routing:
        """The table with a reward for each token, which a model would give, if one of the losses asks for it."""
        if not any(getattr(term, "rewarded", False) for term in self.losses):
            return routing
        reward_T = -torch.linspace(1, 3, routing.num_tokens, dtype=routing.logits_TE.dtype).sin().square()
        return replace(routing, extras={**routing.extras, "reward_T": reward_T})

    @property
    def is_dropless(self) -> bool:
        return not hasattr(self.layer().dispatch, "capacity")

    def __str__(self) -> str:
        return "-".join([self.recipe_name, *(f"{name}={value}" for name, value in self.options.items())])


# What a recipe needs to be of interest when it is small.
SPECIAL: dict[str, dict[str, Any]] = {
    # As hot as it starts, all experts are active and no loss can tell them apart.
    "evo-moe": {"temperature": 0.1, "end_temperature": 0.05},
}


def plain(recipe_name: str) -> Setting:
    """The setting that any recipe, one added tomorrow too, can be built in: 8 experts, 1 choice or 2."""
    published = recipes.get(recipe_name).options
    options = {"num_experts": 8, "vocab_size": VOCABULARY}
    if "top_k" in published:
        options["top_k"] = 1 if published["top_k"] == 1 else 2
    options |= SPECIAL.get(recipe_name, {})
    return Setting(recipe_name, {name: value for name, value in options.items() if name in published})


MORE = [
    Setting("switch", {"num_experts": 4, "top_k": 1, "capacity_factor": 0.5, "min_capacity": 1, "jitter": 0.3}),
    Setting("switch", {"num_experts": 6, "top_k": 3, "capacity_factor": 0.75, "min_capacity": 0, "activation": "gelu"}),
    Setting("mixtral", {"num_experts": 7, "top_k": 4, "jitter": 0.3, "activation": "gelu_tanh"}),
    Setting("mixtral", {"num_experts": 3, "top_k": 3}),
    Setting("deepseek-v3", {"num_experts": 16, "top_k": 3, "num_groups": 4, "groups_kept": 2, "num_shared": 2}),
    Setting("deepseek-v3", {"num_experts": 6, "top_k": 2, "num_shared": 0, "scale": 1.0}),
    Setting("deepseek-moe", {"num_experts": 6, "top_k": 3, "num_shared": 0}),
    Setting("deepseek-v2", {"num_experts": 16, "top_k": 3, "num_devices": 4, "devices_per_token": 2, "num_shared": 1}),
    Setting(
        "deepseek-v2",
        {"num_experts": 12, "top_k": 4, "num_devices": 3, "devices_per_token": 2, "num_shared": 0}
        | {"capacity_factor": 0.7, "never_dropped": 0.4},
    ),
    Setting("qwen1.5-moe", {"num_experts": 6, "top_k": 5, "num_shared": 1}),
    Setting("arctic", {"num_experts": 4, "top_k": 3, "dense_hidden": 5}),
    Setting("skywork", {"num_experts": 5, "top_k": 2, "sharpness": 2.0, "capacity_factor": 0.6, "min_capacity": 1}),
    Setting("llama4", {"num_experts": 5, "top_k": 2, "num_shared": 0}),
    Setting("gpt-oss", {"num_experts": 5, "top_k": 3, "limit": 0.8, "alpha": 1.0}),
    Setting("evo-moe", {"num_experts": 6, "top_k": 3, "temperature": 0.5, "threshold": 0.1}),
    Setting("evo-moe", {"num_experts": 5, "top_k": 2, "temperature": 1.0, "hard_after": 0, "cooling": "linear"}),
    Setting("reinforce", {"num_experts": 6, "top_k": 3}),
    Setting("cosine", {"num_experts": 6, "top_k": 2, "score": "sigmoid", "inner_width": 3}),
    Setting("top-p", {"num_experts": 6, "top_p": 0.75}),
    Setting("top-p", {"num_experts": 5, "top_p": 1.0}),
    Setting("ds-moe", {"num_experts": 6, "top_k": 4, "threshold": 0.2}),
    Setting("attention", {"num_experts": 5, "top_k": 5}),
    Setting("relu", {"num_experts": 6, "top_k": 2, "activation": "gelu"}),
    Setting("base", {"num_experts": 3, "top_k": 1, "sublayers": 3, "activation": "gelu"}),
    Setting("base", {"num_experts": 4, "top_k": 1, "assign_tokens": 16}),
    Setting("sinkhorn", {"num_experts": 6, "top_k": 3, "activation": "relu"}),
    Setting("hash", {"num_experts": 3, "top_k": 1, "vocab_size": 50, "seed": 7, "activation": "silu"}),
    Setting("hash", {"num_experts": 3, "top_k": 1, "vocab_size": 50, "activation": "silu", "gated": True}),
    Setting("thor", {"num_experts": 3, "top_k": 1, "activation": "gelu"}),
    Setting("pangu-sigma", {"num_experts": 6, "top_k": 1, "vocab_size": 60, "num_domains": 2}),
    Setting("pangu-sigma", {"num_experts": 5, "top_k": 1, "vocab_size": 50}),
    Setting("expert-choice", {"num_experts": 6, "top_k": 2, "group": "sequence"}),
    Setting("expert-choice", {"num_experts": 4, "top_k": 1, "capacity_factor": 0.5}),
    Setting("expert-choice", {"num_experts": 5, "top_k": 2, "capacity_factor": 1.5, "cap": 2}),
    Setting("expert-choice", {"num_experts": 4, "top_k": 1, "cap": 1}),
    Setting("expert-choice", {"num_experts": 5, "top_k": 2, "cap": 2, "group": "sequence", "activation": "relu"}),
    Setting("mod", {"num_experts": 1, "capacity": 0.5}),
    Setting("mod", {"num_experts": 3, "capacity": 0.4}),
    Setting("shazeer-2017", {"num_experts": 6, "top_k": 3, "noise_epsilon": 0.01, "activation": "gelu"}),
    Setting("shazeer-2017", {"num_experts": 3, "top_k": 3}),
    Setting("hierarchical-2017", {"num_experts": 12, "top_k": 2, "num_groups": 4}),
    Setting("hierarchical-2017", {"num_experts": 5, "top_k": 2}),
    Setting("strictly-balanced-2017", {"num_experts": 5, "top_k": 1}),
    Setting("gshard", {"num_experts": 4, "top_k": 2, "capacity_factor": 0.75, "min_capacity": 1, "group_size": 4}),
    Setting("gshard", {"num_experts": 6, "top_k": 3, "second_threshold": 0.3, "min_capacity": 0}),
    Setting("st-moe", {"num_experts": 4, "top_k": 2, "sparse_dense": False, "min_capacity": 1, "group_size": 7}),
    Setting("openmoe", {"num_experts": 4, "top_k": 2, "min_capacity": 1, "capacity_factor": 0.75}),
    Setting("llama-moe", {"num_experts": 6, "top_k": 2, "gate_network": "linear", "scale": 1.0}),
    Setting("residual-moe", {"num_experts": 4, "top_k": 1, "combine": "learned", "capacity_factor": 0.5}),
    Setting("soft-moe", {"num_experts": 3, "slots_per_expert": 3, "activation": "relu"}),
    Setting("smear", {"num_experts": 3, "activation": "gelu"}),
    Setting("lory", {"num_experts": 4, "segment": 2}),
    Setting("lory", {"num_experts": 3, "segment": 1, "activation": "gelu"}),
    Setting("lora-moe", {"num_experts": 5, "rank": 3, "alpha": 6.0, "train_base": True}),
    Setting("mixlora", {"num_experts": 5, "top_k": 3, "rank": 2, "alpha": 2.0, "train_base": True}),
    Setting("mole", {"num_experts": 3, "rank": 2, "train_experts": True, "activation": "gelu"}),
    Setting("moe++", {"num_experts": 12, "top_k": 2, "router_net": "tanh", "tau": 0.25, "capacity_factor": 0.6}),
    Setting("moe++", {"num_experts": 7, "top_k": 3, "num_zero": 0, "num_copy": 2, "eval_capacity_factor": 0.5}),
]
SETTINGS = [*(plain(name) for name in recipes.names()), *MORE]


def _is_plain_token_choice(setting: Setting) -> bool:
    """Whether each token chooses K experts, and nothing but a capacity for each expert and a shared one is beside."""
    layer = setting.layer()
    return (
        isinstance(layer, MoELayer)
        and type(layer.router) is TopKRouter
        and type(layer.dispatch) in (Sort, Capacity)
        and type(layer.experts) in (GatedExperts, MLPExperts)
        and getattr(layer.experts, "weigh", "output") == "output"
        and layer.mix is None
    )


TOKEN_CHOICE = [setting for setting in SETTINGS if _is_plain_token_choice(setting)]
TOKEN_CHOICE_NAMES = list(dict.fromkeys(setting.recipe_name for setting in TOKEN_CHOICE))


def every_setting(*settings: Setting) -> pytest.MarkDecorator:
    """Run a test on each setting; on those given, or on all whose tokens choose a fixed number of experts."""
    return pytest.mark.parametrize("setting", settings or TOKEN_CHOICE, ids=str)


def tokens(num_tokens: int, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_tokens, width, dtype=torch.float64).to(dtype)


def context_for(num_tokens: int, setting: Setting, dtype: torch.dtype = torch.float64) -> Context:
    """All that a router may ask for: sequences of five tokens, ids, two domains that alternate, logits from below."""
    sequence_T = torch.arange(num_tokens) // 5
    return Context(
        sequence_T=sequence_T,
        id_T=torch.randint(VOCABULARY, (num_tokens,)),
        domain_T=sequence_T % 2,
        below_TE=torch.randn(num_tokens, setting.num_experts, dtype=torch.float64).to(dtype),
    )


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
