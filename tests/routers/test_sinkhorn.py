import math

import pytest
import torch

from moesaic import ConfigError
from moesaic.routers import SinkhornRouter
from moesaic.routers.assignment import balanced_assignment
from moesaic.routers.sinkhorn import sinkhorn_plan


def _megatron(logits_TE: torch.Tensor) -> torch.Tensor:
    """Reference 10.3, as it stands: no largest logit subtracted."""
    kernel_TE = logits_TE.exp()
    num_tokens, num_experts = kernel_TE.shape
    d1, error = torch.ones(num_experts, dtype=kernel_TE.dtype), 1e9
    while error > 1e-4:
        d0 = (1 / num_tokens) / ((kernel_TE * d1).sum(1) + 1e-8)
        new = (1 / num_experts) / ((kernel_TE * d0[:, None]).sum(0) + 1e-8)
        error, d1 = float((new - d1).abs().mean()), new
    return d1 * kernel_TE * d0[:, None]


def test_the_plan_is_megatron_s_where_that_neither_overflows_nor_turns_in_circles():
    torch.manual_seed(0)
    logits_TE = torch.randn(40, 6, dtype=torch.float64) * 2
    plan_TE = sinkhorn_plan(logits_TE)
    # Both stop once their scale settles to 1e-4, and the scales differ by the largest logits.
    torch.testing.assert_close(plan_TE, _megatron(logits_TE), rtol=2e-3, atol=0)
    same = logits_TE - logits_TE.amax(dim=1, keepdim=True)
    torch.testing.assert_close(sinkhorn_plan(same), _megatron(same), rtol=1e-12, atol=0)


def test_rows_add_up_to_one_over_the_tokens_and_columns_to_one_over_the_experts():
    torch.manual_seed(0)
    plan_TE = sinkhorn_plan(torch.randn(50, 8) * 2 + torch.randn(8))
    assert plan_TE.sum(dim=1).tolist() == pytest.approx([1 / 50] * 50, rel=1e-3)
    assert plan_TE.sum(dim=0).tolist() == pytest.approx([1 / 8] * 8, rel=1e-3)


def test_the_plan_knows_nothing_of_constants_per_row_or_column():
    torch.manual_seed(0)
    logits_TE = torch.randn(30, 5, dtype=torch.float64)
    plan_TE = sinkhorn_plan(logits_TE, tolerance=1e-12)
    for shift in (torch.randn(30, 1, dtype=torch.float64) * 50, torch.randn(1, 5, dtype=torch.float64)):
        torch.testing.assert_close(sinkhorn_plan(logits_TE + shift, tolerance=1e-12), plan_TE, rtol=1e-5, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.2, 0.05])
def test_the_colder_the_plan_the_nearer_to_the_balanced_assignment(temperature):
    """The plan's value falls short of the best by the temperature times its entropy at most, ln 3 per token."""
    agreeing = 0
    for seed in range(20):
        logits_TE = torch.randn(12, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        expert_T = balanced_assignment(logits_TE)
        plan_TE = sinkhorn_plan(logits_TE / temperature, tolerance=1e-9)
        short = float(logits_TE.gather(1, expert_T[:, None]).mean() - (plan_TE * logits_TE).sum())
        assert -1e-4 <= short <= temperature * math.log(3)
        agreeing += int((plan_TE.argmax(dim=1) == expert_T).sum())
    assert agreeing / 240 > {1.0: 0.85, 0.2: 0.9, 0.05: 0.97}[temperature]


def test_training_balances_and_evaluation_takes_the_best():
    torch.manual_seed(0)
    router = SinkhornRouter(6, 8)
    x_TD = torch.randn(400, 6) + 0.5
    with torch.no_grad():
        router.weight.mul_(50)
    greedy, even = router.eval()(x_TD), router.train()(x_TD)
    assert torch.equal(greedy.expert_N, greedy.logits_TE.argmax(dim=1))
    assert greedy.load_E.max() > 2 * 50
    assert even.load_E.max() < 1.5 * 50


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_weights_are_the_token_s_own_scores_and_carry_the_only_gradient(top_k):
    torch.manual_seed(0)
    router = SinkhornRouter(6, 4, top_k=top_k)
    routing = router(torch.randn(20, 6))
    score_TE = routing.logits_TE.sigmoid() if top_k == 1 else routing.logits_TE.softmax(dim=-1)
    assert torch.equal(routing.weight_N, score_TE[routing.token_N, routing.expert_N])
    assert torch.equal(routing.scores_TE, score_TE)
    routing.weight_N.sum().backward()
    assert (router.weight.grad.abs().max() > 1e-3) == (top_k < 4)  # all of a softmax add up to 1


def test_choices_stand_in_the_order_of_the_plan():
    torch.manual_seed(0)
    router = SinkhornRouter(6, 5, top_k=3)
    x_TD = torch.randn(20, 6)
    plan_TE = sinkhorn_plan(router.logits(x_TD))
    assert torch.equal(router(x_TD).expert_N.view(20, 3), plan_TE.argsort(dim=1, descending=True)[:, :3])


def test_padding_takes_no_part_in_the_plan():
    torch.manual_seed(0)
    router = SinkhornRouter(6, 4, top_k=2)
    x_TD, valid_T = torch.randn(40, 6), torch.arange(40) % 5 < 3
    x_TD[~valid_T] *= 100
    routing, alone = router(x_TD, valid_T), router(x_TD[valid_T])
    assert torch.equal(routing.expert_N[routing.valid_N], alone.expert_N)
    assert not torch.equal(router(x_TD).expert_N[routing.valid_N], alone.expert_N)


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
def test_equal_logits_go_to_the_lowest_expert(value):
    router = SinkhornRouter(2, 3, top_k=2)
    with torch.no_grad():
        router.weight.fill_(value)
    routing = router(torch.tensor([[1.0, 0.0]] * 5))
    assert routing.expert_N.view(5, 2).tolist() == [[0, 1]] * 5
    assert routing.weight_N.isfinite().all()


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_far_logits_neither_overflow_nor_go_on_for_ever(scale):
    torch.manual_seed(0)
    plan_TE = sinkhorn_plan(torch.randn(16, 4) * scale + torch.tensor([0.0, 0.0, 0.0, -3 * scale]))
    assert plan_TE.isfinite().all()
    assert (plan_TE >= 0).all()
    forbidden_TE = torch.tensor([[0.0, float("-inf")], [1.0, 0.0]])
    assert sinkhorn_plan(forbidden_TE)[0, 1] == 0


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(0, 3, 2), (1, 1, 1), (4, 3, 3)])
def test_few_tokens_and_all_experts(num_tokens, num_experts, top_k):
    routing = SinkhornRouter(3, num_experts, top_k=top_k)(torch.randn(num_tokens, 3))
    assert routing.num_rows == num_tokens * top_k
    assert routing.weight_N.isfinite().all()


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ConfigError) as error:
        SinkhornRouter(3, 2, top_k=3)
    assert str(error.value) == "top_k must be between 1 and num_experts=2, got 3. Lower top_k, or add experts."
