import math

import pytest
import torch

from moesaic import ConfigError
from moesaic.routers import NormalizedRouter
from moesaic.routers.normalized import normalized
from tests.tolerances import assert_close


def router_with(num_experts: int = 6, **options) -> NormalizedRouter:
    router = NormalizedRouter(4, num_experts, **{"top_k": 2, **options}).double()
    torch.nn.init.normal_(router.weight)
    if router.logit_bias_E is not None:
        torch.nn.init.normal_(router.logit_bias_E)
    return router


def test_normalised_logits_have_mean_0_and_standard_deviation_1_for_each_token():
    """Reference 16.6, example 1."""
    normal_TE = normalized(3 * torch.randn(50, 9, dtype=torch.float64) + 7, eps=1e-6)
    assert_close(normal_TE.mean(dim=-1), torch.zeros(50, dtype=torch.float64), "mean")
    assert torch.allclose(normal_TE.std(dim=-1, correction=0), torch.ones(50, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_scores_do_not_see_how_large_logits_are_nor_what_is_added_to_all(scale):
    """Reference 16.6, example 1."""
    router = router_with(scale=scale, logit_bias=False)
    x_TD = torch.randn(30, 4, dtype=torch.float64)
    first = router(x_TD)
    second = router(1000 * x_TD)
    assert first.expert_N.tolist() == second.expert_N.tolist()
    assert torch.allclose(first.weight_N, second.weight_N, atol=1e-5)
    with torch.no_grad():
        router.weight += 50  # adds the same to every expert's logit
    assert torch.allclose(first.scores_TE, router(x_TD).scores_TE, atol=1e-5)


def test_the_scale_of_the_logits_gets_no_gradient():
    """Reference 16.6, example 1."""
    logits_TE = torch.randn(20, 5, dtype=torch.float64)
    factor = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    (normalized(factor * logits_TE, eps=1e-12) * torch.randn(20, 5)).sum().backward()
    assert abs(float(factor.grad)) < 1e-9


def test_two_logits_always_come_to_plus_and_minus_one():
    """Reference 16.6, example 2: why fewer than three experts are refused."""
    for logits in ([3.0, 1.0], [-5.0, 100.0]):
        normal_TE = normalized(torch.tensor([logits], dtype=torch.float64), eps=1e-12)
        assert normal_TE.abs().tolist()[0] == pytest.approx([1.0, 1.0])


def test_the_standard_deviation_is_the_population_s():
    """Reference 16.6, example 4: the sample's is larger by sqrt(16 / 15), 3.3 %."""
    logits_TE = torch.randn(1, 16, dtype=torch.float64)
    sample_TE = (logits_TE - logits_TE.mean()) / logits_TE.std()
    ratio_TE = normalized(logits_TE, eps=1e-12) / sample_TE
    assert ratio_TE.tolist()[0] == pytest.approx([math.sqrt(16 / 15)] * 16)


def test_the_sharper_the_scale_the_larger_the_best_weight():
    x_TD = torch.randn(40, 4, dtype=torch.float64)
    router = router_with()
    best = []
    for scale in (0.5, 1.0, 2.0):
        router.scale = scale
        routing = router(x_TD)
        weight_TK = routing.weight_N.detach().view(40, 2)
        assert weight_TK.sum(dim=-1).tolist() == pytest.approx([1.0] * 40)
        best.append(float(weight_TK[:, 0].mean()))
    assert best == sorted(best)
    assert best[2] > best[0] + 0.1


def test_logits_are_those_before_normalisation_bias_included():
    router = router_with()
    x_TD = torch.randn(7, 4, dtype=torch.float64)
    assert_close(router(x_TD).logits_TE, x_TD @ router.weight.t() + router.logit_bias_E, "logits")
    assert router.experts_per_token == 2.0


@pytest.mark.parametrize("bias", [[0.0] * 5, [1e4, -1e4, 0, 0, 0], [-math.inf, 0, 1, 2, 3], [-math.inf] * 4 + [1.0]])
def test_equal_huge_and_infinite_logits_give_finite_weights_and_gradients(bias):
    router = router_with(5).float()
    with torch.no_grad():
        router.weight.zero_()
        router.logit_bias_E.copy_(torch.tensor(bias))
    routing = router(torch.randn(6, 4))
    assert routing.weight_N.isfinite().all()
    assert routing.scores_TE.isfinite().all()
    (routing.weight_N.sum() + routing.scores_TE.square().sum()).backward()
    assert router.weight.grad.isfinite().all()
    assert router.logit_bias_E.grad.isfinite().all()


def test_equal_logits_choose_the_first_experts_with_equal_weights():
    router = router_with(5)
    torch.nn.init.zeros_(router.weight)
    torch.nn.init.zeros_(router.logit_bias_E)
    routing = router(torch.randn(3, 4, dtype=torch.float64))
    assert routing.expert_N.tolist() == [0, 1] * 3
    assert routing.weight_N.tolist() == [0.5] * 6


def test_no_tokens_route_nowhere():
    router = router_with()
    routing = router(torch.zeros(0, 4, dtype=torch.float64))
    assert routing.num_rows == 0
    routing.scores_TE.sum().backward()
    assert router.weight.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("num_experts", "options", "message"),
    [
        (
            6,
            {"top_k": 1},
            "top_k must be at least 2, got 1: the one weight would be 1 and cut the router's gradient. "
            "Use top_k=2, or TopKRouter(normalize='scores').",
        ),
        (
            2,
            {},
            "num_experts must be at least 3, got 2: the normalised logits of two are always the same two numbers. "
            "Add experts, or use TopKRouter.",
        ),
        (6, {"scale": 0.0}, "scale must be positive, got 0.0. Leave it at 1.0 if unsure."),
        (6, {"eps": -1.0}, "eps must be positive, got -1.0. Leave it at 1e-06 if unsure."),
        (6, {"top_k": 7}, "top_k must be between 1 and num_experts=6, got 7. Lower top_k, or add experts."),
    ],
)
def test_what_cannot_train_is_refused(num_experts, options, message):
    with pytest.raises(ConfigError) as error:
        NormalizedRouter(4, num_experts, **{"top_k": 2, **options})
    assert str(error.value) == message
