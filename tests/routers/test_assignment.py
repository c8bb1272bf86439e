import itertools
import time

import numpy as np
import pytest
import torch

from moesaic import ConfigError
from moesaic.routers import BalancedAssignmentRouter
from moesaic.routers.assignment import balanced_assignment


def _router(logits_TE: torch.Tensor, **options) -> BalancedAssignmentRouter:
    """A router whose logits for the tokens ``eye(T)`` are these."""
    router = BalancedAssignmentRouter(logits_TE.shape[0], logits_TE.shape[1], **options)
    with torch.no_grad():
        router.weight.copy_(logits_TE.T)
    return router


def _total(score_TE: torch.Tensor, expert_T: torch.Tensor) -> float:
    return float(score_TE.gather(1, expert_T[:, None]).sum())


def _best_by_trying_all(score_TE: torch.Tensor) -> float:
    num_tokens, num_experts = score_TE.shape
    totals = []
    for experts in itertools.product(range(num_experts), repeat=num_tokens):
        loads = np.bincount(experts, minlength=num_experts)
        if loads.max() - loads.min() <= 1:
            totals.append(_total(score_TE, torch.tensor(experts)))
    return max(totals)


EXAMPLE = torch.tensor([[5.0, 4.0], [5.0, 1.0], [4.0, 3.0], [2.0, 3.0]])


def test_the_worked_example_moves_one_token_at_the_smallest_regret():
    """Reference 10.1: argmax gives loads (3, 1) and 17, the balanced optimum is 16."""
    router = _router(EXAMPLE)
    greedy = router.eval()(torch.eye(4))
    assert greedy.load_E.tolist() == [3, 1]
    assert _total(EXAMPLE, greedy.expert_N) == 17
    even = router.train()(torch.eye(4))
    assert even.load_E.tolist() == [2, 2]
    assert _total(EXAMPLE, even.expert_N) == 16
    assert even.weight_N.tolist() == pytest.approx(EXAMPLE[torch.arange(4), even.expert_N].sigmoid().tolist())


@pytest.mark.parametrize(
    ("num_tokens", "num_experts"), [(1, 3), (2, 3), (4, 2), (5, 2), (6, 3), (7, 3), (8, 2), (5, 4)]
)
def test_small_assignments_are_the_best_of_all_that_differ_by_one_at_most(num_tokens, num_experts):
    for seed in range(5):
        score_TE = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)).double()
        expert_T = balanced_assignment(score_TE)
        loads = torch.bincount(expert_T, minlength=num_experts)
        assert int(loads.max() - loads.min()) <= 1
        assert _total(score_TE, expert_T) == pytest.approx(_best_by_trying_all(score_TE))


def test_no_random_balanced_assignment_is_better_and_no_unbalanced_best_is_worse():
    """Reference 10.1, invariants."""
    torch.manual_seed(0)
    score_TE = torch.randn(64, 8).double() + torch.randn(8)
    best = _total(score_TE, balanced_assignment(score_TE))
    even_T = torch.arange(64) % 8
    for _ in range(200):
        assert _total(score_TE, even_T[torch.randperm(64)]) <= best
    assert best < float(score_TE.max(dim=1).values.sum())


@pytest.mark.parametrize(("num_tokens", "num_experts", "most"), [(64, 8, 1024), (96, 8, 32), (120, 4, 30), (63, 8, 16)])
def test_every_expert_gets_its_exact_share_however_the_batch_is_cut(num_tokens, num_experts, most):
    torch.manual_seed(0)
    router = BalancedAssignmentRouter(5, num_experts, assign_tokens=most)
    load_E = router(torch.randn(num_tokens, 5) + 1).load_E
    assert int(load_E.max() - load_E.min()) == (1 if num_tokens % num_experts else 0)
    assert router.eval()(torch.randn(num_tokens, 5) + 1).load_E.max() > num_tokens // num_experts + 1


def test_parts_are_solved_apart():
    """Each part is balanced alone: tokens 0, 2, 4, ... and 1, 3, 5, ... here."""
    torch.manual_seed(0)
    x_TD = torch.randn(32, 5)
    router = BalancedAssignmentRouter(5, 4, assign_tokens=16)
    routing = router(x_TD)
    for part in (slice(0, None, 2), slice(1, None, 2)):
        assert torch.equal(routing.expert_N[part], balanced_assignment(router.logits(x_TD[part])))
    router.assign_tokens = 32
    assert not torch.equal(router(x_TD).expert_N, routing.expert_N)


def test_padding_is_assigned_to_nobody():
    torch.manual_seed(0)
    router = BalancedAssignmentRouter(5, 4)
    x_TD, valid_T = torch.randn(40, 5), torch.arange(40) % 5 < 3
    routing = router(x_TD, valid_T)
    assert routing.load_E.tolist() == [6] * 4
    assert torch.equal(routing.expert_N[valid_T], router(x_TD[valid_T]).expert_N)
    assert torch.equal(routing.expert_N[~valid_T], router.eval()(x_TD).expert_N[~valid_T])


def test_the_assignment_has_no_gradient_and_the_weight_trains_the_centroid():
    torch.manual_seed(0)
    router = BalancedAssignmentRouter(5, 4).double()
    x_TD = torch.randn(8, 5, dtype=torch.float64)
    routing = router(x_TD)
    routing.weight_N.sum().backward()
    slope_N = routing.weight_N.detach() * (1 - routing.weight_N.detach())
    expected = torch.zeros(4, 5, dtype=torch.float64).index_add(0, routing.expert_N, slope_N[:, None] * x_TD)
    torch.testing.assert_close(router.weight.grad, expected)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_scores_that_are_not_finite_count_as_the_least_finite_one(value):
    score_TE = EXAMPLE.clone()
    score_TE[0, 0] = value
    replaced_TE = EXAMPLE.clone()
    replaced_TE[0, 0] = 1.0
    assert torch.equal(balanced_assignment(score_TE), balanced_assignment(replaced_TE))
    nothing_TE = torch.full((6, 3), value)
    assert torch.bincount(balanced_assignment(nothing_TE)).tolist() == [2, 2, 2]


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
def test_equal_scores_are_shared_out_the_same_way_every_time(value):
    score_TE = torch.full((12, 4), value)
    first_T = balanced_assignment(score_TE)
    assert torch.bincount(first_T).tolist() == [3] * 4
    assert torch.equal(balanced_assignment(score_TE), first_T)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(0, 3), (1, 1), (5, 1), (1, 4)])
def test_few_tokens_and_few_experts(num_tokens, num_experts):
    routing = BalancedAssignmentRouter(3, num_experts)(torch.randn(num_tokens, 3))
    assert routing.expert_N.shape == (num_tokens,)
    assert int(routing.load_E.max()) <= 1 or num_experts == 1


def test_a_long_batch_is_cut_so_that_it_stays_fast():
    """4,096 tokens at once take 5 s; four parts of 1,024 took 0.15 s on one core."""
    router = BalancedAssignmentRouter(16, 64)
    x_TD = torch.randn(4096, 16)
    start = time.perf_counter()
    routing = router(x_TD)
    assert time.perf_counter() - start < 2
    assert routing.load_E.tolist() == [64] * 64


def test_a_cut_of_nothing_is_refused():
    with pytest.raises(ConfigError) as error:
        BalancedAssignmentRouter(3, 2, assign_tokens=0)
    assert str(error.value) == "assign_tokens must be at least 1, got 0. 1024 are solved in 0.05 s."
