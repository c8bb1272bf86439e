import pytest
import torch

from moesaic import ConfigError
from moesaic.routers import DenseRouter


def _router(num_experts: int = 6, **options) -> DenseRouter:
    router = DenseRouter(5, num_experts, **options).double()
    torch.nn.init.normal_(router.weight, std=0.8)
    return router


def _numbers(routing) -> list[int]:
    return torch.bincount(routing.token_N, minlength=routing.num_tokens).tolist()


def test_every_token_visits_every_expert_with_weights_that_add_up_to_1():
    router, x_TD = _router(), torch.randn(9, 5, dtype=torch.float64)
    for training in (True, False):
        routing = router.train(training)(x_TD)
        assert _numbers(routing) == [6] * 9
        assert routing.weight_N.detach().view(9, 6).sum(dim=-1).tolist() == pytest.approx([1] * 9)
        assert router.experts_per_token == 6
    assert (routing.weight_N.detach().view(9, 6).diff(dim=-1) <= 0).all()


def test_evaluation_with_all_experts_is_training_s_table():
    """Reference 12.2."""
    router, x_TD = _router(eval_top_k=6), torch.randn(9, 5, dtype=torch.float64)
    trained, evaluated = router.train()(x_TD), router.eval()(x_TD)
    for name in ("expert_N", "token_N", "weight_N", "choice_N"):
        assert torch.equal(getattr(trained, name), getattr(evaluated, name)), name


def test_evaluation_keeps_the_best_few_with_training_s_weights():
    router, x_TD = _router(eval_top_k=2), torch.randn(9, 5, dtype=torch.float64)
    assert router.train().experts_per_token == 6
    trained = router(x_TD)
    assert router.eval().experts_per_token == 2
    evaluated = router(x_TD)
    assert _numbers(evaluated) == [2] * 9
    assert torch.equal(evaluated.weight_N, trained.weight_N.view(9, 6)[:, :2].reshape(-1))
    assert torch.equal(evaluated.expert_N, trained.expert_N.view(9, 6)[:, :2].reshape(-1))


def test_a_threshold_keeps_the_probable_and_always_the_best():
    router = _router(3, eval_threshold=0.45).eval()
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, :2] = torch.tensor([[0.2, 0.5, 0.3], [0.48, 0.49, 0.03]]).log().t()
    x_TD = torch.eye(5, dtype=torch.float64)[:3]
    routing = router(x_TD)
    # The third token is undecided: nobody exceeds 0.45, the lowest expert stays.
    assert list(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True)) == [
        (0, 1),
        (1, 1),
        (1, 0),
        (2, 0),
    ]


def test_without_a_threshold_even_an_underflowed_probability_stays():
    router = DenseRouter(1, 3).eval()
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[0.0], [500.0], [-500.0]]))
    routing = router(torch.ones(1, 1))
    assert routing.expert_N.tolist() == [1, 0, 2]
    assert routing.weight_N.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("threshold", [-0.5, 1.0])
def test_a_threshold_that_no_probability_can_meet_is_refused(threshold):
    with pytest.raises(ConfigError) as error:
        DenseRouter(5, 6, eval_threshold=threshold)
    assert str(error.value) == (
        f"eval_threshold must be at least 0 and less than 1, got {threshold}. "
        "It is compared with probabilities: try 1 / num_experts."
    )


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ConfigError, match="top_k must be between 1 and num_experts=6, got 7"):
        DenseRouter(5, 6, eval_top_k=7)
