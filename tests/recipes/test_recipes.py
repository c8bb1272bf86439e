"""What holds for every recipe as a thing to build layers with, and three of them as published."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from collections.abc import Mapping

import pytest
import torch

from moesaic import ConfigError, Context, recipes
from moesaic.balance import TERMS, BiasRule, LossTerm, sequence_loss, switch_loss
from moesaic.dispatch import Capacity, Sort
from moesaic.experts import GatedExperts, MLPExperts
from tests.laws.settings import context_for, plain, tokens
from tests.tolerances import assert_close

every_recipe = pytest.mark.parametrize("name", recipes.names())


def test_recipes_stand_in_the_order_in_which_they_were_published():
    years = [recipes.get(name).year for name in recipes.names()]
    assert years == sorted(years)


@every_recipe
def test_every_recipe_names_itself_its_paper_and_what_is_its_own(name):
    recipe = recipes.get(name)
    assert recipe.name == name
    assert re.fullmatch(r"[a-z0-9.+-]+", name)
    # "Who. What. When. Where": models that were released without a paper say where they were announced; before arXiv
    # there were journals.
    who, _, what = recipe.citation.partition(". ")
    assert who
    where = r" (19|20)\d\d\. arXiv:\d{4}\.\d{4,5}$| Blog, \w+ 20\d\d\.$| 20\d\d\. github\.com/\S+$| \d+\(\d+\), 19\d\d$"
    assert re.search(where, what)
    assert "  " not in recipe.citation
    assert 20 < len(recipe.summary) < 100
    assert not recipe.summary.endswith(".")


@every_recipe
def test_every_option_is_a_json_value_and_goes_there_and_back(name):
    recipe = recipes.get(name)
    options = json.loads(json.dumps(recipe.options))
    assert options == recipe.options
    assert {type(value) for value in options.values()} <= {int, float, bool, str, type(None)}
    assert {"num_experts", "init_std"} <= set(options)
    layer = recipe.layer(8, hidden=6, **options | plain(name).options)
    assert layer.num_experts == plain(name).num_experts


@every_recipe
def test_every_loss_that_can_be_named_is_the_one_of_that_name(name):
    for term in recipes.get(name).losses:
        assert re.fullmatch(r"[a-z0-9-]+", term.name)
        if term.name in TERMS:
            named = TERMS[term.name](term.coefficient)
            assert (named.loss, named.rewarded) == (term.loss, term.rewarded)
        else:  # DeepSeek-V2's name for the loss that its device and communication losses stand beside
            assert (name, term.name, term.loss) == ("deepseek-v2", "expert", sequence_loss)


# Width and hidden width of one expert at which the design was published, or is used; 1024 and 4096 where it says none.
SIZES = {
    "shazeer-2017": (512, 1024),
    "hierarchical-2017": (512, 1024),
    "strictly-balanced-2017": (512, 2048),
    "gshard": (1024, 8192),
    "switch": (768, 2048),
    "glam": (4096, 16384),
    "pr-moe": (1024, 4096),
    "residual-moe": (1024, 4096),
    "st-moe": (5120, 20480),
    "pangu-sigma": (5120, 20480),
    "mixtral": (4096, 14336),
    "deepseek-moe": (2048, 1408),
    "openmoe": (2048, 8192),
    "grok-1": (6144, 32768),
    "dbrx": (6144, 10752),
    "qwen1.5-moe": (2048, 1408),
    "jamba": (4096, 14336),
    "arctic": (7168, 4864),
    "deepseek-v2": (5120, 1536),
    "attention": (2048, 8192),
    "skywork": (4608, 12288),
    "llama-moe": (4096, 688),
    "olmoe": (2048, 1024),
    "deepseek-v3": (7168, 2048),
    "minimax-01": (6144, 9216),
    "llama4": (5120, 8192),
    "qwen3-moe": (4096, 1536),
    "gpt-oss": (2880, 2880),
}


@every_recipe
def test_every_recipe_builds_at_its_published_size_without_memory(name):
    recipe = recipes.get(name)
    width, hidden = SIZES.get(name, (1024, 4096))
    with torch.device("meta"):
        layer = recipe.layer(width, hidden=hidden)
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    assert layer.num_experts == recipe.options["num_experts"]
    assert layer.num_params == sum(math.prod(parameter.shape) for parameter in layer.parameters())
    assert 0 < layer.num_active_params <= layer.num_params
    if recipe.options.get("top_k") is not None and hasattr(layer.router, "top_k"):
        assert layer.router.top_k == recipe.options["top_k"]


@every_recipe
def test_parameters_are_counted_without_memory(name):
    with torch.device("meta"):
        layer = plain(name).recipe.layer(8, hidden=6, **plain(name).options)
    real = plain(name).layer()
    assert (layer.num_params, layer.num_active_params) == (real.num_params, real.num_active_params)
    assert {key: value.shape for key, value in layer.state_dict().items()} == {
        key: value.shape for key, value in real.state_dict().items()
    }


@every_recipe
@pytest.mark.parametrize("num_experts", [2, 3, 4, 5, 7])
def test_every_recipe_builds_with_any_number_of_experts(name, num_experts):
    """Two choices want four experts: of fewer, nearly all would be chosen."""
    setting = plain(name)
    if num_experts < 4 and setting.options.get("top_k", 1) > 1:
        num_experts += 4
    layer = setting.layer(num_experts=num_experts)
    context = context_for(20, plain(name))
    y_TD, routing = layer(tokens(20), None, Context(id_T=context.id_T, domain_T=context.domain_T))
    assert y_TD.isfinite().all()
    assert routing.num_experts == layer.num_experts == num_experts


# What starts at one value whatever the width of the rest, which its module's docstring says: gains and shifts of
# norms, biases, second factors of low-rank maps, BASE's second matrices, temperatures and thresholds. And what is
# published as of width 1.
CONSTANT = re.compile(
    r"norm\.(weight|bias)$|_bias_E[DF]?$|\.out_ERF$|sublayers\.\d+\.down\.weight$|log_temperature$|threshold_E$|^scale$"
)
STANDARD = re.compile(r"\.constant_D$")


@every_recipe
def test_the_width_of_fresh_weights_can_be_set(name):
    fresh: list[Mapping[str, torch.Tensor]] = []
    for std in (0.3, 0.05):
        torch.manual_seed(0)
        gate = {"gate_init_std": std} if "gate_init_std" in recipes.get(name).options else {}
        layer = recipes.get(name).layer(64, hidden=48, **plain(name).options, init_std=std, **gate)
        for parameter_name, weight in layer.named_parameters():
            if not CONSTANT.search(parameter_name):
                width = 1.0 if STANDARD.search(parameter_name) else std
                # Four standard errors of a standard deviation.
                allowed = 4 / math.sqrt(2 * weight.numel())
                assert float(weight.detach().std()) == pytest.approx(width, rel=allowed), parameter_name
        fresh.append({key: weight.detach() for key, weight in layer.named_parameters() if CONSTANT.search(key)})
    for parameter_name, weight in fresh[0].items():
        assert len(weight.unique()) == 1, parameter_name
        assert torch.equal(weight, fresh[1][parameter_name]), parameter_name


@pytest.mark.parametrize("how", ["copied", "pickled"])
@every_recipe
def test_a_layer_can_be_copied_and_pickled(name, how):
    layer, x_TD, context = plain(name).layer(), tokens(20), context_for(20, plain(name), torch.float32)
    other = copy.deepcopy(layer) if how == "copied" else pickle.loads(pickle.dumps(layer))
    assert other.kernel_report() == layer.kernel_report()
    outputs = []
    for one in (layer, other):
        torch.manual_seed(1)
        outputs.append([one.train(training)(x_TD, None, context)[0] for training in (True, False)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*outputs, strict=True))
    before = outputs[0][1]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert torch.equal(layer(x_TD, None, context)[0], before)


@every_recipe
def test_a_layer_goes_to_bfloat16_and_back(name):
    """Weights are rounded once; what controllers move and what says who goes where is not rounded at all."""
    layer = plain(name).layer().eval()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    weights = {key for key, _ in layer.named_parameters()}
    layer.bfloat16()
    assert {value.dtype for key, value in layer.state_dict().items() if key in weights} == {torch.bfloat16}
    layer(tokens(20, dtype=torch.bfloat16), None, context_for(20, plain(name), torch.float32))
    layer.float()
    for key, value in layer.state_dict().items():
        expected = before[key].bfloat16().float() if key in weights else before[key]
        assert value.dtype == expected.dtype, key
        assert torch.equal(value, expected), key
    rounded = plain(name).layer().eval()
    rounded.load_state_dict(layer.state_dict())
    x_TD, context = tokens(20), context_for(20, plain(name), torch.float32)
    assert_close(layer(x_TD, None, context)[0], rounded(x_TD, None, context)[0], "outputs")


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_shared": -1}, "num_shared must be at least 0, got -1. DeepSeek-V3 has 1."),
        ({"init_std": -0.5}, "init_std must be at least 0, got -0.5. Most language models use 0.02."),
        (
            {"kernel": "foo"},
            "kernel must be auto or one of grouped_mm, triton, native, torch, reference, got 'foo'. "
            "Use auto if unsure.",
        ),
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
