"""Recipes of adaptive, dense, annealed and drawn choices are built as published."""

import pytest

from moesaic import ConfigError, recipes
from moesaic.balance import (
    AnnealingRule,
    LossTerm,
    SparsityRule,
    active_share_loss,
    entropy_loss,
    l1_loss,
    mutual_information_loss,
    reinforce_loss,
    switch_loss,
)
from moesaic.dispatch import Sort
from moesaic.experts import GatedExperts, MLPExperts

ADAPTIVE = {
    "dense": ("DenseRouter", MLPExperts, 8),
    "evo-moe": ("AnnealedRouter", MLPExperts, 16),
    "reinforce": ("PolicyRouter", MLPExperts, 64),
    "cosine": ("CosineRouter", MLPExperts, 32),
    "top-p": ("TopPRouter", GatedExperts, 16),
    "ds-moe": ("DenseRouter", GatedExperts, 32),
    "attention": ("AttentionRouter", GatedExperts, 32),
    "relu": ("ReLURouter", GatedExperts, 8),
}
every_adaptive = pytest.mark.parametrize("name", ADAPTIVE)


def _layer(name: str, **options):
    return recipes.get(name).layer(8, hidden=6, **options)


@every_adaptive
def test_each_is_built_of_the_published_parts(name):
    router, experts, num_experts = ADAPTIVE[name]
    layer = _layer(name)
    assert type(layer.router).__name__ == router
    assert isinstance(layer.experts, experts)
    assert isinstance(layer.dispatch, Sort)
    assert layer.num_experts == num_experts
    assert layer.shared is None


def test_top_p_is_built_as_published():
    router = _layer("top-p").router
    assert (router.p, router.top_k, router.experts_per_token) == (0.4, None, 7)
    assert recipes.get("top-p").balance == (
        LossTerm(name="switch", loss=switch_loss, coefficient=1e-2),
        LossTerm(name="entropy", loss=entropy_loss, coefficient=1e-4),
    )


def test_relu_is_built_as_published():
    layer = recipes.get("relu").layer(200, hidden=6)
    assert (layer.router.top_k, float(layer.coefficient)) == (1, pytest.approx(1e-8))
    assert float(layer.router.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert recipes.get("relu").balance == (
        LossTerm(name="l1", loss=l1_loss, coefficient=1.0, adaptive=True),
        SparsityRule(factor=1.2),
    )


def test_cosine_is_built_as_published():
    router = _layer("cosine").router
    assert router.weight.shape == (16, 8)
    assert router.embedding_ER.shape == (32, 16)
    assert (router.top_k, router.score.name) == (1, "softmax")
    assert float(router.log_temperature.detach().exp()) == pytest.approx(0.3)
    router = _layer("cosine", score="sigmoid").router
    assert float(router.log_temperature.detach().exp()) == pytest.approx(0.07)
    assert recipes.get("cosine").balance == (LossTerm(name="switch", loss=switch_loss, coefficient=1e-2),)


def test_attention_is_built_as_published():
    layer = _layer("attention")
    assert layer.router.weight.shape == (96, 8)
    assert layer.router.top_k == 2
    assert recipes.get("attention").balance == ()


def test_dense_and_ds_moe_are_built_as_published():
    assert recipes.get("dense").balance == ()
    router = _layer("ds-moe").router
    assert (router.eval_top_k, router.eval_threshold) == (12, 0.0)
    assert recipes.get("ds-moe").balance == (
        LossTerm(name="mutual-information", loss=mutual_information_loss, coefficient=1e-2),
    )


def test_evo_moe_is_built_as_published():
    router = _layer("evo-moe").router
    assert (router.threshold, router.top_k, float(router.temperature)) == (0.001, 1, 2.0)
    assert (router.cooling.end, router.cooling.num_steps, router.cooling.kind) == (0.3, 10_000, "exponential")
    assert router.cooling.hard_after is None
    assert recipes.get("evo-moe").balance == (
        LossTerm(name="active-share", loss=active_share_loss, coefficient=1e-2),
        AnnealingRule(),
    )


def test_reinforce_is_built_as_published():
    assert _layer("reinforce").router.top_k == 1
    assert recipes.get("reinforce").balance == (
        LossTerm(name="reinforce", loss=reinforce_loss, coefficient=1e-2, rewarded=True),
        LossTerm(name="switch", loss=switch_loss, coefficient=1e-2),
    )


@pytest.mark.parametrize(
    ("name", "training", "share"),
    [
        ("dense", True, 1.0),
        ("dense", False, 1.0),
        ("ds-moe", True, 1.0),
        ("ds-moe", False, 12 / 32),
        ("evo-moe", True, 1.0),
        ("evo-moe", False, 1 / 16),
        ("top-p", True, 7 / 16),
        ("relu", True, 1 / 8),
        ("reinforce", True, 1 / 64),
        ("attention", False, 2 / 32),
    ],
)
def test_active_parameters_say_what_a_token_meets_in_training_and_in_evaluation(name, training, share):
    layer = _layer(name).train(training)
    in_experts = sum(p.numel() for p in layer.experts.parameters())
    outside = layer.num_params - in_experts
    assert layer.num_active_params == outside + round(in_experts * share)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("top-p", {"top_p": 1.5}, "p must be above 0 and at most 1, got 1.5. Huang et al. use 0.4."),
        ("relu", {"coefficient": 0.0}, "coefficient must be positive, got 0.0. ReMoE starts at 1e-8."),
        ("cosine", {"score": "relu"}, "score must be one of softmax, sigmoid, got 'relu'. X-MoE has both."),
        ("evo-moe", {"cooling": "cosine"}, "kind must be 'exponential' or 'linear', got 'cosine'. EvoMoE has both."),
    ],
)
def test_an_option_that_cannot_be_is_refused(name, options, message):
    with pytest.raises(ConfigError) as error:
        _layer(name, **options)
    assert str(error.value) == message
