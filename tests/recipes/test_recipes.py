import json
import re

import pytest
import torch

from moesaic import ConfigError, MoELayer, recipes
from moesaic.balance import BiasRule, LossTerm, sequence_loss, switch_loss
from moesaic.dispatch import Capacity, Sort
from moesaic.experts import GatedExperts, MLPExperts

every_recipe = pytest.mark.parametrize("name", recipes.names())


def test_recipes_stand_in_the_order_in_which_they_were_published():
    years = [recipes.get(name).year for name in recipes.names()]
    assert years == sorted(years)


@every_recipe
def test_every_recipe_names_itself_its_paper_and_what_is_its_own(name):
    recipe = recipes.get(name)
    assert recipe.name == name
    # Models that were released without a paper: where they were announced.
    assert re.search(r"(arXiv:\d{4}\.\d{4,5}|Blog, \w+ 20\d\d\.|github\.com/\S+)$", recipe.citation)
    assert 20 < len(recipe.summary) < 100


@every_recipe
def test_every_option_is_a_json_value_and_goes_there_and_back(name):
    recipe = recipes.get(name)
    options = json.loads(json.dumps(recipe.options))
    assert options == recipe.options
    assert {"num_experts", "top_k", "activation", "init_std", "kernel"} <= set(options)
    options |= {"num_experts": 8, "top_k": min(2, options["top_k"])}
    assert isinstance(recipe.layer(8, hidden=6, **options), MoELayer)


@every_recipe
def test_every_recipe_builds_with_its_published_numbers(name):
    recipe = recipes.get(name)
    layer = recipe.layer(4, hidden=2)
    assert layer.router.num_experts == recipe.options["num_experts"]
    assert layer.router.top_k == recipe.options["top_k"]
    y_TD, routing = layer(torch.randn(3, 4))
    assert y_TD.shape == (3, 4)
    assert routing.num_experts == recipe.options["num_experts"]


@every_recipe
@pytest.mark.parametrize("std", [0.3, 0.05])
def test_the_width_of_fresh_weights_can_be_set(name, std):
    layer = recipes.get(name).layer(64, hidden=48, num_experts=8, top_k=2, init_std=std)
    for parameter_name, parameter in layer.named_parameters():
        assert float(parameter.detach().std()) == pytest.approx(std, rel=0.12), parameter_name


NO_NUMBERS = [
    ("switch", "capacity_factor", "high", "a finite number", "1.25"),
    ("switch", "capacity_factor", None, "a finite number", "1.25"),
    ("switch", "eval_capacity_factor", float("nan"), "a finite number", "2.0"),
    ("switch", "min_capacity", 2.5, "a whole number", "4"),
    ("mixtral", "init_std", [0.1], "a finite number", "None"),
    ("deepseek-v3", "num_shared", True, "a whole number", "1"),
    ("deepseek-v3", "scale", float("inf"), "a finite number", "2.5"),
]


@pytest.mark.parametrize(("recipe", "option", "value", "needed", "published"), NO_NUMBERS)
def test_an_option_that_is_no_number_is_refused_by_name(recipe, option, value, needed, published):
    with pytest.raises(ConfigError) as error:
        recipes.get(recipe).layer(8, hidden=6, num_experts=4, top_k=1, **{option: value})
    assert str(error.value) == (
        f"option {option} of recipe {recipe} must be {needed}, got {value!r}. "
        f"Leave it out for the published {published}."
    )


@every_recipe
def test_every_option_is_used(name):
    """Trap 24: an option that changes nothing is a lie."""
    others = {
        "num_experts": 16,
        "top_k": 3,
        "capacity_factor": 0.5,
        "eval_capacity_factor": 0.5,
        "min_capacity": 30,
        "jitter": 0.4,
        "activation": "gelu",
        "init_std": 0.7,
        "kernel": "reference",
        "num_shared": 3,
        "num_groups": 2,
        "groups_kept": 3,
        "scale": 7.0,
    }
    recipe = recipes.get(name)
    base = {"num_experts": 8, "top_k": 2} | ({"num_groups": 4} if "num_groups" in recipe.options else {})
    for option in recipe.options:
        outcomes = []
        for options in (base, base | {option: others[option]}):
            torch.manual_seed(0)
            layer = recipe.layer(6, hidden=5, **{"init_std": 0.5} | options)
            x_TD = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
            outcomes.append((layer.kernel_report(), layer(x_TD)[0], layer.eval()(x_TD)[0]))
        (report, trained, evaluated), (other_report, other_trained, other_evaluated) = outcomes
        same_outputs = torch.equal(trained, other_trained) and torch.equal(evaluated, other_evaluated)
        assert not (same_outputs and report == other_report), option


def test_switch_is_built_as_published():
    recipe = recipes.get("switch")
    layer = recipe.layer(400, hidden=100, num_experts=8)
    assert recipe.options["num_experts"] == 128
    assert layer.router.top_k == 1
    assert layer.router.jitter == 0.01
    assert layer.router.normalize == "scores"
    assert isinstance(layer.experts, MLPExperts)
    assert layer.experts.activation.name == "relu"
    assert isinstance(layer.dispatch, Capacity)
    assert (layer.dispatch.factor, layer.dispatch.eval_factor, layer.dispatch.minimum) == (1.25, 2.0, 4)
    assert layer.dispatch.drop == "position"
    for weight, fan_in in ((layer.router.weight, 400), (layer.experts.up_EDF, 400), (layer.experts.down_EFD, 100)):
        std = (0.1 / fan_in) ** 0.5
        assert float(weight.detach().abs().max()) <= 2 * std
        assert float(weight.detach().std()) == pytest.approx(0.88 * std, rel=0.05)
    assert recipe.balance == (LossTerm(name="switch", loss=switch_loss, coefficient=0.01),)


def test_mixtral_is_built_as_published():
    recipe = recipes.get("mixtral")
    layer = recipe.layer(8, hidden=6)
    assert (layer.router.num_experts, layer.router.top_k, layer.router.jitter) == (8, 2, 0.0)
    assert isinstance(layer.experts, GatedExperts)
    assert isinstance(layer.dispatch, Sort)
    assert layer.shared is None
    assert layer.experts.activation.name == "silu"
    # transformers' default of 0.001, on a loss that is K = 2 times ours.
    assert recipe.balance == (LossTerm(name="switch", loss=switch_loss, coefficient=0.002),)


def test_deepseek_v3_is_built_as_published():
    recipe = recipes.get("deepseek-v3")
    layer = recipe.layer(8, hidden=6)
    router = layer.router
    assert (router.num_experts, router.top_k, router.scale, router.score.name) == (256, 8, 2.5, "sigmoid")
    assert (router.groups.num_groups, router.groups.groups_kept, router.groups.best_per_group) == (8, 4, 2)
    assert isinstance(layer.dispatch, Sort)
    assert layer.shared.up_DF.shape == (8, 6)
    assert float(layer.experts.up_EDF.detach().std()) == pytest.approx(0.006, rel=0.05)
    assert recipe.balance == (
        LossTerm(name="sequence", loss=sequence_loss, coefficient=1e-4),
        BiasRule(rate=1e-3, rule="sign"),
    )


@pytest.mark.parametrize(
    ("num_experts", "groups"), [(256, (8, 4)), (128, (4, 2)), (64, (2, 1)), (60, None), (32, None), (8, None)]
)
def test_deepseek_v3_keeps_half_of_its_groups_of_32_and_few_experts_have_no_groups(num_experts, groups):
    limit = recipes.get("deepseek-v3").layer(8, hidden=6, num_experts=num_experts, top_k=2).router.groups
    assert (limit and (limit.num_groups, limit.groups_kept)) == groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"groups_kept": 3},
            "groups_kept must be between 1 and num_groups=1, got 3. Keep fewer groups, or cut the experts into more.",
        ),
        (
            {"num_groups": 0},
            "num_groups must divide num_experts=8, got 0. Change one so that every group holds as many experts.",
        ),
    ],
)
def test_deepseek_v3_ignores_no_number_of_groups_in_silence(options, message):
    with pytest.raises(ConfigError) as error:
        recipes.get("deepseek-v3").layer(8, hidden=6, num_experts=8, top_k=2, **options)
    assert str(error.value) == message


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError) as error:
        recipes.get("gpt-4")
    assert str(error.value) == (
        f"recipe must be one of {', '.join(recipes.names())}, got 'gpt-4'. List them with `moesaic recipes`."
    )


def test_unknown_options_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError) as error:
        recipes.get("mixtral").layer(8, hidden=6, shared=1, capacity_factor=2.0)
    assert str(error.value) == (
        "recipe mixtral has the options num_experts, top_k, jitter, activation, init_std, kernel, got "
        "capacity_factor, shared. Leave out what the recipe does not have."
    )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 0, "hidden": 6}, "width must be a whole number of at least 1, got 0. Give a positive width."),
        (
            {"width": 8, "hidden": 6, "num_experts": 2.5},
            "num_experts must be a whole number of at least 1, got 2.5. Give a positive num_experts.",
        ),
        (
            {"width": 8, "hidden": 6, "top_k": 0},
            "top_k must be a whole number of at least 1, got 0. Give a positive top_k.",
        ),
        ({"width": 8, "hidden": -2}, "hidden must be a whole number of at least 1, got -2. Give a positive hidden."),
        (
            {"width": 8, "hidden": 6, "num_experts": -5},
            "num_experts must be a whole number of at least 1, got -5. Give a positive num_experts.",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(ConfigError) as error:
        recipes.get("mixtral").layer(**sizes)
    assert str(error.value) == message


def test_an_unknown_activation_is_refused():
    with pytest.raises(ConfigError, match="got 'swish'"):
        recipes.get("switch").layer(8, hidden=6, activation="swish")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_shared": -1}, "num_shared must be at least 0, got -1. DeepSeek-V3 has 1."),
        ({"init_std": -0.5}, "init_std must be at least 0, got -0.5. Most language models use 0.02."),
        ({"kernel": "foo"}, "kernel must be auto or one of torch, reference, got 'foo'. Use auto if unsure."),
        (
            {"scale": 0.0},
            "scale must not be 0, got 0.0: every weight and gradient would be 0. DeepSeek-V3 uses 2.5.",
        ),
    ],
)
def test_options_that_would_fail_later_are_refused_when_the_layer_is_built(options, message):
    with pytest.raises(ConfigError) as error:
        recipes.get("deepseek-v3").layer(8, hidden=6, num_experts=4, top_k=2, **options)
    assert str(error.value) == message
