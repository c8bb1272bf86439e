import itertools
import math

import pytest
import torch

from moesaic import ConfigError, ShapeError
from moesaic.routers import GroupLimit, TopKRouter, sigmoid, softmax
from tests.oracle import router as oracle
from tests.tolerances import assert_close

SCORES = {"softmax": softmax, "sigmoid": sigmoid}
COMBINATIONS = list(
    itertools.product(
        SCORES, ["scores", "chosen", "logits"], [1.0, 2.5], [False, True], [None, (4, 2, 2), (2, 1, 1), (1, 1, 2)]
    )
)


def _router(score="softmax", *, num_experts=8, top_k=3, groups=None, **options) -> TopKRouter:
    limit = None
    if groups is not None:
        limit = GroupLimit(num_groups=groups[0], groups_kept=groups[1], best_per_group=groups[2])
    router = TopKRouter(5, num_experts, top_k=top_k, score=SCORES[score], groups=limit, **options)
    torch.nn.init.normal_(router.weight, std=0.7)
    return router.double()


@pytest.mark.parametrize(("score", "normalize", "scale", "biased", "groups"), COMBINATIONS)
def test_every_combination_of_options_agrees_with_plain_loops(score, normalize, scale, biased, groups):
    router = _router(score, normalize=normalize, scale=scale, groups=groups, selection_bias=biased)
    if biased:
        router.bias_E.copy_(torch.linspace(-0.9, 0.4, 8)[torch.randperm(8)])
    x_TD = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    weight = router.weight.detach().clone().requires_grad_()
    x_oracle_TD = x_TD.detach().clone().requires_grad_()
    routing = router(x_TD)
    table = oracle.route(
        x_oracle_TD,
        weight,
        top_k=3,
        score=score,
        normalize=normalize,
        scale=scale,
        bias=router.bias_E.tolist() if biased else None,
        groups=groups,
    )
    assert routing.expert_N.tolist() == [row.expert for row in table.rows]
    expected_N = torch.stack([row.weight for row in table.rows])
    assert_close(routing.weight_N, expected_N, "weight_N")
    probe_N = torch.randn(33, dtype=torch.float64)
    (routing.weight_N * probe_N).sum().backward()
    (expected_N * probe_N).sum().backward()
    assert_close(x_TD.grad, x_oracle_TD.grad, "gradient of x_TD")
    assert_close(router.weight.grad, weight.grad, "gradient of the router's weight")


def test_mixtral_s_two_ways_to_write_its_weights_are_equal_and_only_for_softmax():
    """Reference 0.4: softmax, pick, divide by the sum, or pick, softmax."""
    x_TD = torch.randn(9, 5, dtype=torch.float64)
    for score, same in (("softmax", True), ("sigmoid", False)):
        chosen = _router(score, normalize="chosen")
        logits = _router(score, normalize="logits")
        logits.load_state_dict(chosen.state_dict())
        assert torch.allclose(chosen(x_TD).weight_N, logits(x_TD).weight_N, atol=1e-12) is same


def test_chosen_weights_stay_right_where_every_score_has_underflowed():
    router = TopKRouter(1, 4, top_k=2, score=sigmoid)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[-200.0], [-201.0], [-300.0], [-400.0]]))
    routing = router(torch.ones(1, 1))
    assert routing.scores_TE.tolist() == [[0.0] * 4]
    assert routing.expert_N.tolist() == [0, 1]
    expected = 1 / (1 + math.exp(-1))
    assert routing.weight_N.tolist() == pytest.approx([expected, 1 - expected], abs=1e-6)
    routing.weight_N[0].backward()
    assert router.weight.grad.isfinite().all()
    assert router.weight.grad.abs().sum() > 0.1


def test_jitter_moves_only_the_router_s_copy_and_stays_in_its_band():
    router = TopKRouter(4, 4, top_k=2, jitter=0.25)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    x_TD = torch.tensor([1.0, -4.0, 0.5, 100.0]).expand(500, 4).clone()
    before_TD = x_TD.clone()
    ratio_TE = router(x_TD).logits_TE.detach() / x_TD
    assert torch.equal(x_TD, before_TD)
    assert 0.75 <= float(ratio_TE.min()) < 0.76
    assert 1.24 < float(ratio_TE.max()) <= 1.25
    assert abs(float(ratio_TE.mean()) - 1) < 0.02
    # Each number of a token has a factor of its own.
    assert torch.corrcoef(ratio_TE.T).fill_diagonal_(0).abs().max() < 0.2
    assert torch.equal(router.eval()(x_TD).logits_TE, x_TD)


def test_a_bias_that_is_common_to_all_experts_selects_nothing():
    router = _router("sigmoid", selection_bias=True, groups=(4, 2, 2))
    x_TD = torch.randn(40, 5, dtype=torch.float64)
    before = router(x_TD).expert_N
    router.bias_E += 0.5
    assert torch.equal(router(x_TD).expert_N, before)


def test_too_many_choices_name_both_numbers_and_a_way_out():
    with pytest.raises(ConfigError) as error:
        TopKRouter(8, 4, top_k=5)
    assert str(error.value) == "top_k must be between 1 and num_experts=4, got 5. Lower top_k, or add experts."


def test_no_choice_at_all_is_refused():
    with pytest.raises(ConfigError) as error:
        TopKRouter(8, 6, top_k=0)
    assert str(error.value) == "top_k must be between 1 and num_experts=6, got 0. Lower top_k, or add experts."


@pytest.mark.parametrize(("normalize", "score"), [("chosen", softmax), ("chosen", sigmoid), ("logits", softmax)])
def test_one_choice_whose_weight_is_always_one_is_refused(normalize, score):
    with pytest.raises(ConfigError) as error:
        TopKRouter(8, 4, top_k=1, normalize=normalize, score=score)
    assert str(error.value) == (
        f"top_k=1 needs weights that depend on the router, got normalize={normalize!r}, which makes the one weight 1 "
        "and cuts the router's gradient. Use normalize='scores', or top_k=2."
    )


def test_one_choice_weighted_by_the_sigmoid_of_its_own_logit_is_allowed():
    router = TopKRouter(8, 4, top_k=1, normalize="logits", score=sigmoid)
    router(torch.randn(5, 8)).weight_N.sum().backward()
    assert router.weight.grad.abs().sum() > 0


def test_a_single_expert_may_have_a_constant_weight():
    assert TopKRouter(8, 1, top_k=1)(torch.randn(3, 8)).weight_N.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("jitter", [-0.5, 1.5])
def test_jitter_outside_its_range_is_refused(jitter):
    with pytest.raises(ConfigError) as error:
        TopKRouter(8, 4, top_k=2, jitter=jitter)
    assert str(error.value) == f"jitter must be at least 0 and less than 1, got {jitter}. Switch uses 0.01."


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ConfigError) as error:
        TopKRouter(8, 4, top_k=2, normalize="topk")
    assert str(error.value) == (
        "normalize must be 'scores', 'chosen' or 'logits', got 'topk'. Mixtral and DeepSeek-V3 use 'chosen'."
    )


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 8), (8,)])
def test_tokens_of_another_shape_are_refused(shape):
    with pytest.raises(ShapeError) as error:
        TopKRouter(8, 4, top_k=2)(torch.zeros(shape))
    assert str(error.value) == (
        f"x_TD must be (tokens, 8), got {shape}. Flatten batch and position into one dimension."
    )


def test_the_bias_stays_float32_through_every_cast_and_follows_the_device():
    router = TopKRouter(8, 4, top_k=2, selection_bias=True)
    router.bias_E += 1e-3
    kept_E = router.bias_E.clone()
    for cast in (router.bfloat16, router.half, router.double, router.float):
        cast()
        assert router.bias_E.dtype == torch.float32
        assert torch.equal(router.bias_E, kept_E)
    router.to(dtype=torch.bfloat16)
    assert torch.equal(router.bias_E, kept_E)
    assert router.to("meta", torch.bfloat16).bias_E.device.type == "meta"
    assert router.bias_E.dtype == torch.float32


@pytest.mark.parametrize("normalize", ["scores", "chosen", "logits"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_bias_that_is_added_later_is_that_of_a_router_built_with_one(score, normalize):
    torch.manual_seed(0)
    built, later = (_router(score, normalize=normalize, selection_bias=biased) for biased in (True, False))
    later.load_state_dict({"weight": built.weight})
    x_TD = torch.randn(40, 5, dtype=torch.float64)
    by_logits = later(x_TD)
    later.add_selection_bias()
    fresh = later(x_TD)
    assert torch.equal(fresh.expert_N, by_logits.expert_N)
    assert torch.equal(fresh.weight_N, by_logits.weight_N)
    for router in (built, later):
        router.bias_E.copy_(torch.linspace(-0.9, 0.4, 8).roll(3))
    later.add_selection_bias()  # there is one: nothing happens
    ours, theirs = later(x_TD), built(x_TD)
    assert not torch.equal(ours.expert_N, by_logits.expert_N)
    assert torch.equal(ours.expert_N, theirs.expert_N)
    assert torch.equal(ours.weight_N, theirs.weight_N)
    assert later.half().bias_E.dtype == torch.float32


def test_a_bias_is_added_where_the_weight_is():
    router = TopKRouter(8, 4, top_k=2).to("meta")
    router.add_selection_bias()
    assert router.bias_E.device.type == "meta"


def test_the_bias_is_saved_with_the_router():
    assert "bias_E" in TopKRouter(8, 4, top_k=2, selection_bias=True).state_dict()
    assert "bias_E" not in TopKRouter(8, 4, top_k=2).state_dict()


def test_bfloat16_logits_would_cost_a_third_of_the_best_expert_s_probability():
    """Reference 7.2: ten logits of 128 and one of 128.5. Rounded to bfloat16 it falls from 0.142 to 0.091."""
    router = TopKRouter(2, 11, top_k=1, normalize="scores")
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[128.0, 0.0]] * 10 + [[128.0, 0.5]]))
    routing = router.bfloat16()(torch.ones(1, 2, dtype=torch.bfloat16))
    assert routing.weight_N.item() == pytest.approx(0.1415, abs=1e-4)
    assert routing.expert_N.tolist() == [10]
    rounded = routing.logits_TE.bfloat16().float().softmax(dim=-1)
    assert rounded[0, 10].item() == pytest.approx(1 / 11)
