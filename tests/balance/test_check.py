"""A balance term that would do nothing is refused with the reason; every other one trains the router."""

from dataclasses import replace

import pytest
import torch

from moesaic import ConfigError, recipes
from moesaic.balance import TERMS, BiasRule, LossTerm, check, named
from moesaic.routers import TokenChoiceRouter
from tests.laws.settings import WIDTH, context_for, plain, tokens

# What an implementation reads only in its own company, and what the router must be able to do.
REASONS = (
    "needs routing.extras[",
    "which has no place for one",
    "needs a layer with a coefficient",
    "needs layers with a coefficient",
    "needs a router that can cool",
    "steers a router, got a",
    "whose router has none: its loads are fixed",
    "with its routing the loss has one value, whatever the weights",
)
# Controllers of a coefficient, and a loss that is multiplied by it.
COMPANY = {"drops": {"adaptive-even-gate": 1.0}, "sparsity": {"adaptive-even-gate": 1.0}}


def refusal_of(terms, layer) -> str | None:
    try:
        check(terms, layer, WIDTH)
    except ConfigError as error:
        return str(error)
    return None


def gradient_of(term, layer, setting) -> float:
    """The steepest slope of a loss on tokens that the check has not seen, in float64."""
    layer = layer.double().train()
    router = getattr(layer, "router", layer)
    steepest = 0.0
    for spread in (1, 3):
        context = context_for(48, setting)
        if hasattr(layer, "segment"):
            context = replace(context, sequence_T=torch.arange(48) // 24)
        routing = layer(spread * tokens(48, dtype=torch.float64), None, context)[1]
        known = {"global_load_E": routing.load_E, "reward_T": torch.linspace(-3, -1, 48).double().sin()}
        loss = term.loss(replace(routing, extras={**known, **routing.extras}))
        weights = [weight for weight in router.parameters() if weight.requires_grad]
        found = [one for one in torch.autograd.grad(loss, weights, allow_unused=True) if one is not None]
        assert found
        assert all(bool(one.isfinite().all()) for one in found)
        steepest = max([steepest, *(float(one.abs().max()) for one in found)])
    return steepest


def moves_load(controller, layer, setting) -> bool:
    """Whether steps on a lopsided load take rows from the experts that had most of them."""
    controller.rate = 0.2
    x_TD, context = tokens(48), context_for(48, setting)
    before_E = layer.eval()(x_TD, None, context)[1].load_E
    for _ in range(3):
        controller.step(before_E)
    after_E = layer(x_TD, None, context)[1].load_E
    return int(after_E[before_E.argmax()]) < int(before_E.max())


@pytest.mark.parametrize("recipe", recipes.names())
def test_every_term_trains_the_router_of_every_recipe_or_is_refused_with_the_reason(recipe):
    setting = plain(recipe)
    for name in TERMS:
        (term,) = named({name: 2.0})
        layer = setting.layer(**({"segment": 6} if recipe == "lory" else {}))
        refusal = refusal_of([term, *named(COMPANY.get(name, {}))], layer)
        assert getattr(getattr(layer, "router", None), "bias_E", None) is None or recipe == "deepseek-v3"
        if name == "bias":
            assert (refusal is None) == isinstance(getattr(layer, "router", None), TokenChoiceRouter)
        if refusal is not None:
            assert any(reason in refusal for reason in REASONS), (name, refusal)
        elif isinstance(term, LossTerm):
            assert gradient_of(term, layer, setting) > 1e-9, name
        elif isinstance(term, BiasRule):
            term.prepare(layer)
            (controller,) = term.build([layer])
            assert moves_load(controller, layer, setting)
        else:
            assert term.build([layer]), name


@pytest.mark.parametrize("recipe", recipes.names())
def test_a_recipes_own_balance_is_never_refused(recipe):
    check(recipes.get(recipe).balance, plain(recipe).layer(init_std=0.02), WIDTH)
    # Where the published numbers start, zeros as in Grok-1's router included.
    options = {"num_experts": 16} if recipes.get(recipe).options["num_experts"] > 16 else {}
    check(recipes.get(recipe).balance, recipes.get(recipe).layer(WIDTH, hidden=4, **options), WIDTH)


@pytest.mark.parametrize(
    ("recipe", "term", "router"),
    [
        ("dense", "switch", "DenseRouter"),
        ("ds-moe", "active-share", "DenseRouter"),
        ("expert-choice", "global-batch", "ExpertChoiceRouter"),
        ("reinforce", "importance", "PolicyRouter"),
        ("soft-moe", "sequence", "SoftMoE"),
    ],
)
def test_a_loss_that_routing_makes_constant_is_refused(recipe, term, router):
    """Loads that no weight changes: the Switch loss is 1 and its gradient rounding."""
    with pytest.raises(ConfigError) as error:
        check(named({term: 0.5}), plain(recipe).layer(), WIDTH)
    assert str(error.value) == (
        f"Balance loss {term} pushes {router} nowhere: with its routing the loss has one value, whatever the weights. "
        "Use another loss."
    )


def test_a_loss_off_the_graph_is_refused():
    term = LossTerm(name="loose", loss=lambda routing: routing.load_E.double().var(), coefficient=1.0)
    with pytest.raises(ConfigError) as error:
        check([term], plain("mixtral").layer(), WIDTH)
    assert str(error.value) == (
        "Balance loss loose reaches no weight of the router that it is to balance, TopKRouter, whose routing cuts it "
        "off. Use another loss."
    )


def test_a_loss_whose_slope_is_no_number_is_refused():
    term = LossTerm(name="steep", loss=lambda routing: (0 * routing.logits_TE.sum()).sqrt(), coefficient=1.0)
    with pytest.raises(ConfigError) as error:
        check([term], plain("mixtral").layer(), WIDTH)
    assert str(error.value) == ("Balance loss steep gives TopKRouter a gradient that is not finite. Use another loss.")


def test_a_coefficient_of_0_turns_a_loss_off_and_is_no_fault():
    check(named({"switch": 0.0}), plain("mixtral").layer(), WIDTH)


def test_the_layer_its_mode_and_the_random_generator_are_as_before():
    layer = plain("skywork").layer().eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    draw = torch.get_rng_state()
    check(named({"switch": 0.1, "adaptive-even-gate": 1.0, "drops": 0.01}), layer, WIDTH)
    assert torch.equal(torch.get_rng_state(), draw)
    assert not layer.training
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_an_adaptive_loss_needs_a_layer_with_a_coefficient():
    with pytest.raises(ConfigError) as error:
        check(named({"adaptive-even-gate": 0.5}), plain("mixtral").layer(), WIDTH)
    assert str(error.value) == (
        "adaptive loss adaptive-even-gate needs routing.extras['coefficient'], which this routing does not have. It "
        "comes from a layer built with coefficient=: use the two together, or another loss."
    )


@pytest.mark.parametrize(("rule", "name"), [("drops", "AdaptiveRule"), ("sparsity", "SparsityRule")])
def test_a_controller_of_a_coefficient_needs_a_loss_that_reads_it(rule, name):
    layer = plain("relu").layer()
    check(named({rule: 2.0, "adaptive-l1": 1.0}), layer, WIDTH)
    with pytest.raises(ConfigError) as error:
        check(named({rule: 2.0, "l1": 1.0}), layer, WIDTH)
    assert str(error.value) == (
        f"{name} moves the coefficient of an adaptive loss, and this balance has none. Add adaptive-even-gate or "
        "adaptive-l1, or leave the rule out."
    )


@pytest.mark.parametrize(
    ("recipe", "router"),
    [
        ("expert-choice", "ExpertChoiceRouter"),
        ("hash", "HashRouter"),
        ("dense", "DenseRouter"),
        ("thor", "RandomRouter"),
        ("relu", "ReLURouter"),
    ],
)
def test_a_bias_is_refused_where_no_token_chooses_by_scores(recipe, router):
    with pytest.raises(ConfigError) as error:
        check(named({"bias": 0.02}), plain(recipe).layer(), WIDTH)
    assert str(error.value) == (
        "Loss-free balancing adds a bias to the scores by which each token chooses its K best experts, as TopKRouter "
        f"does, got {router}, which has no place for one. Use a balance loss, or a recipe with that router."
    )


def test_a_trial_of_a_bias_leaves_the_layer_without_one():
    layer = plain("mixtral").layer()
    check(named({"bias": 0.02}), layer, WIDTH)
    assert "router.bias_E" not in layer.state_dict()
