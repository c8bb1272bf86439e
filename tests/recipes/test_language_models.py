"""Modern language models are built as published."""

import pytest
import torch

from moesaic import ConfigError, recipes
from moesaic.balance import (
    AdaptiveRule,
    LossTerm,
    communication_loss,
    device_loss,
    even_gate_loss,
    global_batch_loss,
    sequence_loss,
    switch_loss,
    z_loss,
)
from moesaic.dispatch import Capacity, DeviceCapacity, Sort
from moesaic.experts import BiasedExperts, GatedExperts
from tests.laws.settings import Setting

# Routed experts, choices, normalisation of the weights, initial width of the experts, activation.
PLAIN = {
    "deepseek-moe": (64, 6, "scores", 0.006, "silu"),
    "grok-1": (8, 2, "scores", 0.02, "gelu_tanh"),
    "dbrx": (16, 4, "chosen", 0.02, "silu"),
    "qwen1.5-moe": (60, 4, "scores", 0.02, "silu"),
    "jamba": (16, 2, "scores", 0.02, "silu"),
    "arctic": (128, 2, "chosen", 0.02, "silu"),
    "deepseek-v2": (160, 6, "scores", 0.006, "silu"),
    "olmoe": (64, 8, "scores", 0.02, "silu"),
    "llama4": (16, 1, "scores", 0.02, "silu"),
    "qwen3-moe": (128, 8, "chosen", 0.02, "silu"),
}
NAMES = [*PLAIN, "skywork", "gpt-oss"]


@pytest.mark.parametrize("name", PLAIN)
def test_sizes_weights_and_activations_are_the_published_ones(name):
    num_experts, top_k, normalize, std, activation = PLAIN[name]
    layer = recipes.get(name).layer(16, hidden=12)
    assert (layer.num_experts, layer.router.top_k, layer.router.normalize) == (num_experts, top_k, normalize)
    assert isinstance(layer.experts, GatedExperts)
    assert layer.experts.activation.name == activation
    assert float(layer.experts.up_EDF.detach().std()) == pytest.approx(std, rel=0.05)
    assert layer.experts.weigh == ("input" if name == "llama4" else "output")
    assert isinstance(layer.dispatch, DeviceCapacity if name == "deepseek-v2" else Sort)
    assert layer.router.score.name == ("sigmoid" if name == "llama4" else "softmax")
    assert layer.router.scale == (16.0 if name == "deepseek-v2" else 1.0)


@pytest.mark.parametrize(
    ("name", "shared", "has_token_gate"),
    [
        ("deepseek-moe", 2 * 12, False),
        ("deepseek-v2", 2 * 12, False),
        ("qwen1.5-moe", 4 * 12, True),
        ("arctic", 16, False),
        ("llama4", 12, False),
        ("grok-1", None, False),
        ("dbrx", None, False),
        ("jamba", None, False),
        ("skywork", None, False),
        ("olmoe", None, False),
        ("qwen3-moe", None, False),
        ("gpt-oss", None, False),
    ],
)
def test_what_every_token_visits_is_as_wide_as_published(name, shared, has_token_gate):
    layer = recipes.get(name).layer(16, hidden=12)
    assert (layer.shared and layer.shared.up_DF.shape[1]) == shared
    assert (getattr(layer.shared, "token_gate_D", None) is not None) == has_token_gate


@pytest.mark.parametrize(
    ("name", "balance"),
    [
        ("deepseek-moe", (LossTerm(name="sequence", loss=sequence_loss, coefficient=0.001),)),
        (
            "deepseek-v2",
            (
                LossTerm(name="expert", loss=sequence_loss, coefficient=0.003),
                LossTerm(name="device", loss=device_loss, coefficient=0.05),
                LossTerm(name="communication", loss=communication_loss, coefficient=0.02),
            ),
        ),
        (
            "skywork",
            (
                LossTerm(name="even-gate", loss=even_gate_loss, coefficient=1.0, adaptive=True),
                AdaptiveRule(xi=1 / 5, alpha_max=0.01, beta=0.99),
            ),
        ),
        ("qwen1.5-moe", (LossTerm(name="switch", loss=switch_loss, coefficient=0.004),)),
        ("qwen3-moe", (LossTerm(name="global-batch", loss=global_batch_loss, coefficient=0.01),)),
        (
            "olmoe",
            (
                LossTerm(name="switch", loss=switch_loss, coefficient=0.01),
                LossTerm(name="z", loss=z_loss, coefficient=0.001),
            ),
        ),
        ("dbrx", (LossTerm(name="switch", loss=switch_loss, coefficient=0.05),)),
        ("jamba", (LossTerm(name="switch", loss=switch_loss, coefficient=0.002),)),
        ("grok-1", (LossTerm(name="switch", loss=switch_loss, coefficient=0.01),)),
        ("arctic", (LossTerm(name="switch", loss=switch_loss, coefficient=0.002),)),
        ("gpt-oss", (LossTerm(name="switch", loss=switch_loss, coefficient=0.004),)),
        ("llama4", (LossTerm(name="switch", loss=switch_loss, coefficient=0.001),)),
    ],
)
def test_balance_is_the_published_one(name, balance):
    assert recipes.get(name).balance == balance


# Reference 23.3: parameters of one expert in millions, at the released model's width and hidden width.
EXPERT_SIZES = [
    ("deepseek-moe", 2048, 1408, 8.65),
    ("deepseek-v2", 5120, 1536, 23.59),
    ("qwen3-moe", 2048, 768, 4.72),
    ("qwen3-moe", 4096, 1536, 18.87),
    ("olmoe", 2048, 1024, 6.29),
    ("gpt-oss", 2880, 2880, 24.89),
    ("dbrx", 6144, 10752, 198.2),
    ("grok-1", 6144, 32768, 604.0),
    ("llama4", 5120, 8192, 125.8),
    ("arctic", 7168, 4864, 104.6),
    ("jamba", 4096, 14336, 176.2),
]


@pytest.mark.parametrize(("name", "width", "hidden", "millions"), EXPERT_SIZES)
def test_an_expert_of_the_released_model_is_as_large_as_published(name, width, hidden, millions):
    with torch.device("meta"):
        layer = recipes.get(name).layer(width, hidden=hidden)
    num_params = sum(parameter.numel() for parameter in layer.experts.parameters())
    assert num_params / layer.num_experts / 1e6 == pytest.approx(millions, rel=1e-3)


# Reference 24: what a token's weights add up to.
SUMS = {"dbrx": 1.0, "arctic": 1.0, "skywork": 1.0, "qwen3-moe": 1.0, "gpt-oss": 1.0}


@pytest.mark.parametrize("name", NAMES)
def test_weights_add_up_as_published(name):
    layer = Setting(name).layer().double()
    routing = layer.router(torch.randn(50, 8, dtype=torch.float64))
    sum_T = routing.importance_E.new_zeros(50).index_add(0, routing.token_N, routing.weight_N).detach()
    if name in SUMS:
        assert sum_T.tolist() == pytest.approx([SUMS[name]] * 50)
    else:  # raw scores; DeepSeek-V2's times 16 (reference 15.5, example 2)
        assert (sum_T > 0).all()
        assert (sum_T < (16 if name == "deepseek-v2" else 1)).all()
        assert sum_T.std() > 0.01


def test_deepseek_v2_visits_at_most_three_of_eight_devices():
    """Reference 15.5, example 4."""
    layer = recipes.get("deepseek-v2").layer(8, hidden=6, init_std=0.5)
    assert (layer.router.groups.num_groups, layer.router.groups.groups_kept) == (8, 3)
    routing = layer.router(torch.randn(200, 8))
    visited = [
        len({int(routing.extras["device_E"][e]) for e in experts}) for experts in routing.expert_N.view(200, 6).tolist()
    ]
    assert max(visited) == 3
    free = recipes.get("deepseek-v2").layer(8, hidden=6, init_std=0.5, devices_per_token=8)
    expert_TK = free.router(torch.randn(200, 8)).expert_N.view(200, 6)
    assert max(len({e // 20 for e in experts}) for experts in expert_TK.tolist()) > 3


@pytest.mark.parametrize(
    ("num_experts", "top_k", "devices"),
    [
        (160, 6, (8, 3)),
        (64, 6, (8, 3)),
        (16, 8, (8, 4)),
        (8, 2, (8, 3)),
        (6, 2, (6, 3)),
        (11, 2, (1, 1)),
        (4, 4, (4, 4)),
    ],
)
def test_deepseek_v2_has_as_many_devices_as_divide_its_experts(num_experts, top_k, devices):
    groups = recipes.get("deepseek-v2").layer(8, hidden=6, num_experts=num_experts, top_k=top_k).router.groups
    assert (groups.num_groups, groups.groups_kept) == devices


def test_deepseek_v2_drops_in_training_alone():
    layer = recipes.get("deepseek-v2").layer(8, hidden=6, num_experts=16, top_k=2, init_std=0.5)
    x_TD = torch.randn(60, 8) + 2
    assert not layer(x_TD)[1].kept_N.all()
    assert layer.eval()(x_TD)[1].kept_N.all()
    assert (layer.dispatch.factor, layer.dispatch.never_dropped) == (1.0, 0.1)


def test_skywork_drops_in_training_alone_and_starts_at_its_largest_coefficient():
    layer = recipes.get("skywork").layer(8, hidden=6, init_std=0.5)
    assert (layer.num_experts, layer.router.top_k, layer.router.scale) == (16, 2, 1.0)
    assert isinstance(layer.dispatch, Capacity)
    assert float(layer.coefficient) == pytest.approx(0.01)
    x_TD = torch.randn(200, 8) + 3
    assert not layer(x_TD)[1].kept_N.all()
    assert layer.eval()(x_TD)[1].kept_N.all()
    (rule,) = recipes.get("skywork").rules
    _, routing = layer.train()(x_TD)
    kept_E = torch.zeros(16, dtype=torch.int64).index_add_(0, routing.expert_N, routing.kept_N.long())
    rule.build([layer])[0].step(routing.load_E, kept_E=kept_E)
    dropped = float((~routing.kept_N).double().mean())
    assert dropped > 0.05
    assert float(layer.coefficient) == pytest.approx(0.99 * 0.01 + 0.01 * min(dropped / 5, 0.01), abs=1e-9)


def test_gpt_oss_has_biases_everywhere():
    layer = recipes.get("gpt-oss").layer(8, hidden=6)
    assert isinstance(layer.experts, BiasedExperts)
    assert (layer.num_experts, layer.router.top_k, layer.router.normalize) == (128, 4, "logits")
    assert (layer.experts.alpha, layer.experts.limit) == (1.702, 7.0)
    assert layer.router.logit_bias_E.shape == (128,)
    assert "no kernel" in layer.kernel_report()


def test_grok_1_starts_with_a_router_of_zeros_and_learns_to_tell_experts_apart():
    layer = recipes.get("grok-1").layer(8, hidden=6)
    assert not layer.router.weight.detach().any()
    optimizer = torch.optim.SGD(layer.router.parameters(), lr=1.0)
    x_TD = torch.randn(100, 8)
    _, routing = layer(x_TD)
    assert sorted(set(routing.expert_N.tolist())) == [0, 1]
    (switch_loss(routing) + layer(x_TD)[0].square().sum()).backward()
    optimizer.step()
    assert len(set(layer(x_TD)[1].expert_N.tolist())) > 2


def test_olmoe_s_weights_are_cut_off_at_three_standard_deviations():
    weight = recipes.get("olmoe").layer(64, hidden=32).experts.up_EDF.detach()
    assert 0.055 < float(weight.abs().max()) <= 0.06


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deepseek-moe", {"num_shared": -1}, "num_shared must be at least 0, got -1. DeepSeekMoE 16B has 2."),
        ("deepseek-v2", {"num_shared": -2}, "num_shared must be at least 0, got -2. DeepSeek-V2 has 2."),
        ("llama4", {"num_shared": -3}, "num_shared must be at least 0, got -3. Llama 4 has 1."),
        (
            "qwen1.5-moe",
            {"num_shared": 0},
            "num_shared must be at least 1, got 0. Qwen1.5-MoE has 4; olmoe has none.",
        ),
        (
            "arctic",
            {"dense_hidden": 0},
            "dense_hidden must be at least 1, got 0. Leave it out for the model's width.",
        ),
        (
            "deepseek-v2",
            {"num_devices": 0},
            "num_groups must divide num_experts=8, got 0. Change one so that every group holds as many experts.",
        ),
        (
            "deepseek-v2",
            {"devices_per_token": 9},
            "groups_kept must be between 1 and num_groups=8, got 9. Keep fewer groups, or cut the experts into more.",
        ),
        ("gpt-oss", {"alpha": 0.0}, "alpha and limit must be positive, got 0.0 and 7.0. gpt-oss uses 1.702 and 7."),
    ],
)
def test_options_that_make_no_layer_are_refused(name, options, message):
    with pytest.raises(ConfigError) as error:
        recipes.get(name).layer(8, hidden=6, num_experts=8, top_k=2, **options)
    assert str(error.value) == message
