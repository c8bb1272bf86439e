"""Every recipe that transformers has a family for, with the same weights: choices, weights, outputs and gradients.

What each family computes is read from transformers 5.23. Where one differs from the recipe on purpose, the recipe's
``differences`` say so and a test below shows it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from moesaic import MoELayer, Routing, balance, recipes

D, F = 16, 12
DRAWS = range(4)
Get = Callable[[str], Tensor]
Choices = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Family:
    """One recipe in one setting, and the block of transformers that should compute the same.

    Attributes:
        recipe: its name.
        options: what our layer is built with.
        model: the family's module in transformers.
        block: the class of its block.
        config: the class of its configuration, and what it is built with.
        layout: our weights, or gradients, by their names and in their shapes.
        choices: their router's answer for tokens: experts and weights, (T, K) each.
        experts: ways to run the experts that the family offers.
    """

    recipe: str
    options: Mapping[str, Any]
    model: str
    block: str
    config: tuple[str, Mapping[str, Any]]
    layout: Callable[[Get, int], dict[str, Tensor]]
    choices: Callable[[torch.nn.Module, Tensor], Choices]
    experts: tuple[str, ...] = ("eager", "grouped_mm")
    training: bool = True
    more: str = field(default="")

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"transformers.models.{self.model}.modeling_{self.model}")

    def __str__(self) -> str:
        return f"{self.recipe}{self.more and ' ' + self.more}"

    def ours(self) -> MoELayer:
        layer = recipes.get(self.recipe).layer(D, hidden=F, init_std=0.4, **self.options).train(self.training)
        for parameter in layer.parameters():
            if not parameter.detach().any():  # biases
                torch.nn.init.normal_(parameter, std=0.5)
        return layer

    def theirs(self, ours: MoELayer, implementation: str) -> torch.nn.Module:
        name, settings = self.config
        config = getattr(transformers, name)(**settings)
        if name == "SwitchTransformersConfig":
            config.hidden_size = D
        config._experts_implementation = implementation
        block = getattr(self.module, self.block)(config)
        weights = dict(ours.named_parameters())
        layout = self.layout(weights.__getitem__, ours.num_experts)
        assert sorted(layout) == sorted(name for name, _ in block.named_parameters()), "a weight without a partner"
        with torch.no_grad():
            for parameter_name, parameter in block.named_parameters():
                assert parameter.shape == layout[parameter_name].shape, parameter_name
                parameter.copy_(layout[parameter_name])
        return block


def _fused(router: str) -> Callable[[Get, int], dict[str, Tensor]]:
    """Gate above up in one weight, transposed."""

    def layout(get: Get, _num_experts: int) -> dict[str, Tensor]:
        gate_up = torch.cat([get("experts.gate_EDF"), get("experts.up_EDF")], dim=-1)
        return {
            router: get("router.weight"),
            "experts.gate_up_proj": gate_up.transpose(1, 2),
            "experts.down_proj": get("experts.down_EFD").transpose(1, 2),
        }

    return layout


def _shared(get: Get, prefix: str) -> dict[str, Tensor]:
    named = {"gate_proj": "gate_DF", "up_proj": "up_DF", "down_proj": "down_FD"}
    return {f"{prefix}.{theirs}.weight": get(f"shared.{ours}").t() for theirs, ours in named.items()}


def _deepseek_v2(get: Get, num_experts: int) -> dict[str, Tensor]:
    return _fused("gate.weight")(get, num_experts) | _shared(get, "shared_experts")


def _qwen2_moe(get: Get, num_experts: int) -> dict[str, Tensor]:
    gate = {"shared_expert_gate.weight": get("shared.token_gate_D")[None]}
    return _fused("gate.weight")(get, num_experts) | _shared(get, "shared_expert") | gate


def _dbrx(get: Get, num_experts: int) -> dict[str, Tensor]:
    return {
        "router.layer.weight": get("router.weight"),
        "experts.mlp.w1": get("experts.gate_EDF").transpose(1, 2).reshape(num_experts * F, D),
        "experts.mlp.v1": get("experts.up_EDF").transpose(1, 2).reshape(num_experts * F, D),
        "experts.mlp.w2": get("experts.down_EFD").reshape(num_experts * F, D),
    }


def _gpt_oss(get: Get, _num_experts: int) -> dict[str, Tensor]:
    return {
        "router.weight": get("router.weight"),
        "router.bias": get("router.logit_bias_E"),
        "experts.gate_up_proj": torch.stack([get("experts.gate_EDF"), get("experts.up_EDF")], dim=-1).flatten(-2),
        "experts.gate_up_proj_bias": torch.stack(
            [get("experts.gate_bias_EF"), get("experts.up_bias_EF")], dim=-1
        ).flatten(-2),
        "experts.down_proj": get("experts.down_EFD"),
        "experts.down_proj_bias": get("experts.down_bias_ED"),
    }


def _llama4(get: Get, _num_experts: int) -> dict[str, Tensor]:
    return {
        "router.weight": get("router.weight"),
        "experts.gate_up_proj": torch.cat([get("experts.gate_EDF"), get("experts.up_EDF")], dim=-1),
        "experts.down_proj": get("experts.down_EFD"),
    } | _shared(get, "shared_expert")


def _switch(get: Get, num_experts: int) -> dict[str, Tensor]:
    layout = {"router.classifier.weight": get("router.weight")}
    for e in range(num_experts):
        layout[f"experts.expert_{e}.wi.weight"] = get("experts.up_EDF")[e].t()
        layout[f"experts.expert_{e}.wo.weight"] = get("experts.down_EFD")[e].t()
    return layout


def _from_gate(block: torch.nn.Module, x_TD: Tensor) -> Choices:
    _, weight_TK, expert_TK = block.gate(x_TD)
    return expert_TK, weight_TK


def _from_deepseek(block: torch.nn.Module, x_TD: Tensor) -> Choices:
    logits_TE, weight_TK, expert_TK = block.gate(x_TD[None])
    assert logits_TE.shape[0] == x_TD.shape[0]
    return expert_TK, weight_TK


def _from_router(block: torch.nn.Module, x_TD: Tensor) -> Choices:
    _, weight_TK, expert_TK = block.router(x_TD)
    return expert_TK, weight_TK


def _from_dbrx(block: torch.nn.Module, x_TD: Tensor) -> Choices:
    weight_TK, expert_TK = block.route_tokens_to_experts(block.router(x_TD))
    return expert_TK, weight_TK


def _from_llama4(block: torch.nn.Module, x_TD: Tensor) -> Choices:
    scores_TE, _ = block.router(x_TD)
    weight_TK, expert_TK = scores_TE.topk(block.top_k, dim=-1)
    return expert_TK, weight_TK


def _from_switch(block: torch.nn.Module, x_TD: Tensor) -> Choices:
    kept_BPE, weight_BP1, _ = block.router(x_TD[None])
    assert kept_BPE.sum(dim=-1).all(), "dropped"
    return kept_BPE[0].argmax(dim=-1, keepdim=True), weight_BP1[0]


def _sizes(num_experts: str, hidden: str, **more: Any) -> dict[str, Any]:
    return {"hidden_size": D, num_experts: 8, "num_experts_per_tok": 3, hidden: F, **more}


PLAIN = {"num_experts": 8, "top_k": 3}
_V2 = {
    "hidden_size": D,
    "moe_intermediate_size": F,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "num_attention_heads": 4,
}
FAMILIES = [
    Family(
        "switch",
        {"num_experts": 4, "top_k": 1, "jitter": 0.0, "min_capacity": 64},
        "switch_transformers",
        "SwitchTransformersSparseMLP",
        (
            "SwitchTransformersConfig",
            {"d_model": D, "d_ff": F, "num_experts": 4, "expert_capacity": 64, "router_jitter_noise": 0.0}
            | {"dense_act_fn": "relu", "dropout_rate": 0.0},
        ),
        _switch,
        _from_switch,
        experts=("eager",),
    ),
    Family(
        "mixtral",
        PLAIN,
        "mixtral",
        "MixtralSparseMoeBlock",
        ("MixtralConfig", _sizes("num_local_experts", "intermediate_size")),
        _fused("gate.weight"),
        _from_gate,
    ),
    Family(
        "deepseek-moe",
        PLAIN | {"num_shared": 2},
        "deepseek_v2",
        "DeepseekV2Moe",
        ("DeepseekV2Config", _V2 | {"n_routed_experts": 8, "topk_method": "greedy", "routed_scaling_factor": 1.0}),
        _deepseek_v2,
        _from_deepseek,
    ),
    Family(
        "deepseek-v2",
        {"num_experts": 8, "top_k": 3, "num_devices": 1, "devices_per_token": 1, "scale": 1.0},
        "deepseek_v2",
        "DeepseekV2Moe",
        ("DeepseekV2Config", _V2 | {"n_routed_experts": 8, "topk_method": "greedy", "routed_scaling_factor": 1.0}),
        _deepseek_v2,
        _from_deepseek,
        training=False,  # in training ours drops what overfills a device, transformers' nothing
        more="lite",
    ),
    Family(
        "deepseek-v2",
        {"num_experts": 16, "top_k": 3, "num_devices": 4, "devices_per_token": 2, "scale": 16.0},
        "deepseek_v2",
        "DeepseekV2Moe",
        (
            "DeepseekV2Config",
            _V2
            | {"n_routed_experts": 16, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
            | {"routed_scaling_factor": 16.0},
        ),
        _deepseek_v2,
        _from_deepseek,
        training=False,
        more="two of four devices",
    ),
    Family(
        "qwen1.5-moe",
        PLAIN | {"num_shared": 4},
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        (
            "Qwen2MoeConfig",
            _sizes("num_experts", "moe_intermediate_size", shared_expert_intermediate_size=4 * F, norm_topk_prob=False),
        ),
        _qwen2_moe,
        _from_gate,
    ),
    Family(
        "qwen3-moe",
        PLAIN,
        "qwen3_moe",
        "Qwen3MoeSparseMoeBlock",
        ("Qwen3MoeConfig", _sizes("num_experts", "moe_intermediate_size", norm_topk_prob=True)),
        _fused("gate.weight"),
        _from_gate,
    ),
    Family(
        "olmoe",
        PLAIN,
        "olmoe",
        "OlmoeSparseMoeBlock",
        ("OlmoeConfig", _sizes("num_experts", "intermediate_size", norm_topk_prob=False)),
        _fused("gate.weight"),
        _from_gate,
    ),
    Family(
        "dbrx",
        PLAIN,
        "dbrx",
        "DbrxFFN",
        (
            "DbrxConfig",
            {
                "d_model": D,
                "ffn_config": {"hidden_size": D, "ffn_hidden_size": F, "moe_num_experts": 8, "moe_top_k": 3}
                | {"moe_normalize_expert_weights": 1.0},
            },
        ),
        _dbrx,
        _from_dbrx,
        experts=("eager",),
    ),
    Family(
        "jamba",
        PLAIN,
        "jamba",
        "JambaSparseMoeBlock",
        ("JambaConfig", _sizes("num_experts", "intermediate_size")),
        _fused("router.weight"),
        _from_router,
    ),
    Family(
        "gpt-oss",
        PLAIN | {"limit": 1.5},  # so low that both branches are cut off here and there
        "gpt_oss",
        "GptOssMLP",
        ("GptOssConfig", _sizes("num_local_experts", "intermediate_size", swiglu_limit=1.5)),
        _gpt_oss,
        _from_router,
    ),
    Family(
        "llama4",
        {"num_experts": 8, "top_k": 1},
        "llama4",
        "Llama4TextMoe",
        ("Llama4TextConfig", _sizes("num_local_experts", "intermediate_size") | {"num_experts_per_tok": 1}),
        _llama4,
        _from_llama4,
        experts=("eager",),
    ),
]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)
every_way = pytest.mark.parametrize(
    ("family", "implementation"),
    [(family, implementation) for family in FAMILIES for implementation in family.experts],
    ids=lambda value: str(value),
)


def _assert_within_1e_5(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    allowed = 1e-5 * max(1.0, float(expected.detach().abs().max()))
    error = float((actual - expected).detach().abs().max())
    assert error <= allowed, f"{what} is off by {error:.1e}, allowed {allowed:.1e}"


def _dense(routing: Routing) -> Tensor:
    """Each token's weight for each expert, -1 where not chosen."""
    weight_TE = torch.full_like(routing.scores_TE.detach(), -1.0)
    weight_TE[routing.token_N, routing.expert_N] = routing.weight_N.detach()
    return weight_TE


@every_family
def test_the_router_chooses_and_weighs_as_transformers_does(family):
    for draw in DRAWS:
        torch.manual_seed(draw)
        ours = family.ours()
        theirs = family.theirs(ours, family.experts[0])
        x_TD = torch.randn(63, D)
        expert_TK, weight_TK = family.choices(theirs, x_TD)
        expected_TE = torch.full((63, ours.num_experts), -1.0).scatter(1, expert_TK, weight_TK.detach())
        actual_TE = _dense(ours.router(x_TD))
        assert torch.equal(actual_TE >= 0, expected_TE >= 0), "choices"
        _assert_within_1e_5(actual_TE, expected_TE, "weights")
        assert weight_TK.detach().std() > 0.01


@every_way
@pytest.mark.parametrize("num_tokens", [1, 7, 63])
def test_the_block_agrees_with_transformers_in_outputs_and_every_gradient(family, implementation, num_tokens):
    for draw in DRAWS:
        torch.manual_seed(draw)
        ours = family.ours()
        theirs = family.theirs(ours, implementation)
        x_TD = torch.randn(num_tokens, D, requires_grad=True)
        x_BPD = x_TD.detach().clone().unsqueeze(0).requires_grad_()
        y_TD, routing = ours(x_TD)
        answer = theirs(x_BPD)
        expected_TD = (answer[0] if isinstance(answer, tuple) else answer).reshape(num_tokens, D)
        assert routing.kept_N.all()
        assert float(expected_TD.detach().abs().mean()) > 0.05
        _assert_within_1e_5(y_TD, expected_TD, "outputs")
        probe_TD = torch.randn(num_tokens, D)
        y_TD.backward(probe_TD)
        expected_TD.backward(probe_TD)
        _assert_within_1e_5(x_TD.grad, x_BPD.grad[0], "gradient of the input")
        gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
        layout = family.layout(gradients.__getitem__, ours.num_experts)
        for name, parameter in theirs.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            _assert_within_1e_5(layout[name], expected, f"gradient of {name}")


@every_family
def test_no_tokens_give_no_outputs_and_gradients_of_zero(family):
    ours = family.ours()
    y_TD, _ = ours(torch.zeros(0, D))
    assert y_TD.shape == (0, D)
    y_TD.sum().backward()
    assert all(float(parameter.grad.abs().sum()) == 0 for parameter in ours.parameters())


def test_both_branches_of_gpt_oss_are_cut_off_in_these_tests():
    family = next(family for family in FAMILIES if family.recipe == "gpt-oss")
    experts = family.ours().experts
    x_TD = torch.randn(63, D)
    for weight_EDF, bias_EF in ((experts.gate_EDF, experts.gate_bias_EF), (experts.up_EDF, experts.up_bias_EF)):
        before = torch.einsum("td,edf->tef", x_TD, weight_EDF) + bias_EF
        assert 0.05 < float((before.abs() > 1.5).float().mean()) < 0.6


# transformers' loss of Mixtral stands in each of these files; its name for the coefficient differs.
POOLED = {
    "mixtral": "router_aux_loss_coef",
    "qwen2_moe": "router_aux_loss_coef",
    "qwen3_moe": "router_aux_loss_coef",
    "olmoe": "router_aux_loss_coef",
    "dbrx": None,
    "jamba": "router_aux_loss_coef",
    "gpt_oss": "router_aux_loss_coef",
}
pooled = [family for family in FAMILIES if family.model in POOLED]


@pytest.mark.parametrize("family", pooled, ids=str)
def test_transformers_loss_is_ours_times_k_for_one_layer_and_pools_several_before_it_multiplies(family):
    for draw in DRAWS:
        torch.manual_seed(draw)
        routings = [family.ours().router(torch.randn(40, D)) for _ in range(3)]
        top_k, num_experts = routings[0].num_rows // 40, routings[0].num_experts
        loss = family.module.load_balancing_loss_func
        for routing in routings:
            theirs = float(loss((routing.logits_TE,), num_experts, top_k).detach())
            assert theirs == pytest.approx(top_k * float(balance.switch_loss(routing).detach()), rel=1e-5)
        theirs = float(loss(tuple(routing.logits_TE for routing in routings), num_experts, top_k).detach())
        share_E = sum(routing.load_E / routing.num_rows for routing in routings) / 3
        mean_E = sum(routing.probability_TE.mean(dim=0) for routing in routings) / 3
        assert theirs == pytest.approx(top_k * num_experts * float((share_E * mean_E).sum().detach()), rel=1e-5)
        of_layers = sum(float(balance.switch_loss(routing).detach()) for routing in routings)
        assert theirs != pytest.approx(top_k * of_layers / 3, rel=1e-2)


def test_transformers_loss_of_switch_is_ours():
    family = FAMILIES[0]
    routing = family.ours().router(torch.randn(40, D))
    expert_BP = routing.expert_N.view(1, 40)
    theirs = family.module.load_balancing_loss_func(routing.scores_TE[None], expert_BP)
    assert float(theirs.detach()) == pytest.approx(float(balance.switch_loss(routing).detach()), rel=1e-5)
    z = family.module.router_z_loss_func(routing.logits_TE[None])
    assert float(z.detach()) == pytest.approx(float(balance.z_loss(routing).detach()), rel=1e-5)


@pytest.mark.parametrize("model", ["deepseek_v2", "llama4"])
def test_these_families_have_no_balance_loss_in_transformers(model):
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    assert not hasattr(module, "load_balancing_loss_func")


@pytest.mark.parametrize("recipe", ["mixtral", "qwen1.5-moe", "jamba", "gpt-oss"])
def test_a_coefficient_that_only_transformers_has_is_taken_times_k(recipe):
    family = next(family for family in FAMILIES if family.recipe == recipe)
    coefficient = getattr(getattr(transformers, family.config[0])(), POOLED[family.model])
    (term,) = recipes.get(recipe).losses
    assert term.coefficient == pytest.approx(coefficient * recipes.get(recipe).options["top_k"])


def test_masked_devices_tie_with_underflowed_ones_in_transformers_and_not_here():
    """transformers fills the scores of devices left out with 0, which an allowed expert's score can be too."""
    family = next(family for family in FAMILIES if str(family) == "deepseek-v2 two of four devices")
    ours = family.ours()
    with torch.no_grad():
        ours.router.weight.zero_()
        # Devices hold experts 0-3, 4-7, and so on. Device 3 is best by far, then device 2; all else underflows.
        logits_E = torch.full((16,), -300.0)
        logits_E[12], logits_E[8] = 0.0, -200.0
        ours.router.weight[:, 0] = logits_E
    theirs = family.theirs(ours, "eager")
    x_TD = torch.eye(D)[:1]
    experts = set(ours.router(x_TD).expert_N.tolist())
    assert {8, 12} < experts
    assert experts <= set(range(8, 16))
    assert float(theirs.gate(x_TD[None])[1].detach().min()) == 0.0
