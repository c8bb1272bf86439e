import math

import pytest
import torch

from moesaic import ConfigError, Context
from moesaic.routers import ExpertChoiceRouter
from moesaic.routers.assignment import balanced_assignment
from moesaic.routers.expert_choice import capped_plan
from moesaic.routers.ranks import rank_for_experts, share_of_groups


def _with_logits(logits_TE: torch.Tensor, **options) -> tuple[ExpertChoiceRouter, torch.Tensor]:
    """A router and tokens for which it gives these logits."""
    router = ExpertChoiceRouter(logits_TE.shape[0], logits_TE.shape[1], **options)
    with torch.no_grad():
        router.weight.copy_(logits_TE.T)
    return router, torch.eye(logits_TE.shape[0])


def _visits(routing, num_tokens: int) -> torch.Tensor:
    return torch.bincount(routing.token_N, minlength=num_tokens)


def test_the_worked_example():
    """Reference 9.6, example 4."""
    first_T = torch.tensor([0.9, 0.8, 0.3, 0.4])
    router, x_TD = _with_logits(torch.stack([first_T, 1 - first_T], dim=1).log(), top_k=1)
    routing = router(x_TD)
    assert routing.token_N.tolist() == [0, 1, 2, 3]
    assert routing.expert_N.tolist() == [0, 0, 1, 1]
    assert routing.weight_N.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6])
    assert routing.load_E.tolist() == [2, 2]


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(64, 8, 2), (60, 6, 3), (40, 4, 0.5), (17, 5, 2)])
def test_every_expert_takes_exactly_its_share(num_tokens, num_experts, top_k):
    router = ExpertChoiceRouter(5, num_experts, top_k=top_k)
    for training in (True, False):
        routing = router.train(training)(torch.randn(num_tokens, 5))
        take = math.floor(num_tokens * top_k / num_experts)
        assert routing.load_E.tolist() == [take] * num_experts
        assert int(_visits(routing, num_tokens).sum()) == take * num_experts
        assert torch.equal(routing.weight_N, routing.scores_TE[routing.token_N, routing.expert_N])


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "take"),
    [(1, 8, 2, 1), (3, 8, 2, 1), (0, 4, 2, 0), (5, 2, 2, 5), (7, 1, 1, 7)],
)
def test_shares_are_rounded_down_but_at_least_one_and_at_most_all(num_tokens, num_experts, top_k, take):
    routing = ExpertChoiceRouter(4, num_experts, top_k=top_k)(torch.randn(num_tokens, 4))
    assert routing.load_E.tolist() == [take] * num_experts


def test_permuting_tokens_permutes_the_choices():
    torch.manual_seed(0)
    router, x_TD, order_T = ExpertChoiceRouter(5, 4), torch.randn(30, 5), torch.randperm(30)
    routing, moved = router(x_TD), router(x_TD[order_T])
    pairs = set(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True))
    assert {(int(order_T[t]), e) for t, e in zip(moved.token_N.tolist(), moved.expert_N.tolist(), strict=True)} == pairs
    assert len(set(_visits(routing, 30).tolist())) > 2  # some get none, some several


def test_each_sequence_is_chosen_from_alone():
    torch.manual_seed(0)
    router = ExpertChoiceRouter(5, 4, group="sequence")
    x_TD, sequence_T = torch.randn(30, 5), torch.arange(30) // 10
    routing = router(x_TD, None, Context(sequence_T=sequence_T))
    for sequence in range(3):
        alone = router(x_TD[sequence_T == sequence])
        mine_N = sequence_T[routing.token_N] == sequence
        assert routing.expert_N[mine_N].tolist() == alone.expert_N.tolist()
        assert (routing.token_N[mine_N] - 10 * sequence).tolist() == alone.token_N.tolist()
    router.group = "batch"
    assert not torch.equal(router(x_TD).token_N, routing.token_N)


def test_a_later_token_may_take_an_earlier_one_s_place():
    """No causal form: reference 9.5."""
    router, x_TD = _with_logits(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), top_k=1)
    assert router.eval()(x_TD).token_N[router(x_TD).expert_N == 0].tolist() == [0, 1]
    with torch.no_grad():
        router.weight[0, 3] = 9.0
    routing = router(x_TD)
    assert routing.token_N[routing.expert_N == 0].tolist() == [0, 3]


@pytest.mark.parametrize("cap", [None, 2])
def test_padding_is_never_taken_and_does_not_count(cap):
    torch.manual_seed(0)
    router = ExpertChoiceRouter(5, 4, top_k=2, cap=cap)
    x_TD, valid_T = torch.randn(40, 5), torch.arange(40) % 5 < 3
    x_TD[~valid_T] *= 100
    routing, alone = router(x_TD, valid_T), router(x_TD[valid_T])
    assert routing.load_E.tolist() == [12] * 4
    assert valid_T[routing.token_N].all()
    assert torch.equal(routing.expert_N, alone.expert_N)
    assert torch.equal(torch.arange(40)[valid_T][alone.token_N], routing.token_N)
    assert router(x_TD, torch.zeros(40, dtype=torch.bool)).num_rows == 0


@pytest.mark.parametrize("cap", [None, 1])
@pytest.mark.parametrize("value", [0.0, 1e4, -1e4])
def test_equal_scores_go_to_the_earliest_tokens(value, cap):
    router, x_TD = _with_logits(torch.full((8, 2), value), top_k=1, cap=cap)
    routing = router(x_TD)
    assert routing.token_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert routing.expert_N.tolist() == [0, 1] * 4
    assert routing.weight_N.isfinite().all()


def test_a_forbidden_expert_has_weight_zero_and_no_nan():
    router, x_TD = _with_logits(torch.tensor([[0.0, float("-inf")], [1.0, 0.0]]), top_k=2)
    with torch.no_grad():
        x_TD = x_TD.clamp_min(1e-30)  # 0 * -inf is no number
    assert router(x_TD).weight_N.isfinite().all()


def _value(score_TE: torch.Tensor, plan_TE: torch.Tensor) -> float:
    entropy = -(plan_TE * plan_TE.clamp_min(1e-300).log()).sum()
    return float((plan_TE * score_TE).sum() + 1e-3 * entropy)


@pytest.mark.parametrize(("cap", "scale"), [(1, 1.0), (2, 1.0), (2, 4.0), (3, 0.3)])
def test_a_settled_plan_keeps_every_limit_and_none_that_does_is_better(cap, scale):
    torch.manual_seed(0)
    score_TE = (torch.randn(24, 6, dtype=torch.float64) * scale).softmax(dim=-1)
    plan_TE = capped_plan(score_TE, take=4, cap=cap, max_steps=5000)
    assert plan_TE.sum(dim=0).tolist() == pytest.approx([4.0] * 6, abs=1e-9)
    assert float(plan_TE.sum(dim=1).max()) <= cap + 1e-3
    assert float(plan_TE.max()) <= 1
    for _ in range(50):  # moves that keep to all limits: shift a little between two tokens and two experts
        (s, t), (d, e) = torch.randperm(24)[:2].tolist(), torch.randperm(6)[:2].tolist()
        moved_TE = plan_TE.clone()
        step = 0.5 * float(torch.stack([plan_TE[s, d], plan_TE[t, e], 1 - plan_TE[s, e], 1 - plan_TE[t, d]]).min())
        moved_TE[[s, t], [d, e]] -= step
        moved_TE[[s, t], [e, d]] += step
        assert _value(score_TE, moved_TE) <= _value(score_TE, plan_TE) + 1e-6


def test_a_cap_of_one_is_the_balanced_assignment():
    """Reference 9.6, invariant 5: what BASE solves exactly, up to the entropy of the plan."""
    for seed in range(3):
        score_TE = torch.randn(24, 4, generator=torch.Generator().manual_seed(seed)).double().softmax(dim=-1)
        exact = float(score_TE.gather(1, balanced_assignment(score_TE)[:, None]).sum())
        plan_TE = capped_plan(score_TE, take=6, cap=1, max_steps=3000)
        assert -1e-4 <= exact - float((plan_TE * score_TE).sum()) <= 1e-3 * 24 * math.log(4) + 1e-6


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_cap_holds_for_nearly_all_tokens_in_a_hundred_turns(scale):
    torch.manual_seed(0)
    logits_TE = torch.randn(256, 16) * scale + torch.randn(16) * scale / 2
    free, capped = (_with_logits(logits_TE, top_k=2, cap=cap) for cap in (None, 3))
    free, capped = (router(x_TD) for router, x_TD in (free, capped))
    over = int((_visits(capped, 256) > 3).sum())
    assert capped.load_E.tolist() == free.load_E.tolist() == [32] * 16
    assert int((_visits(free, 256) > 3).sum()) > 2 * over
    assert over <= 8
    assert torch.equal(capped.weight_N, capped.scores_TE[capped.token_N, capped.expert_N])


def test_a_cap_that_never_binds_changes_nothing():
    torch.manual_seed(0)
    logits_TE = torch.randn(64, 4)
    results = [router(x_TD) for router, x_TD in (_with_logits(logits_TE, cap=cap) for cap in (None, 4))]
    assert torch.equal(results[0].token_N, results[1].token_N)
    assert torch.equal(results[0].expert_N, results[1].expert_N)


def test_ranks_start_anew_in_every_group_and_padding_stands_behind():
    score_TE = torch.tensor([[1.0], [3.0], [2.0], [3.0], [9.0], [0.0]])
    group_T = torch.tensor([1, 0, 1, 0, 0, 1])
    valid_T = torch.tensor([True, True, True, True, False, True])
    assert rank_for_experts(score_TE, group_T, valid_T)[:, 0].tolist()[:4] == [1, 0, 0, 1]
    assert int(rank_for_experts(score_TE, group_T, valid_T)[5, 0]) == 2


@pytest.mark.parametrize(("share", "expected"), [(1 / 49, 2), (0.29, 28), (0.001, 1), (1.0, 98)])
def test_a_share_is_rounded_down_in_exact_numbers(share, expected):
    group_T = torch.zeros(98, dtype=torch.int64)
    assert share_of_groups(group_T, torch.ones(98, dtype=torch.bool), share).tolist() == [expected] * 98
    assert share_of_groups(group_T, torch.zeros(98, dtype=torch.bool), share).tolist() == [0] * 98


ERRORS = [
    (
        {"top_k": 5},
        "top_k, the experts per token on average, must be above 0 and at most num_experts=4, got 5. Lower top_k, or "
        "add experts.",
    ),
    (
        {"top_k": 0},
        "top_k, the experts per token on average, must be above 0 and at most num_experts=4, got 0. Lower top_k, or "
        "add experts.",
    ),
    (
        {"top_k": 3, "cap": 2},
        "cap must be at least top_k=3, got 2: the average cannot exceed the limit. Raise cap, or lower top_k.",
    ),
    ({"group": "expert"}, "group must be 'batch' or 'sequence', got 'expert'. The paper ranks the whole batch."),
]


@pytest.mark.parametrize(("options", "message"), ERRORS)
def test_what_cannot_be_chosen_is_refused(options, message):
    with pytest.raises(ConfigError) as error:
        ExpertChoiceRouter(3, 4, **options)
    assert str(error.value) == message
