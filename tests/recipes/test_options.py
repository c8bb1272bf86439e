"""Options of every recipe: each is used, and what it cannot be is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch

from moesaic import ConfigError, recipes
from tests.laws.settings import Setting, context_for, plain, tokens

EVERY_OPTION = [(name, option) for name in recipes.names() for option in recipes.get(name).options]
every_option = pytest.mark.parametrize(("name", "option"), EVERY_OPTION)

# Another value of each option that any recipe has; where the published value is one of a few, another of these.
OTHERS: dict[str, Any] = {
    "activation": "relu_squared",
    "alpha": 5.0,
    "assign_tokens": 8,
    "cap": 2,
    "capacity": 0.4,
    "capacity_factor": 0.3,
    "coefficient": 0.3,
    "combine": "learned",
    "cooling": "linear",
    "cooling_steps": 4,
    "dense_hidden": 7,
    "devices_per_token": 1,
    "dropout": 0.5,
    "end_temperature": 0.02,
    "eval_capacity_factor": 0.3,
    "expert_dropout": 0.6,
    "gate_init_std": 0.7,
    "gate_network": "linear",
    "gated": True,
    "group": "sequence",
    "group_size": 7,
    "groups_kept": 1,
    "hard_after": 1,
    "init_std": 0.7,
    "inner_width": 2,
    "jitter": 0.4,
    "kernel": "reference",
    "limit": 0.3,
    "min_capacity": 30,
    "never_dropped": 0.6,
    "noise_epsilon": 0.8,
    "noise_std": 2.0,
    "num_constant": 0,
    "num_copy": 3,
    "num_devices": 2,
    "num_domains": 2,
    "num_experts": 12,
    "num_groups": 2,
    "num_shared": 3,
    "num_zero": 0,
    "rank": 3,
    "router_net": "tanh",
    "scale": 7.0,
    "score": "sigmoid",
    "second_threshold": 0.9,
    "seed": 1,
    "segment": 3,
    "sharpness": 2.0,
    "slots_per_expert": 3,
    "sparse_dense": False,
    "sublayers": 2,
    "tau": 0.2,
    "temperature": 0.9,
    "threshold": 0.3,
    "top_k": 3,
    "top_p": 0.9,
    "train_base": True,
    "train_experts": True,
    "vocab_size": 20,
}
# Their capacity is for each sequence, and those of the tests, of five tokens, are too short to tell factors apart.
GROUPED = ("gshard", "glam", "st-moe")
# Options that do something only beside others.
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("deepseek-v2", "capacity_factor"): {"num_devices": 4},
    ("deepseek-v2", "devices_per_token"): {"num_devices": 4},
    ("deepseek-v2", "never_dropped"): {"num_devices": 4, "capacity_factor": 0.5},
    ("deepseek-v3", "groups_kept"): {"num_groups": 4},
    **{(name, "capacity_factor"): {"group_size": 40, "min_capacity": 0} for name in GROUPED},
    **{(name, "eval_capacity_factor"): {"group_size": 40, "min_capacity": 0} for name in GROUPED},
    **{(name, "min_capacity"): {"group_size": 40, "capacity_factor": 0.3} for name in GROUPED},
}

# Their one number of choices is an option so that settings of others fit them.
ONE_CHOICE = [(name, "top_k") for name in ("base", "hash", "thor", "pangu-sigma")]


def _outcome(setting: Setting) -> tuple[Any, ...]:
    """What someone who holds the layer can see of it: also after a step of its controllers, and in evaluation."""
    torch.manual_seed(0)
    layer = setting.layer()
    x_TD, context = tokens(40), context_for(40, setting)
    controllers = [controller for rule in setting.recipe.rules for controller in rule.build([layer])]
    seen: list[Any] = [layer.kernel_report(), [name for name, p in layer.named_parameters() if p.requires_grad]]
    for training in (True, True, False):
        torch.manual_seed(1)
        try:
            y_TD, routing = layer.train(training)(x_TD, None, context)
        except ConfigError as error:  # a table of fewer ids than the text has
            return (str(error),)
        losses = [float(term(setting.rewarded(routing)).detach()) for term in setting.losses]
        seen += [y_TD.tolist(), losses, routing.expert_N.tolist(), routing.kept_N.tolist()]
        kept_E = torch.bincount(routing.expert_N[routing.kept_N], minlength=routing.num_experts)
        for controller in controllers:
            controller.step(routing.load_E, kept_E=kept_E, num_tokens=40)
    return tuple(seen)


@pytest.mark.parametrize(("name", "option"), [pair for pair in EVERY_OPTION if pair not in ONE_CHOICE])
def test_every_option_is_used(name, option):
    """Trap 24: an option that changes nothing is a lie."""
    setting = plain(name)
    beside = BESIDE.get((name, option), {})
    before = replace(setting, options=setting.options | beside)
    other = OTHERS[option]
    assert {"init_std": 0.5, "gate_init_std": 0.5, **recipes.get(name).options, **before.options}[option] != other
    after = replace(setting, options=before.options | {option: other})
    assert _outcome(before) != _outcome(after)


def test_the_table_of_other_values_names_no_option_that_is_gone():
    assert set(OTHERS) == {option for _, option in EVERY_OPTION}
    assert {*BESIDE, *ONE_CHOICE} <= set(EVERY_OPTION)


WRONG: dict[type, list[Any]] = {
    bool: [0, 1.0, "yes", None, []],
    int: [2.5, "many", True, float("nan"), [1], 3.0],
    float: ["high", float("nan"), float("inf"), True, [0.1]],
    str: [0, 1.5, True, None, ["silu"]],
}
NEEDED = {bool: "True or False", int: "a whole number", float: "a finite number", str: "text"}


@every_option
def test_what_is_of_the_wrong_kind_is_refused_by_name(name, option):
    recipe = recipes.get(name)
    hint = get_type_hints(recipe.build)[option]
    kinds = get_args(hint) or (hint,)
    kind = next(kind for kind in WRONG if kind in kinds)
    values = WRONG[kind] if type(None) in kinds or option in ("num_experts", "top_k") else [*WRONG[kind], None]
    for value in values:
        with pytest.raises(ConfigError) as error:
            recipe.layer(8, hidden=6, **{**plain(name).options, option: value})
        message = (
            f"option {option} of recipe {name} must be {NEEDED[kind]}, got {value!r}. "
            f"Leave it out for the published {recipe.options[option]}."
        )
        size = f"{option} must be a whole number of at least 1, got {value!r}. Give a positive {option}."
        assert str(error.value) in ((message, size) if option in ("num_experts", "top_k") else (message,))


# Numbers of any sign may seed a generator, and a negative scale is that of experts of the other sign.
SIGNED = {"seed", "scale"}


@every_option
def test_a_number_below_zero_and_a_name_that_nobody_has_are_refused(name, option):
    recipe = recipes.get(name)
    hint = get_type_hints(recipe.build)[option]
    kinds = get_args(hint) or (hint,)
    if bool in kinds or option in SIGNED:
        return
    value = "nobody" if str in kinds else -0.5 if float in kinds else -3
    with pytest.raises(ConfigError) as error:
        recipe.layer(8, hidden=6, **{**plain(name).options, option: value})
    message = str(error.value)
    assert repr(value) in message
    assert ", got " in message
    assert message.endswith(".")


@pytest.mark.parametrize(("name", "option"), ONE_CHOICE)
def test_more_than_one_choice_is_refused_where_none_is_published(name, option):
    with pytest.raises(ConfigError) as error:
        recipes.get(name).layer(8, hidden=6, num_experts=4, **{option: 3})
    assert str(error.value) == f"recipe {name} sends each token to one expert, got top_k=3. Leave out top_k."


@pytest.mark.parametrize("name", recipes.names())
def test_an_unknown_option_is_refused_with_the_known_ones(name):
    recipe = recipes.get(name)
    with pytest.raises(ConfigError) as error:
        recipe.layer(8, hidden=6, unheard_of=1, zeal=2.0)
    assert str(error.value) == (
        f"recipe {name} has the options {', '.join(recipe.options)}, got unheard_of, zeal. "
        "Leave out what the recipe does not have."
    )


@pytest.mark.parametrize("name", recipes.names())
@pytest.mark.parametrize(
    ("size", "value"), [("width", 0), ("width", 2.5), ("hidden", -2), ("hidden", "wide"), ("num_experts", 0)]
)
def test_sizes_that_cannot_be_are_refused(name, size, value):
    with pytest.raises(ConfigError) as error:
        recipes.get(name).layer(**{"width": 8, "hidden": 6, size: value})
    assert str(error.value) == f"{size} must be a whole number of at least 1, got {value!r}. Give a positive {size}."
