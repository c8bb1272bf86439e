import pytest
import torch

from moesaic import ConfigError, Context, ShapeError
from moesaic.routers import ResidualRouter
from tests.tolerances import assert_close


def _wide(weight: torch.Tensor, _fan_in: int) -> None:
    torch.nn.init.normal_(weight, std=0.7)


def _router(**options) -> ResidualRouter:
    return ResidualRouter(5, 6, **({"top_k": 2, "num_special": 2, "init": _wide} | options)).double()


def test_the_logits_of_the_layer_below_are_mapped_and_added():
    router, x_TD = _router(), torch.randn(7, 5, dtype=torch.float64)
    below_TE = torch.randn(7, 6, dtype=torch.float64)
    routing = router(x_TD, None, Context(below_TE=below_TE))
    expected_TE = x_TD @ router.weight.T + below_TE @ router.below_weight.T
    assert_close(routing.logits_TE, expected_TE, "logits")
    assert_close(routing.scores_TE, expected_TE.softmax(dim=-1), "scores")
    assert_close(routing.weight_N, expected_TE.softmax(dim=-1).topk(2).values.flatten(), "weights")


def test_the_first_layer_has_no_residual_and_a_map_of_zeros_changes_nothing():
    """Reference 18.6, example 4."""
    router, x_TD = _router(), torch.randn(7, 5, dtype=torch.float64)
    first = router(x_TD)
    assert_close(first.logits_TE, x_TD @ router.weight.T, "logits")
    torch.nn.init.zeros_(router.below_weight)
    above = router(x_TD, None, Context(below_TE=torch.randn(7, 6)))
    assert torch.equal(above.logits_TE, first.logits_TE)


def test_the_first_layer_s_unused_map_gets_zeros_for_a_gradient():
    router = _router()
    router(torch.randn(7, 5, dtype=torch.float64)).weight_N.sum().backward()
    assert router.below_weight.grad.abs().sum() == 0


def test_the_gradient_flows_to_the_layer_below():
    router = _router()
    below_TE = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    router(torch.randn(7, 5, dtype=torch.float64), None, Context(below_TE=below_TE)).weight_N.sum().backward()
    assert below_TE.grad.abs().sum() > 0
    assert router.below_weight.grad.abs().sum() > 0


def test_the_net_of_the_authors_code_has_a_tanh_between_two_maps():
    router, x_TD = _router(net="tanh"), torch.randn(7, 5, dtype=torch.float64)
    assert router.inner_weight.shape == (48, 5)
    assert router.weight.shape == (6, 48)
    assert_close(router(x_TD).logits_TE, (x_TD @ router.inner_weight.T).tanh() @ router.weight.T, "logits")


def test_special_experts_stand_last_and_are_marked_by_tau():
    routing = _router(num_special=2, tau=0.25)(torch.randn(3, 5, dtype=torch.float64))
    assert routing.extras["eta_E"].tolist() == [1.0, 1.0, 1.0, 1.0, 0.25, 0.25]
    assert _router(num_special=0)(torch.randn(3, 5, dtype=torch.float64)).extras["eta_E"].tolist() == [1.0] * 6


def test_the_router_runs_in_float32_at_least_whatever_the_logits_below_are():
    router = _router(net="tanh").bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(torch.randn(7, 5).bfloat16(), None, Context(below_TE=torch.randn(7, 6).bfloat16()))
    assert routing.logits_TE.dtype == torch.float32


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
def test_extreme_logits_give_no_nan_and_ties_go_to_the_lowest_expert(value):
    router = _router().float()
    torch.nn.init.constant_(router.weight, value)
    routing = router(torch.ones(4, 5))
    routing.weight_N.sum().backward()
    assert routing.expert_N.view(4, 2).tolist() == [[0, 1]] * 4
    assert router.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_special": 6},
            "num_special must be at least 0 and below num_experts=6, got 6. Leave at least one feed-forward expert.",
        ),
        ({"tau": 0.0}, "tau must be above 0 and at most 1, got 0.0. MoE++ uses 0.75."),
        ({"net": "deep"}, "net must be 'linear' or 'tanh', got 'deep'. The paper has 'linear'."),
        ({"top_k": 7}, "top_k must be between 1 and num_experts=6, got 7. Lower top_k, or add experts."),
    ],
)
def test_impossible_numbers_are_refused(options, message):
    with pytest.raises(ConfigError) as error:
        _router(**options)
    assert str(error.value) == message


def test_logits_from_a_layer_of_another_size_are_refused():
    with pytest.raises(ShapeError) as error:
        _router()(torch.zeros(3, 5), None, Context(below_TE=torch.zeros(3, 4)))
    assert str(error.value) == (
        "Context.below_TE must be (3, 6), one logit for each expert here, got (3, 4). "
        "Give all MoE layers the same num_experts."
    )
