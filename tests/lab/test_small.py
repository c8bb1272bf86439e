"""Sizes, options and the training loop that all experiments share."""

import pytest
import torch

from moesaic import recipes
from moesaic.core.errors import ConfigError
from moesaic.lab import Setup
from moesaic.lab.small import adapts, changed_options, hidden_of_equal_activity, options_of
from moesaic.lab.text import run, run_adapted, trained
from moesaic.train import NotFiniteError


@pytest.mark.parametrize("name", [name for name in recipes.names() if not adapts(name)])
def test_every_recipe_is_built_with_about_the_active_parameters_of_the_twin(name):
    setup = Setup()
    options = options_of(name, setup) | ({"vocab_size": 64} if "vocab_size" in recipes.get(name).options else {})
    with torch.device("meta"):
        layer = recipes.get(name).layer(setup.width, hidden=hidden_of_equal_activity(name, setup), **options)
    assert layer.num_active_params == pytest.approx(3 * 64 * 192, rel=0.03)


def test_a_layer_that_does_not_fit_is_refused_with_its_least_size():
    with pytest.raises(ConfigError, match=r"recipe mixtral needs at least \d+ active parameters .*Raise active_hidden"):
        hidden_of_equal_activity("mixtral", Setup(active_hidden=1))


def test_options_fit_the_run_and_what_differs_from_the_paper_is_told():
    setup = Setup(steps=70, context=40, num_experts=8)
    assert options_of("evo-moe", setup) == {"num_experts": 8, "top_k": 1, "cooling_steps": 70}
    assert changed_options("evo-moe", setup) == {"cooling_steps": 70}
    assert changed_options("deepseek-v3", setup) == {"top_k": 2}
    assert changed_options("lory", setup) == {"segment": 10}
    assert changed_options("mole", setup) == {"train_experts": True}
    assert changed_options("mixtral", setup) == {}
    # A network that tokens skip or not, and a design without a number of choices, stay as published.
    assert options_of("mod", setup) == {"num_experts": 1}
    assert options_of("ds-moe", setup) == {"num_experts": 8}


def test_low_rank_designs_adapt_and_no_others():
    assert {name for name in recipes.names() if adapts(name)} == {"lora-moe", "mole", "mixlora"}


@pytest.mark.parametrize("name", ["twin", "switch", "pangu-sigma", "relu", "reinforce"])
def test_a_run_has_figures_and_the_same_seed_gives_the_same(tiny, name):
    one, again = run(name, 1, tiny), run(name, 1, tiny)
    assert 4 < one.score < 9
    assert one.score == again.score
    assert one.tokens_per_s > 0
    assert one.total_params >= one.active_params > 0
    assert one.load_max_over_mean >= 1
    assert run(name, 2, tiny).score != one.score


def test_low_rank_experts_start_from_the_twin_and_alone_are_trained(tiny, monkeypatch):
    from moesaic.lab import text

    dense, models = trained("twin", 0, tiny)[0], []
    score = text.bits_per_byte
    monkeypatch.setattr(text, "bits_per_byte", lambda model, setup: models.append(model) or score(model, setup))
    outcome = run_adapted("mixlora", 0, tiny)
    assert (outcome.kind, outcome.hidden, outcome.experts_per_token) == ("adapted", tiny.active_hidden, 2)
    before, after = dict(dense.named_parameters()), dict(models[0].named_parameters())
    kept = [name for name in before if name in after]
    assert "model.embed_tokens.weight" in kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    base = after["model.layers.0.mlp.moe.experts.base.gate_DF"]
    assert torch.equal(base, before["model.layers.0.mlp.gate_proj.weight"].T)
    moved = after["model.layers.0.mlp.moe.experts.gate.out_ERF"]
    assert moved.requires_grad
    assert moved.any()


def test_the_dense_model_goes_on_with_all_of_its_weights_in_another_order(tiny, monkeypatch):
    from moesaic.lab import text

    orders, fit = [], text.fit
    monkeypatch.setattr(text, "fit", lambda *a, **k: orders.append((k["seed"], k.get("data_seed"))) or fit(*a, **k))
    assert run_adapted("twin", 3, tiny).score != run("twin", 3, tiny).score
    assert orders == [(3, None), (3, 1003), (3, None)]


def test_a_loss_that_is_not_finite_ends_the_run(tiny):
    def spoil(model):
        next(model.parameters()).data.fill_(float("nan"))

    with pytest.raises(NotFiniteError):
        trained("switch", 0, tiny, prepare=spoil)


def test_what_is_composed_is_trained_as_nothing_was_before(tiny, monkeypatch):
    from moesaic.lab import text

    models, score = [], text.bits_per_byte
    monkeypatch.setattr(text, "bits_per_byte", lambda model, setup: models.append(model) or score(model, setup))
    assert run_adapted("mole", 0, tiny).options == {"train_experts": True}
    experts = models[0].get_submodule("model.layers.0.mlp.moe.experts")
    assert all(part.out_ERF.any() for part in (experts.gate, experts.up, experts.down))
    assert run_adapted("mole", 0, tiny).score != run("twin", 0, tiny).score
