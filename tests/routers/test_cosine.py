import pytest
import torch

from moesaic import ConfigError
from moesaic.routers import CosineRouter, sigmoid, softmax


def _router(num_experts: int = 6, **options) -> CosineRouter:
    router = CosineRouter(8, num_experts, inner_width=3, **options)
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.embedding_ER)
    return router.double()


def test_cosines_stay_between_minus_1_and_1_and_the_temperature_divides_them():
    """Reference 21.3."""
    x_TD = 100 * torch.randn(200, 8, dtype=torch.float64)
    hot, cold = _router(temperature=0.3), _router(temperature=0.07)
    cold.load_state_dict(hot.state_dict() | {"log_temperature": cold.log_temperature.detach()})
    cosine_TE = hot(x_TD).logits_TE * 0.3
    assert cosine_TE.abs().max() <= 1 + 1e-7
    assert cosine_TE.abs().max() > 0.95
    assert torch.allclose(cosine_TE, cold(x_TD).logits_TE * 0.07, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-2, 3.0, 1e6])
def test_the_length_of_a_token_changes_nothing(scale):
    """Reference 21.3, the paper's version."""
    router, x_TD = _router(), torch.randn(50, 8, dtype=torch.float64)
    routing, scaled = router(x_TD), router(scale * x_TD)
    assert torch.equal(routing.expert_N, scaled.expert_N)
    assert torch.allclose(routing.weight_N, scaled.weight_N, rtol=1e-9)


def test_gradients_are_at_right_angles_to_embeddings_and_projected_tokens():
    """Reference 21.3: moving along its own direction changes no cosine."""
    router, x_TD = _router(), torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    router(x_TD).weight_N.square().sum().backward()
    gradient_ER, embedding_ER = router.embedding_ER.grad, router.embedding_ER.detach()
    assert gradient_ER.abs().max() > 1e-3
    assert (gradient_ER * embedding_ER).sum(dim=-1).abs().max() < 1e-12
    assert ((x_TD.grad * x_TD).sum(dim=-1)).abs().max() < 1e-12


def test_the_temperature_is_learned_and_stays_positive():
    router = _router(temperature=0.3)
    assert float(router.log_temperature.detach().exp()) == pytest.approx(0.3)
    router(torch.randn(50, 8, dtype=torch.float64)).weight_N.sum().backward()
    assert abs(float(router.log_temperature.grad)) > 1e-3
    with torch.no_grad():
        router.log_temperature.fill_(-9.0)
    routing = router(torch.randn(50, 8, dtype=torch.float64))
    assert routing.weight_N.isfinite().all()
    assert routing.logits_TE.abs().max() > 1000


@pytest.mark.parametrize("score", [softmax, sigmoid])
def test_weights_are_the_scores_of_the_chosen_as_they_are(score):
    routing = _router(top_k=2, score=score)(torch.randn(9, 8, dtype=torch.float64))
    assert torch.equal(routing.weight_N, score.of(routing.logits_TE)[routing.token_N, routing.expert_N])


def test_a_token_of_zeros_is_at_right_angles_to_all_and_its_gradient_is_bounded():
    router, x_TD = _router(), torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)
    routing = router(x_TD)
    assert routing.logits_TE.abs().max() == 0
    assert routing.expert_N.tolist() == [0, 0]
    routing.weight_N.sum().backward()
    assert x_TD.grad.abs().max() < 1e6


def test_equal_embeddings_are_taken_from_the_lowest_on():
    router = _router(top_k=3)
    with torch.no_grad():
        router.embedding_ER.copy_(router.embedding_ER[:1].expand(6, 3))
    assert router(torch.randn(4, 8, dtype=torch.float64)).expert_N.view(4, 3).tolist() == [[0, 1, 2]] * 4


def test_autocast_rounds_nothing():
    router, x_TD = _router().float(), torch.randn(64, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router(x_TD)
    assert torch.equal(cast.logits_TE, router(x_TD).logits_TE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_width": 0}, "inner_width must be at least 1, got 0. X-MoE uses num_experts / 2."),
        ({"inner_width": 4, "temperature": -0.5}, "temperature must be positive, got -0.5. X-MoE starts at 0.3."),
        (
            {"inner_width": 4, "top_k": 9},
            "top_k must be between 1 and num_experts=6, got 9. Lower top_k, or add experts.",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError) as error:
        CosineRouter(8, 6, **options)
    assert str(error.value) == message


def test_one_inner_dimension_knows_two_directions_only():
    router = CosineRouter(8, 4, inner_width=1).double()
    logits_TE = router(torch.randn(20, 8, dtype=torch.float64)).logits_TE
    assert torch.allclose(logits_TE.abs(), torch.full_like(logits_TE, 1 / 0.3))
